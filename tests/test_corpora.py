"""After step 2 an SAE stands alone: without its activations, without runs/, and on texts that it was not trained on."""
import json
import shutil

import pytest
from conftest import TEXTS, run_notebook, tiny_model, word_tokenizer
from test_verify_scripts import FOLDER, SMALL, TRAIN, files, script, source  # noqa: F401  (two fixtures)

from lib import load_encoder
from lib.files import read_json
from lib.sae import load_sae, sae_hash
from lib.saes import MODEL_FILE, find_sae
from lib.store import open_run

OTHERS = ["the red cat ran .", "a happy dog sat under the blue tree .", "then it was red , and it was happy ."]


@pytest.fixture
def trained(script, source):  # noqa: F811
    """Folder of an SAE of a tiny model, with a name for each latent that fires."""
    assert script("01_save_activations.py", *source, *SMALL, "PREFLIGHT=False")[0] == 0
    assert script("02_train_sae.py", *TRAIN)[0] == 0
    return find_sae()


@pytest.fixture
def others(tmp_path):
    path = tmp_path / "others.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in OTHERS * 10))
    return path


def one_line(ended, *parts):
    code, _, said = ended
    *bars, error = said.splitlines()  # bars: of a notebook before
    assert code == 2 and error.startswith("error: ") and all(part in error for part in parts), said
    assert not [line for line in bars if "error" in line or "Traceback" in line], said


def test_the_file_says_what_the_run_says(trained):
    sae = load_sae(trained / MODEL_FILE)
    run = open_run("verify_sae_training", sae.config["run_id"])
    origin = sae.config["origin"]
    assert origin["settings"] == run.meta["settings"] and origin["tokenizer"] == run.meta["tokenizer"]
    assert origin["hook"] == run.meta["hooks"][0] and origin["constants"]["MAX_LENGTH"] == 128
    assert sae.config["model"] == run.meta["model"] and origin["first_position"] == 1  # [BOS] stands before it
    assert (sae.maxima > 0).sum() == sum(sae.maxima > 0) > 5 and len(sae.maxima) == sae.n_latents


def test_its_own_activations_are_made_again_to_the_byte(script, trained, own_store):  # noqa: F811
    runs = own_store / "verify_sae_training" / "runs"
    before = files(runs)
    shutil.rmtree(runs)
    one_line(script("07_test_causality.py"), f"python 01_save_activations.py SAE={trained.name}")
    code, said, _ = script("01_save_activations.py", f"SAE={trained.name}")
    assert code == 0 and f"SAE={trained.name} RUN_ID=" in said
    after = files(runs)
    assert {name for name in after if "meta.json" in name} == {name for name in before if "meta.json" in name}
    assert {name: after[name] for name in before} == before


def test_conflicting_constants_are_refused(script, trained, source, others, tmp_path):  # noqa: F811
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "another")
    word_tokenizer().save_pretrained(tmp_path / "another")
    one_line(script("01_save_activations.py", f"SAE={trained.name}", f"MODEL={tmp_path / 'another'}"),
             "is not the SAE's model", "leave MODEL out")
    one_line(script("01_save_activations.py", f"SAE={trained.name}", "LAYER_SIGNATURE=resid_post:0"),
             "is not where the SAE reads, resid_post:1")
    one_line(script("01_save_activations.py", "SAE=nothing_like_it"), "nothing_like_it", trained.name)
    same = [f"SAE={trained.name}", source[0], "LAYER_SIGNATURE=resid_post:1", f"DATASET={others}", "PREFLIGHT=False"]
    assert script("01_save_activations.py", *same)[0] == 0


def test_other_texts(script, trained, others, own_store):  # noqa: F811
    """01, 03, 04 and 05 on another corpus: what is made goes to its own folder, and nothing else changes."""
    run_notebook(FOLDER / "04_name_sae_concepts.ipynb", CONTROL_NAMES=0)
    content = read_json(trained / "concepts.json")
    latent = next(iter(content["concepts"]))
    content["concepts"][latent]["name"] = "a name by hand"
    (trained / "concepts.json").write_text(json.dumps(content))
    last = (own_store / "verify_sae_training" / "run_id.txt").read_text()
    before = {name: data for name, data in files(trained).items() if ".lock" not in name}
    said = script("01_save_activations.py", f"SAE={trained.name}", f"DATASET={others}", "PREFLIGHT=False",
                  "VAL_FRAC=0.3")[1]
    run_id = said.rsplit("RUN_ID=", 1)[1].split()[0]
    assert (own_store / "verify_sae_training" / "run_id.txt").read_text() == last != run_id
    out = trained / f"on_{run_id}"
    for name in ("03_analyze_training", "04_name_sae_concepts", "05_show_concepts"):
        run_notebook(FOLDER / f"{name}.ipynb", RUN_ID=run_id)
    made = {path.name for path in out.iterdir()}
    assert {"verification.json", "concepts.json", "top_texts.json", "latent_stats.safetensors", "concepts.html"} <= made
    assert {name: data for name, data in files(trained).items() if name in before} == before
    texts = {example["text"] for found in read_json(out / "top_texts.json").values() if isinstance(found, list)
             for example in found}
    assert texts and texts <= set(OTHERS)
    here = read_json(out / "concepts.json")
    assert here["run_id"] == run_id and here["sae_hash"] == sae_hash(load_sae(trained / MODEL_FILE))
    assert here["concepts"][latent]["name"] == "a name by hand" and here["concepts"][latent]["source"] == "human"


def test_a_run_of_another_model_or_place_is_refused(script, trained, source, tmp_path):  # noqa: F811
    from corpora import corpus_of

    from lib.environment import InputError

    sae = load_sae(trained / MODEL_FILE)
    script("01_save_activations.py", *source, "LAYER_SIGNATURE=resid_post:0", "PREFLIGHT=False")
    elsewhere = open_run("verify_sae_training").run_id
    with pytest.raises(InputError, match="holds resid_post:0, not"):
        corpus_of(sae, trained, elsewhere)
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "model")
    script("01_save_activations.py", *source, *SMALL, "PREFLIGHT=False")
    with pytest.raises(InputError, match="is of another model than the SAE"):
        corpus_of(sae, trained, open_run("verify_sae_training").run_id)
    here = r"set RUN_ID to a finished one, like \S+ or \S+ or model_layers_1\S+$"  # the newest first
    with pytest.raises(InputError, match=f"^run no_such_run is missing; run 01_save_activations.py, or {here}"):
        corpus_of(sae, trained, "no_such_run")
    run = open_run("verify_sae_training")
    (run.path / "manifest.json").unlink()
    with pytest.raises(InputError, match=f"^run {run.run_id} is unfinished; run 01_save_activations.py with its const"):
        corpus_of(sae, trained, run.run_id)


@pytest.mark.parametrize("gone", ["shards", "runs"])
def test_without_activations(script, trained, own_store, gone):  # noqa: F811
    """Steering, exports, the encoder and the pages of step 5 need only model and SAE; the rest says what to rerun."""
    for name in ("04_name_sae_concepts", "05_show_concepts"):
        run_notebook(FOLDER / f"{name}.ipynb", CONTROL_NAMES=0)
    tokens = load_encoder().encode(TEXTS[0])
    runs = own_store / "verify_sae_training" / "runs"
    if gone == "runs":
        shutil.rmtree(runs)
    for shard in runs.rglob("shard_*"):
        shard.unlink()
    assert str(load_encoder().encode(TEXTS[0])) == str(tokens)
    latent = int(load_encoder().sae.maxima.argmax())
    code, _, said = script("06_steer_model.py", f"LATENT={latent}", "STRENGTHS=(0,1)", "SAMPLES=1", "N_TOKENS=4")
    assert code == 0, said
    code, out, said = script("export_sae.py")
    assert code == 0 and "sparsify" in out and "workbench" in out, said
    assert script("list_saes.py")[0] == 0
    names = run_notebook(FOLDER / "05_show_concepts.ipynb")
    assert not names["activations"] and names["effects"] and (trained / "concepts.html").exists()
    again = f"python 01_save_activations.py SAE={trained.name}"
    for name, *arguments in (("export_sae.py", "FORMAT=delphi"), ("export_sae.py", "FORMAT=neuronpedia"),
                             ("07_test_causality.py",)):
        ended = script(name, *arguments)
        one_line(ended, "this reads the activations that the SAE was trained on", again)
        # these scripts have no RUN_ID, and step 1 by itself would make another run
        assert gone == "shards" or ended[2].count("01_save") == 1 and "RUN_ID" not in ended[2]
