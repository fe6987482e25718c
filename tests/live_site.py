"""What the tests of the live page serve: the shipped model, an SAE of directions of its activations, names, a page.

Nothing is trained, so it takes as long as loading the model.
"""
import asyncio
import contextlib
import json
import threading
from pathlib import Path

import torch
from conftest import PROJECT

from concepts.page_files import write_page
from lib.activations import SaveSettings, block_rows
from lib.encoder import load_encoder
from lib.hooks import resolve
from lib.models import load_model, load_tokenizer, model_identity
from lib.sae import SAE, make_sae, sae_hash, save_sae
from lib.texts import filler_id, tokenise
from live.answers import Live
from live.server import Site, listen, take_port

MODEL = PROJECT / "store" / "embedded" / "model"
TEXT = "The little dog was sad. The cat ran home."
N_LATENTS, TOP_K = 256, 4


def make_products(folder: Path) -> SAE:
    """Write into `folder` what steps 2 to 5 leave of an SAE: the SAE, its names, its page."""
    model, tokenizer = load_model(str(MODEL), torch.device("cpu"), torch.float32), load_tokenizer(str(MODEL))
    point = resolve(model, "resid_post:0")
    rows, (x,) = block_rows(model, [point], tokenise(tokenizer, [TEXT], 0, 512), pad_id=filler_id(tokenizer),
                            settings=SaveSettings())
    # Directions of real activations: each token of the text has latents of its own.
    generator = torch.Generator().manual_seed(0)
    W = torch.cat([x - x.mean(0), torch.randn(N_LATENTS - len(x), x.shape[1], generator=generator)])
    W = torch.nn.functional.normalize(W, dim=1)
    config = {"hook": point.signature, "model": model_identity(model, str(MODEL))}
    sae = make_sae(W, torch.zeros(len(W)), W, x.mean(0), scale=float(x.std()), top_k=TOP_K, config=config)
    sae.maxima = torch.full((N_LATENTS,), float(sae.encode(x)[0].max()))
    save_sae(sae, folder / "topk_sae.pt", probe=x.repeat(64 // len(x) + 1, 1)[:64])
    words = [TEXT[start:end].strip() for start, end in rows[:, 3:].tolist()]
    names = {i: f"{word} <b>&" for i, word in enumerate(words)}
    (folder / "concepts.json").write_text(json.dumps(
        {"sae_hash": sae_hash(sae), "concepts": {str(i): {"name": name} for i, name in names.items()}}))
    stats = {"fires": 1, "max": float(sae.maxima[0]), "mean_active": 1.0, "frequency": 0.1}
    write_page(folder / "concepts.html", {"title": "Concepts", "sae_hash": sae_hash(sae)},
               [{"latent": i, "name": name, "source": "offline", **stats} for i, name in names.items()])
    return sae


def live_of(folder: Path, **changes) -> Live:
    encoder = load_encoder(folder / "topk_sae.pt", device="cpu")
    return Live(encoder, text_tokens=64, new_tokens=12, temperature=0.7, written={})._replace(**changes)


@contextlib.contextmanager
def served(site: Site):
    """The URL of a server that runs in a thread of its own, and its worker."""
    found, started = {}, threading.Event()

    async def run():
        server, worker, url = listen(site, take_port(0))
        found.update(url=url, worker=worker, loop=asyncio.get_running_loop(), end=asyncio.Event())
        started.set()
        await found["end"].wait()
        server.stop()
        worker.close()
        await server.close_all_connections()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        assert started.wait(30)
        yield found["url"], found["worker"]
    finally:
        found["loop"].call_soon_threadsafe(found["end"].set)
        thread.join(30)
    assert not thread.is_alive()
