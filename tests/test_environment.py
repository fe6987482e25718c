"""What must hold however the library is imported."""
import subprocess
import sys

from lib.environment import PROJECT


def test_import_guards_hold_when_the_first_module_imports_transformers():
    code = "import lib.models; from transformers import LlamaForCausalLM; from overcomplete.sae import TopKSAE"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT)
