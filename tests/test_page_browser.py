"""The page of all concepts in Chromium, from disk: search, filters, table, map, addresses, keys, edits that merge."""
import csv
import io
import re
import shutil
import time

import pytest
from many_concepts import browser, made_up

from concepts import page_files
from concepts.dictionary import edit_concepts, merge_concepts, read_concepts, write_concepts
from concepts.page_files import PARTS, write_page
from concepts.tables import concepts_from_csv

pytest.importorskip("selenium")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

pytestmark = pytest.mark.skipif(not shutil.which("chromedriver") or not shutil.which("chromium"),
                                reason="Chromium and its driver are not installed")
HASH = "0123456789abcdef"
ABOUT = {"title": "Concepts of a model", "facts": ["a fact"], "sae_hash": HASH, "n_latents": 400, "units": "x' units"}
MANY = 300


def entry(latent):
    return {"name": f"name{latent}", "source": "offline", "description": f"Fires on name{latent}", "f1": 0.5}


def latents(n):
    """Made-up ones with names that tell them apart; the word zebra is in a text of 7 alone, 9 has no name."""
    for one in made_up(n, texts_each=4):
        latent = one["latent"]
        one |= {"entry": entry(latent) if latent != 9 else None, "interest": -latent, "score": 0.5 + latent / 600}
        if latent == 7:
            text = "a striped zebra"
            one["intervals"][0]["examples"] = [{"text": text, "score": 1.0, "char_start": 10, "char_end": 15,
                                                "token_str": "zebra", "spans": [[10, 15]], "acts": [1.0]}]
        yield one


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Folders with a page of one file and one of many, of the same latents."""
    folder = tmp_path_factory.mktemp("pages")
    write_page(folder / "one" / "concepts.html", ABOUT, latents(MANY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_files, "INLINE_LATENTS", 100)
        assert len(write_page(folder / "many" / "concepts.html", ABOUT, latents(MANY))) == 2
    return folder


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    driver = browser(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


@pytest.fixture(params=["one", "many"])
def page(request, pages, chromium):
    return Page(chromium, pages / request.param / "concepts.html")


class Page:
    """One page in the browser; wait() until what a test asks for is so."""

    def __init__(self, driver, path):
        self.driver, self.path = driver, path
        self.open("")
        driver.execute_script("localStorage.clear()")
        self.open("")

    def open(self, address):
        self.driver.get("about:blank")
        self.driver.get(self.path.as_uri() + address)

    def find(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.driver.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector)

    def rows(self):
        return self.driver.execute_script("return [...document.querySelectorAll('.row .name')].map(e => e.textContent)")

    def hash(self):
        return self.driver.execute_script("return location.hash")

    def wait(self, wish, seconds=20):
        end = time.monotonic() + seconds
        while not wish():
            assert time.monotonic() < end, (self.hash(), self.text("h2"), self.text("#count"), self.rows()[:40])
            time.sleep(0.03)

    def errors(self):
        return [line for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]


def test_the_detail_follows_the_search_through_names_and_texts(page):
    page.wait(lambda: page.text("h2") == "name0" and len(page.rows()) > 10)
    search = page.find("#search")
    search.send_keys("name21")
    page.wait(lambda: page.text("h2") == "name21" and page.hash() == "#21?q=name21")
    assert page.rows()[:3] == ["name21", "name210", "name211"] and "11 of 300" in page.text("#count")
    search.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    page.wait(lambda: page.text("h2") == "name211" and page.driver.title.startswith("211 name211"))
    search.send_keys(Keys.ESCAPE)
    page.wait(lambda: "300 latents" in page.text("#count") and page.hash() == "#211")
    search.send_keys("zeb")
    page.wait(lambda: page.rows() == ["name7"] and page.text("h2") == "name7")
    assert "1 of them by their texts alone" in page.text("#count")
    assert page.text(".words .peak") == "zebra" and not page.errors()


def test_an_address_opens_what_it_says_and_nothing_else(page):
    page.open("#9")
    page.wait(lambda: page.text("h2") == "No name")
    nowhere = ("#400", "#x", "#-1", "#1e1", "#0x3", "#%33", "#99999999999999999999")
    for address in ("#350", *nowhere):
        said = "There is no such latent" if address in nowhere else "Latent 350 is not on this page"
        page.open(address)
        page.wait(lambda said=said: page.text("h2") == said)
        assert page.text(".words") == "" and "no latent" in page.driver.title
    page.open("#12?q=name1&sort=-latent&view=table&frequency=..50")
    page.wait(lambda: [name for name in page.rows() if name.startswith("name")][-5:] == [
        "name13", "name12", "name11", "name10", "name1"])
    assert page.find("#filters").get_attribute("hidden") and "Filters (1)" in page.text("#to-filters")
    page.find('#views [data-view="list"]').click()
    page.wait(lambda: page.text("h2") == "name12" and "view" not in page.hash())
    page.driver.back()
    page.wait(lambda: "view=table" in page.hash() and page.find("#head").is_displayed())
    page.driver.execute_script("location.hash = '#13'")
    page.wait(lambda: page.text("h2") == "name13")


def test_filters_order_table_and_chance(page):
    page.find("#to-filters").click()
    page.find('#filters input[aria-label="accuracy from"]').send_keys("0.9")
    page.wait(lambda: "of 300" in page.text("#count"))
    page.find("#random").click()
    scores = page.driver.execute_script(
        "return [...document.querySelectorAll('.row')].map(row => page.row(Number(row.dataset.latent)).score)")
    assert scores and min(scores) >= 0.9
    chosen = page.driver.execute_script("return page.row(page.selected()).score")
    assert chosen >= 0.9 and "score=0.9.." in page.hash()
    page.find("#filters .reset").click()
    page.find('#views [data-view="table"]').click()
    page.find("#head [role=columnheader]:first-child button").click()
    page.wait(lambda: page.rows()[0] == "name0")
    page.find("#head [role=columnheader]:first-child button").click()
    page.wait(lambda: page.rows()[0] == "name299")
    page.find(".row").click()
    page.wait(lambda: page.text("h2") == "name299" and page.find("#detail").is_displayed())


def test_the_map_selects_and_the_hooks_tell(page):
    page.driver.execute_script("window.told = []; page.onSelect(latent => told.push(latent))")
    page.find("#to-map").click()
    page.wait(lambda: page.find("#canvas").is_displayed())
    page.driver.execute_script("page.select(5)")
    page.wait(lambda: page.text("h2") == "name5" and "view=map" in page.hash())
    # As a person would: look for a dot, and click on it.
    at = page.driver.execute_script("""const canvas = document.getElementById("canvas"), pen = canvas.getContext("2d");
        const ground = pen.getImageData(0, 0, canvas.width, canvas.height).data;
        for (let i = 3; i < ground.length; i += 4) if (ground[i] > 200)
          return [(i >> 2) % canvas.width, Math.floor((i >> 2) / canvas.width)];""")
    page.driver.execute_script("""const canvas = document.getElementById("canvas"), [x, y] = arguments[0];
        const box = canvas.getBoundingClientRect(); canvas.setPointerCapture = () => {};
        for (const kind of ["pointerdown", "pointerup"]) canvas.dispatchEvent(new PointerEvent(kind,
          { clientX: box.left + x, clientY: box.top + y, pointerId: 1 }));""", at)
    page.wait(lambda: page.driver.execute_script("return told.length") == 3)
    assert page.driver.execute_script("return told.at(-1) === page.selected()") and not page.errors()


def test_what_a_person_writes_stays_and_merges(pages, chromium, tmp_path):
    page = Page(chromium, pages / "many" / "concepts.html")
    page.open("#8")
    page.wait(lambda: page.text("h2") == "name8")
    page.find(".over > button").click()
    name = page.find(".editor input")
    name.clear()
    name.send_keys('=a "dog", <b>barks</b>')
    page.find(".editor label:nth-of-type(4) input").send_keys("Ada")
    page.find(".editor button[type=submit]").click()
    page.wait(lambda: page.text("h2") == '=a "dog", <b>barks</b>')
    page.open("#9")
    page.wait(lambda: page.text("h2") == "No name")
    page.find(".over .group button").click()  # a rating needs a name
    page.wait(lambda: "give it one first" in page.text(".editor"))
    page.find(".editor input").send_keys("nine" + Keys.ENTER)
    page.wait(lambda: page.text("h2") == "nine")
    page.open("#250")
    page.wait(lambda: page.text("h2") == "name250")
    page.find(".over .group button:last-child").click()
    page.wait(lambda: page.find(".over .group button:last-child").get_attribute("aria-pressed") == "true")
    assert page.text("#save") == "Save 3 edits"
    page.open("#8")
    page.wait(lambda: page.text("h2") == '=a "dog", <b>barks</b>')  # kept over a reload
    page.driver.execute_script("""const key = "sae-concepts:" + page.about.sae_hash;
        const kept = JSON.parse(localStorage[key]);
        kept[20] = { name: "of another window", stamp: page.about.sae_hash + "/" };
        localStorage[key] = JSON.stringify(kept);""")
    page.find(".over .group button:nth-child(2)").click()
    page.wait(lambda: page.text("#save") == "Save 4 edits")
    page.find("#save").click()
    folder = page.driver.capabilities["chrome"]["userDataDir"]
    saved = re.sub("profile$", "", folder) + "concepts_edits.csv"
    page.wait(lambda: shutil.os.path.exists(saved))
    page.driver.execute_script("localStorage.clear()")
    table = shutil.move(saved, tmp_path / "concepts_edits.csv")
    path = tmp_path / "concepts.json"
    header = {"sae_hash": HASH, "run_id": "r", "n_latents": 400}
    write_concepts(path, header, {i: entry(i) for i in range(MANY) if i != 9})
    merged = edit_concepts(path, lambda now: concepts_from_csv(table, now["concepts"], HASH))["concepts"]
    assert merged[8] | {"name": '=a "dog", <b>barks</b>', "source": "human", "edited_by": "Ada"} == merged[8]
    assert merged[9]["name"] == "nine" and merged[9]["source"] == "human"
    assert merged[250]["rating"] == "wrong" and merged[250]["name"] == "name250" and merged[250]["f1"] == 0.5
    assert [i for i, one in merged.items() if one["source"] == "human"] == [8, 9, 20, 250]
    # Written again from there, the page says it itself, and the browser's copies go.
    back = read_concepts(path)
    assert merge_concepts(back, back) == (back["concepts"], [])
    assert csv.DictReader(io.StringIO(table.read_text(encoding="utf-8-sig"))).fieldnames[-1] == "stamp"


@pytest.mark.parametrize("view", ["list", "table", "map"])
def test_a_narrow_window_needs_no_sideways_scrolling(pages, tmp_path, view):
    driver = browser(tmp_path, width=390, height=844)
    try:
        for which in ("one",):
            page = Page(driver, pages / which / "concepts.html")
            for address in (f"#?view={view}", f"#3?view={view}"):
                page.open(address)
                page.wait(lambda: page.driver.execute_script("return !!document.querySelector('#detail h2')"))
                wide = page.driver.execute_script("""return [...document.querySelectorAll("body *")].filter(e =>
                    e.getBoundingClientRect().right > 391 && getComputedStyle(e).visibility !== "hidden"
                    && !e.closest(".chips, .name, .token, #rows")).map(e => e.outerHTML.slice(0, 80))""")
                assert wide == [] and page.driver.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        driver.quit()


def test_a_page_without_its_folder_says_so(pages, chromium, tmp_path):
    shutil.copy(pages / "many" / "concepts.html", tmp_path / "concepts.html")
    page = Page(chromium, tmp_path / "concepts.html")
    page.wait(lambda: "keep the folder concepts_data beside this page" in page.text("#detail"))
    assert len(page.rows()) > 10
    page.driver.get_log("browser")


def _luminance(colour):
    channels = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


def contrast(first, second):
    """The ratio of WCAG 2.2, of two colours [red, green, blue]."""
    low, high = sorted([_luminance(first), _luminance(second)])
    return (high + 0.05) / (low + 0.05)


def test_contrast_by_its_formula():
    assert contrast([0, 0, 0], [255, 255, 255]) == pytest.approx(21)
    assert contrast([119, 119, 119], [255, 255, 255]) == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_apart(scheme):
    style = (PARTS / "page.css").read_text()
    block = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[scheme]
    found = {name: [int(digits[i : i + 2], 16) for i in (0, 2, 4)]
             for name, digits in re.findall(r"--([\w-]+): #(\w{6})", block)}
    act = [int(x) for x in re.search(r"--act: (\d+), (\d+), (\d+)", block).groups()]
    grounds = ["bg", "panel", "hover"]
    for text in ("ink", "soft", "accent", "good", "fair", "poor"):
        for ground in grounds:
            assert contrast(found[text], found[ground]) >= 4.5, (text, ground)
    assert contrast(found["on-accent"], found["accent"]) >= 4.5
    for ground in grounds:
        assert contrast(found["edge"], found[ground]) >= 3, ground  # borders of controls
        full = [0.9 * a + 0.1 * b for a, b in zip(act, found[ground])]
        assert contrast(found["ink"], full) >= 4.5, "text on a full code"
    palettes = re.findall(r'"#(\w{6})"', (PARTS / "map.js").read_text())
    for digits in palettes[7 * scheme : 7 * scheme + 7]:
        assert contrast([int(digits[i : i + 2], 16) for i in (0, 2, 4)], found["bg"]) >= 3, digits
