"""Step 10: the concepts page with the live model behind it: type a text, steer, take a latent away.

    python 10_explore.py                    # prints a URL for the browser on this machine; Ctrl-C ends it
    python 10_explore.py OPEN=True          # opens the browser, too
    python 10_explore.py SAE=<name>         # another SAE than the last one

The server listens on 127.0.0.1 alone and asks for the token in the URL, so nobody else can use it. From another
machine: ssh -L 8710:127.0.0.1:8710 host, and the same URL.

Reads  store/verify_sae_training/saes/<name>/: the SAE; if they are there, also step 4's names and step 5's
       concepts.html
Writes nothing
"""
from typing import Annotated

import checkout  # noqa: F401  (first: finds lib)
from lib.constants import override
from lib.ranges import Device, FileName, Location, Positive, Size, at_least, at_most

SAE: Location | None = None               # name or folder of an SAE; None: the one trained or imported last
RUN_ID: FileName | None = None            # texts whose page is shown; None: those that the SAE was trained on
PORT: Annotated[int, at_least(0), at_most(65535)] = 8710  # of 127.0.0.1; 0: any free one
OPEN = False                              # open the page in the browser of this machine
TEXT_TOKENS: Size = 512                   # tokens of a text, at most; the model's own limit may be lower
NEW_TOKENS: Size = 40                     # tokens that the model writes
TEMPERATURE: Annotated[float, at_least(0), at_most(100)] = 0.7  # of what it writes; 0: greedy
SECONDS: Positive = 60                    # after which a text that is being written ends
TRUST_REMOTE_CODE = False                 # run code that comes with a hub model; only for authors you trust
DEVICE: Device = "auto"
CONSTANTS = override(globals())

import asyncio
import webbrowser

from lib.encoder import load_encoder
from lib.environment import InputError, log, run
from lib.saes import find_sae
from live.answers import Live
from live.server import Site, serve, take_port

FOLDER = find_sae(SAE)


def ready(url):
    print(f"open  {url}\nCtrl-C ends it", flush=True)
    if OPEN:
        webbrowser.open(url)


def page_folder(own):
    """Where the page of the chosen texts is; own: the run that the SAE was trained on."""
    if RUN_ID in (None, own):
        return FOLDER
    folder = FOLDER / f"on_{RUN_ID}"
    if not (folder / "concepts.html").exists():
        raise InputError(f"RUN_ID={RUN_ID} has no page of this SAE's concepts; run notebooks 04 and 05 with it first")
    return folder


def main():
    sockets = take_port(PORT)  # a port that is taken is told before the model is loaded
    encoder = load_encoder(FOLDER, device=DEVICE, trust_remote_code=TRUST_REMOTE_CODE)
    folder = page_folder(encoder.sae.config.get("run_id"))
    if not (folder / "concepts.html").exists():
        log.warning("there is no concepts page yet: run 04_name_sae_concepts.ipynb and 05_show_concepts.ipynb")
    live = Live(encoder, text_tokens=TEXT_TOKENS, new_tokens=NEW_TOKENS, temperature=TEMPERATURE, written={})
    asyncio.run(serve(Site(live, folder, SECONDS), sockets, ready))
    print("\nended")


if __name__ == "__main__":
    run(main)
