"""Concepts made up by chance, as many as wanted, and how fast their page is in Chromium.

    python tests/many_concepts.py 1024 24576 65536       # writes the pages to a temporary folder; prints a table

Milliseconds, from disk, in a window of 1280 and of 390 pixels. "open": from the navigation until list and detail are
drawn, the middle of five; "key": the slowest of several letters typed into the search and of its clearing, from the
event until the next frame is drawn, and the first of all; "texts": the longest until the hits in texts stand there too.
"cpu": what of it the page's main thread computed, which other programs on the machine hardly change.
"""
import json
import random
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "experiments" / "verify_sae_training")]

from concepts.page_files import write_page  # noqa: E402

SYLLABLES = ("ba", "do", "ke", "li", "mo", "nu", "pa", "ri", "so", "tu", "ve", "za", "ing", "er", "st", "an")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update")
# The time from a change of the search until the next frame is drawn: two frames, since the first callback comes before.
TYPE = """const [text, done] = arguments, box = document.getElementById("search"), start = performance.now();
box.value = text; box.dispatchEvent(new Event("input"));
requestAnimationFrame(() => { const channel = new MessageChannel();
  channel.port1.onmessage = () => done(performance.now() - start); channel.port2.postMessage(0); });"""
READY = """const done = arguments[0]; (function look() {
  if (document.querySelector(".row") && document.querySelector("#detail h2")) requestAnimationFrame(() => setTimeout(
    () => done(performance.now()))); else setTimeout(look, 2); })();"""
TEXTS = """const done = arguments[0], start = performance.now(); (function look() {
  if (!document.getElementById("count").textContent.includes("…")) done(performance.now() - start);
  else setTimeout(look, 2); })();"""


def made_up(n_latents, seed=0, texts_each=14):
    """n_latents dicts for write_page, with every kind of content; words follow Zipf's law."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(20_000)]
    weights = list(accumulate(1 / (rank + 1) for rank in range(len(words))))
    texts = [" ".join(rng.choices(words, cum_weights=weights, k=45)) for _ in range(2000)]
    spans = [_spans(text) for text in texts]
    for latent in range(n_latents):
        top = rng.uniform(0.5, 9)
        name = ", ".join(rng.choices(words, k=rng.randint(1, 4)))
        parts = [{"kind": "top" if number == 0 else "interval", "low": top * (4 - number) / 5, "share": 0.2,
                  "high": top * (5 - number) / 5, "examples": [
                      _example(rng, texts, spans, top * (5 - number) / 5) for _ in range(texts_each // 4)]}
                 for number in range(4)]
        yield {
            "latent": latent, "entry": {"name": name, "source": rng.choice(["offline", "offline", "llm", "human"]),
                                        "description": f"Fires on {name}", "f1": rng.random(), "precision": 0.5,
                                        "recall": 0.5, "score": 0.5 + rng.random() / 2, "baseline": 0.6},
            "fires": 1000, "frequency": 10 ** rng.uniform(-5, -0.5), "max": top, "mean_active": top / 2, "p99": top,
            "coherence": rng.random(), "interest": rng.random(), "stability": rng.random(), "intervals": parts,
            "histogram": {"edges": [top * i / 30 for i in range(31)], "counts": [1 << 10 - i // 3 for i in range(30)]},
            "token_share": [[word, 0.1, 10, top / 2, 0.5] for word in rng.choices(words, cum_weights=weights, k=12)],
            "promotes": [[f" {word}", rng.random()] for word in rng.choices(words, k=8)],
            "near": [[rng.randrange(n_latents), rng.random()] for _ in range(5)],
            "cofiring": [[rng.randrange(n_latents), rng.random(), 12] for _ in range(5)],
            "map": (rng.gauss(0, 1), rng.gauss(0, 1)),
        }


def _spans(text):
    starts = [0] + [at + 1 for at, character in enumerate(text) if character == " "]
    return [[start, end - 1] for start, end in zip(starts, [*starts[1:], len(text) + 1])]


def _example(rng, texts, spans, code):
    chosen = rng.randrange(len(texts))
    peak = rng.randrange(12, 30)
    window = spans[chosen][peak - 12 : peak + 8]
    acts = [0.0] * 12 + [code] + [code / 3] * (rng.random() < 0.5) + [0.0] * 8
    start, end = spans[chosen][peak]
    return {"text": texts[chosen], "score": code, "token_str": texts[chosen][start:end], "char_start": start,
            "char_end": end, "spans": window, "acts": acts[: len(window)]}


def browser(folder, width=1280, height=900, dark=False):
    """A headless Chromium with its profile and downloads in `folder`, as selenium drives it."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    return driver


def measured(path, width, folder):
    """Milliseconds by name, as the module says."""
    driver = browser(folder, width)

    def timed(script, *arguments):
        before = _computed(driver)
        took = driver.execute_async_script(script, *arguments)
        return took, _computed(driver) - before

    try:
        driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        opened = []
        for _ in range(5):
            driver.get("about:blank")
            before = _computed(driver)
            driver.get(path.as_uri())
            opened.append((driver.execute_async_script(READY), _computed(driver) - before))
        keys, texts = [], []
        for text in ("b", "ba", "bad", "bado", "", "z", "an", "", "d", "do", "dok", "st", "ing er", "12", ""):
            keys.append(timed(TYPE, text))
            texts.append(timed(TEXTS))
            time.sleep(0.4)
        found = {"open": sorted(opened)[2], "first key": keys[0], "worst key": max(keys[1:]), "texts": max(texts)}
        return {name: f"{took:.0f} (cpu {cpu:.0f})" for name, (took, cpu) in found.items()}
    finally:
        driver.quit()


def _computed(driver):
    metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return 1000 * next(one["value"] for one in metrics if one["name"] == "TaskDuration")


def main():
    with tempfile.TemporaryDirectory() as folder:
        for size in map(int, sys.argv[1:] or ["1024"]):
            path = Path(folder) / str(size) / "concepts.html"
            start = time.perf_counter()
            written = write_page(path, {"title": f"{size:,} latents", "sae_hash": "0" * 16, "n_latents": size},
                                 made_up(size))
            took = time.perf_counter() - start
            sizes = [sum(file.stat().st_size for file in [one, *one.glob("*")] if file.is_file()) for one in written]
            print(f"{size:,} latents: written in {took:.0f} s, MB {[round(one / 1e6, 1) for one in sizes]}", flush=True)
            for width in (1280, 390):
                found = measured(path, width, Path(folder) / f"{size}_{width}")
                print(f"  {width} px", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
