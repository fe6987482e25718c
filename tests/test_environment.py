"""What must hold however the library is imported."""
import subprocess
import sys

import pytest
from lib.environment import PROJECT


@pytest.mark.parametrize("module", ["lib.models", "lib.sae", "lib.store"])
def test_whichever_module_comes_first_the_import_guards_come_before_it(module):
    code = f"import {module}; from transformers import LlamaForCausalLM; from overcomplete.sae import TopKSAE"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT)
