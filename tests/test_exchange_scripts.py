"""export_sae.py and import_sae.py as a user runs them, and the hub as a server on loopback."""
import base64
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import PROJECT, run_notebook, sae_of
from test_exchange import PEERS
from test_verify_scripts import FOLDER, SMALL, TRAIN, script, source  # noqa: F401  (two fixtures)
from zoo import build

from exchange.facts import facts_of, hook_name, public_name
from exchange.formats import FORMATS
from exchange.hub import push, write_card
from lib.environment import InputError
from lib.exchange.formats import read_foreign
from lib.exchange.hub import pull
from lib.hooks import resolve
from lib.sae import load_sae, sae_hash
from lib.saes import find_sae
from lib.store import open_run


@pytest.fixture
def trained(script, source, own_store):  # noqa: F811
    """The folder of an SAE, trained by steps 1 and 2 on a tiny model."""
    assert script("01_save_activations.py", *source, *SMALL, "PREFLIGHT=False")[0] == 0
    assert script("02_train_sae.py", *TRAIN)[0] == 0
    return sae_of(own_store)


def codes_and_reconstruction(path):
    sae = load_sae(path)
    x = torch.cat(open_run("verify_sae_training").shards(sae.config["hook"])).float()
    values, indices = sae.encode(x)
    return torch.zeros(len(x), sae.n_latents).scatter_add_(1, indices, values), sae.decode(values, indices)


def test_every_export_comes_back_as_the_same_sae(script, trained, own_store):  # noqa: F811
    """Exported, then imported: the same codes in x' units, the same reconstruction, under a name of its own."""
    code, out, _ = script("export_sae.py")
    assert code == 0 and all(name in out for name in FORMATS)
    before = codes_and_reconstruction(trained / "topk_sae.pt")
    folders = {"sae_lens": "blocks.1.hook_resid_post", "dictionary_learning": "blocks.1.hook_resid_post",
               "sparsify": "layers.1"}
    for kind, folder in folders.items():
        code, out, err = script("import_sae.py", f"SOURCE={trained}/exports/{kind}", f"SUBFOLDER={folder}")
        assert code == 0 and kind in out and "held out: EV" in out, err
        for mine, other in zip(before, codes_and_reconstruction(sae_of(own_store) / "topk_sae.pt")):
            torch.testing.assert_close(other, mine, rtol=1e-5, atol=1e-5)
        again = script("import_sae.py", f"SOURCE={trained}/exports/{kind}/{folder}")
        assert again[0] == 0, "the same SAE may be imported again"
    assert len(list(trained.parent.iterdir())) == 1 + len(folders)


def test_the_export_says_what_it_is(script, trained):  # noqa: F811
    script("export_sae.py")
    metadata = json.loads((trained / "exports/sae_lens/blocks.1.hook_resid_post/cfg.json").read_text())["metadata"]
    sae = load_sae(trained / "topk_sae.pt")
    expected = {
        "hook_name": "blocks.1.hook_resid_post", "hf_module_path": "model.layers.1", "context_size": 128,
        "prepend_bos": True, "kind": "topk", "k": 3, "seed": 0, "tokens_trained": sae.config["tokens_trained"],
        "run_id": sae.config["run_id"], "explained_variance": sae.config["final"]["ev"],
    }
    assert {key: metadata[key] for key in expected} == expected
    assert "per-dimension mean" in metadata["explained_variance_formula"]
    card = (trained / "exports/sae_lens/README.md").read_text()
    assert card.startswith("---\nlibrary_name: saelens\n") and "Special tokens were left out" in card
    assert 'from_pretrained("user/repository", "blocks.1.hook_resid_post")' in card


def test_what_a_run_does_not_tell_is_not_told(script, source, own_store):  # noqa: F811
    """[BOS] stands first in every text; where positions or special tokens were masked otherwise, that can't be seen."""
    for given, special in ((["SKIP_FIRST=1"], True), (["SKIP_SPECIAL=False"], False),
                           (["MAX_NORM_MULTIPLE=100"], True)):
        assert script("01_save_activations.py", *source, *SMALL, "PREFLIGHT=False", *given)[0] == 0
        assert script("02_train_sae.py", *TRAIN)[0] == 0
        facts = facts_of(load_sae(find_sae() / "topk_sae.pt"))
        assert facts["prepend_bos"] is None and facts["special_tokens_left_out"] is special


def test_an_sae_is_exported_by_where_it_reads_and_not_by_its_modules_name(tmp_path):
    """What Gemma's mlp puts out is normalised before it is added to the stream; hook_mlp_out is what is added."""
    model = build("gemma2")
    for signature, name in (("model.layers.0.mlp", "model.layers.0.mlp"), ("mlp_out:0", "blocks.0.hook_mlp_out"),
                            ("model.layers.0.self_attn", "model.layers.0.self_attn"),
                            ("model.layers.0.post_attention_layernorm:input",
                             "model.layers.0.post_attention_layernorm:input"),
                            ("resid_mid:1", "blocks.1.hook_resid_mid")):
        point = resolve(model, signature)
        assert hook_name({"path": point.path, "point": point.point, "names": list(point.names)}) == name


def test_steps_and_tokens_are_those_of_the_training(trained):
    """Rows that fill no batch sit out."""
    history = json.loads((trained / "training_history.json").read_text())
    sae = load_sae(trained / "topk_sae.pt")
    n_train = int((~open_run("verify_sae_training").is_val).sum())
    assert history["n_steps"] == 2 * (n_train // 64) and n_train % 64
    assert facts_of(sae)["steps"] == history["n_steps"]
    assert sae.config["tokens_trained"] == history["val"]["tokens"][-1] == 64 * history["n_steps"]


def test_notebooks_open_an_imported_sae_and_say_that_it_has_no_history(script, trained, capsys):  # noqa: F811
    script("export_sae.py", "FORMAT=sparsify")
    assert script("import_sae.py", f"SOURCE={trained}/exports/sparsify/layers.1")[0] == 0
    names = run_notebook(FOLDER / "03_analyze_training.ipynb")
    said = capsys.readouterr().out
    assert "trained elsewhere (topk SAE of sparsify" in said and "brought no history" in said
    checks = {row["check"] for row in names["checks"]}
    assert {"ev", "dead", "duplicates", "reload", "ce_recovered"} <= checks
    assert not checks & {"loss_fell", "weights_moved", "ev_random", "gap"}
    for name in ("04_name_sae_concepts.ipynb", "05_show_concepts.ipynb"):
        run_notebook(FOLDER / name)
    assert (find_sae() / "concepts.html").exists()


def test_wrong_input_is_one_line(script, trained, tmp_path):  # noqa: F811
    script("export_sae.py", "FORMAT=sparsify")
    (tmp_path / "empty").mkdir()
    folded = read_foreign(trained / "exports/sparsify/layers.1").sae
    narrow = tmp_path / "narrow"
    FORMATS["sparsify"].write(narrow, folded._replace(W=torch.ones(64, 4), W_dec=torch.full((64, 4), 0.5),
                                                      b_dec=torch.zeros(4)), {})
    for name, arguments, message in (
        ("export_sae.py", ["FORMAT=onnx"],
         "FORMAT=onnx must be one of all, workbench, sae_lens, dictionary_learning, sparsify, delphi, neuronpedia"),
        ("export_sae.py", ["PUSH_TO=user/name"], "PUSH_TO takes an SAE in one format"),
        ("export_sae.py", ["FORMAT=sparsify", "PUSH_TO=user/name"], "PUSH_TO=user/name: "),  # the tests are offline
        ("export_sae.py", ["FORMAT=neuronpedia"], "top_texts.json is missing"),
        ("import_sae.py", [], "SOURCE is missing"),
        ("import_sae.py", [f"SOURCE={tmp_path}/empty"], "holds none of"),
        ("import_sae.py", ["SOURCE=nobody/nothing"], "set a local folder, or a repository that this machine can reach"),
        ("import_sae.py", [f"SOURCE={narrow}", "SUBFOLDER=../other"], "must be a folder inside SOURCE"),
        ("import_sae.py", [f"SOURCE={narrow}"],
         "the SAE is for activations of width 4, llamaforcausallm_model_layers_1 has 16"),
    ):
        code, _, err = script(name, *arguments)
        assert code == 2 and message in err and err.count("\n") == 1, (name, arguments, err)


def test_nothing_that_is_exported_names_a_path(script, trained, tmp_path):  # noqa: F811
    """Model and data set are local files here: only the last parts of their paths are told."""
    run_notebook(FOLDER / "04_name_sae_concepts.ipynb")
    for kind in ("all", "delphi", "neuronpedia"):
        assert script("export_sae.py", f"FORMAT={kind}")[0] == 0
    written = [path for path in (trained / "exports").rglob("*") if path.is_file()]
    assert len(written) > 15
    for path in written:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        assert str(tmp_path).encode() not in content, path
    assert "| model name | model |" in (trained / "exports/sae_lens/README.md").read_text()


def test_an_edited_card_is_kept(script, trained):  # noqa: F811
    card, kept = trained / "exports/sparsify/README.md", trained / "exports/sparsify/README_edited.md"
    for _ in range(2):
        assert script("export_sae.py", "FORMAT=sparsify")[0] == 0 and not kept.exists()
    made = card.read_text()
    card.write_text(made.replace("latents, at most", "fine latents, at most"))
    assert script("export_sae.py", "FORMAT=sparsify")[0] == 0
    assert card.read_text() == made and "fine latents" in kept.read_text()


@pytest.mark.parametrize("error", [RuntimeError("Cannot connect\nto host"), KeyError("token"), OSError(""),
                                   type("ConnectError", (Exception,), {})("late")])
def test_whatever_the_hubs_client_raises_is_one_line(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    (tmp_path / "a").write_text("x")
    for call in (lambda: push(tmp_path, [tmp_path / "a"], "user/name"), lambda: pull("user/name")):
        with pytest.raises(InputError, match="=user/name: ") as refused:
            call()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("name", "public"), [
    ("gpt2", "gpt2"), ("user/model", "user/model"), ("/home/ann/customers/acme", "acme"),
    ("/home/ann/customers/acme/", "acme"), ("~/secret/model", "model"),
    ("./customers/acme", "acme"), ("customers/acme/texts", "texts"), ("customers/acme.jsonl", "acme.jsonl"),
    ("C:\\Users\\ann\\model", "model"), ("../..", None),
    ("store/embedded/model", "embedded/model"), ("store/embedded/stories/train.jsonl", "embedded/stories/train.jsonl"),
    ("/", "local"), ("lib/metrics", "metrics"),
])
def test_what_others_are_told_of_a_name(name, public, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = public_name(name)
    assert told == (public if public is not None else tmp_path.parents[1].name)


def test_a_card_is_text_and_not_markup(tmp_path):
    evil = "<img src=x onerror=alert(1)> | x [a](javascript:1) `b`\n# c"
    facts = {"model_name": evil, "hook_name": evil, "n_latents": 1, "k": 1, "note": evil,
             "special_tokens_left_out": None}
    text = write_card(tmp_path, "sae_lens", "folder", facts).read_text()
    assert "<img" not in text and "\n# c" not in text and "[a](" not in text and text.count("\n|") == 3 + 4
    assert "Special tokens" not in text


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as creating a repository, a commit of small files and a download need."""

    files: dict[str, bytes] = {}
    token = "Bearer hf_test"

    def answer(self, content, status=200, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Authorization"] != self.token:
            return self.answer({"error": "no"}, 401)
        address = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            return self.answer({"url": f"{address}/user/name", "name": "user/name"})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return self.answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False}
                                          for name in names]})
        if "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines() if line.strip()]
            self.files.update({line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines
                               if line["key"] == "file"})
            return self.answer({"success": True, "commitUrl": f"{address}/user/name/commit/abc", "commitOid": "a" * 40})
        return self.answer({})

    def do_GET(self):
        if match := re.match("/user/name/resolve/[^/]+/(.*)", self.path):
            content = self.files[match[1]]
            return self.answer(content, ETag=f'"{hash(content)}"', X_Repo_Commit="a" * 40)
        if self.path.startswith("/api/models/user/name"):
            if "/tree/" in self.path:
                return self.answer([{"type": "file", "path": name, "size": len(content), "oid": "b" * 40}
                                    for name, content in self.files.items()])
            siblings = [{"rfilename": name} for name in self.files]
            return self.answer({"id": "user/name", "sha": "a" * 40, "siblings": siblings, "tags": [], "private": False})
        return self.answer({"error": "there is none"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    Hub.files.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_pushed_and_pulled_again(script, trained, hub, tmp_path):  # noqa: F811
    """Through huggingface_hub itself, from push to a usable SAE; a wrong token is one line."""
    own = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test", "HF_HOME": str(tmp_path / "hf"),
           "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}

    def run(name, *arguments, **more):
        return subprocess.run([sys.executable, str(PROJECT / FOLDER / name), *arguments], capture_output=True,
                              text=True, env=os.environ | own | more)

    folder = "blocks.1.hook_resid_post"
    others = [trained / "exports/sae_lens" / name
              for name in (".env", "notes.md", "blocks.0.hook_mlp_out/cfg.json", f"{folder}/mine.txt")]
    for other in others:
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_text("a secret of " + str(tmp_path))
    done = run("export_sae.py", "FORMAT=sae_lens", "PUSH_TO=user/name")
    assert done.returncode == 0, done.stderr
    assert "/user/name/commit/" in done.stdout
    named = [name for name, content in Hub.files.items() if str(tmp_path).encode() in content]
    assert not named, "no path of this machine"
    assert set(Hub.files) == {"README.md", f"{folder}/cfg.json", f"{folder}/sae_weights.safetensors"}
    assert b'from_pretrained("user/name"' in Hub.files["README.md"]
    before = codes_and_reconstruction(trained / "topk_sae.pt")
    shutil.rmtree(trained)
    refused = run("import_sae.py", "SOURCE=user/name")
    assert refused.returncode == 2 and f"set SUBFOLDER to the folder of one, like {folder}\n" in refused.stderr
    done = run("import_sae.py", "SOURCE=user/name", f"SUBFOLDER={folder}")
    assert done.returncode == 0, done.stderr
    for mine, other in zip(before, codes_and_reconstruction(find_sae() / "topk_sae.pt")):
        torch.testing.assert_close(other, mine, rtol=1e-5, atol=1e-5)
    refused = run("export_sae.py", "FORMAT=sae_lens", "PUSH_TO=user/name", HF_TOKEN="hf_wrong")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1, refused.stderr
    assert refused.stderr.startswith("error: PUSH_TO=user/name: ")


@pytest.mark.skipif(not PEERS.exists(), reason="the other libraries are not installed: make peers")
def test_saebench_accepts_the_export_and_finds_the_same_numbers(script, own_store):  # noqa: F811
    """Its core evaluation on the embedded model: our EV and L0 come out, from held-out stories."""
    assert script("01_save_activations.py", "DATA_LIMIT=400", "VAL_FRAC=0.3", "PREFLIGHT=False")[0] == 0
    assert script("02_train_sae.py", "EPOCHS=4")[0] == 0
    assert script("export_sae.py", "FORMAT=dictionary_learning")[0] == 0
    folder = sae_of(own_store)
    export = folder / "exports/dictionary_learning/blocks.0.hook_resid_post"
    command = [str(PEERS), "experiments/benchmarks/saebench_core.py", "store/embedded/model", str(export),
               "store/embedded/stories/val.jsonl"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    final = load_sae(folder / "topk_sae.pt").config["final"]
    assert found["sparsity"]["l0"] == pytest.approx(final["l0_mean"], abs=0.01)
    assert found["reconstruction_quality"]["explained_variance"] == pytest.approx(final["ev"], abs=0.02)
    assert found["model_performance_preservation"]["ce_loss_score"] > 0.9


def test_an_sae_on_the_hub_is_three_lines_away(script, trained, hub, tmp_path):  # noqa: F811
    """Pushed in our own format, then opened by its repository on a machine without a store."""
    own = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test", "HF_HOME": str(tmp_path / "hf"),
           "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    folder = trained
    names = {"schema_version": 1, "sae_hash": sae_hash(load_sae(folder / "topk_sae.pt")), "run_id": "r", "hook": "h",
             "model_id": "model", "n_latents": 64, "concepts": {}}
    names["concepts"] = {str(i): {"name": f"concept {i}", "source": "human"} for i in range(64)}
    (folder / "concepts.json").write_text(json.dumps(names))
    arguments = [sys.executable, str(PROJECT / FOLDER / "export_sae.py"), "FORMAT=workbench", "PUSH_TO=user/name"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | own)
    assert done.returncode == 0, done.stderr
    assert set(Hub.files) == {"README.md", "topk_sae.pt", "topk_sae.json", "concepts.json"}
    assert not [name for name, content in Hub.files.items() if str(tmp_path).encode() in content]
    assert b'load_encoder("user/name")' in Hub.files["README.md"]
    code = ("import sys; from lib import load_encoder; encoder = load_encoder('user/name', model=sys.argv[1]); "
            "print(encoder.encode('the cat sat')); print(float(encoder.sae.maxima.max()))")
    elsewhere = os.environ | own | {"STORE_DIR": str(tmp_path / "nowhere"), "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], capture_output=True, text=True,
                          env=elsewhere)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert len(said) == 4 and "concept " in said[0] and float(said[-1]) > 0
    done = subprocess.run([sys.executable, "-c", code.replace(", model=sys.argv[1]", "")], capture_output=True,
                          text=True, env=elsewhere, cwd=tmp_path / "hf")
    assert "load_encoder(..., model=...)" in done.stderr.splitlines()[-1]
