"""The live page as a person uses it: 10_explore.py as it is started, and Chromium."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import PROJECT
from live_site import TEXT, make_products
from many_concepts import browser

pytest.importorskip("selenium")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

pytestmark = pytest.mark.skipif(not shutil.which("chromedriver") or not shutil.which("chromium"),
                                reason="Chromium and its driver are not installed")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    folder = store / "verify_sae_training" / "saes" / "small"
    folder.mkdir(parents=True)
    make_products(folder)
    return store


def start(store, *arguments):
    environment = os.environ | {"STORE_DIR": str(store), "OMP_NUM_THREADS": "1"}
    script = PROJECT / "experiments" / "verify_sae_training" / "10_explore.py"
    return subprocess.Popen([sys.executable, str(script), "SAE=small", *arguments], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, env=environment, cwd=store)


def url_of(process):
    """The URL that the script prints once it answers."""
    for line in process.stdout:
        if found := re.search(r"http://127\.0\.0\.1:\d+/\?token=\S+", line):
            return found[0]
    raise AssertionError(process.stderr.read())


@pytest.fixture(scope="module")
def url(store):
    process = start(store, "PORT=0", "NEW_TOKENS=12")
    try:
        yield url_of(process)
    finally:
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)
    assert process.returncode == 0 and said[0].endswith("\nended\n") and "Traceback" not in said[1], said[1]


def test_texts_without_a_page_are_named(store):
    said = start(store, "PORT=0", "RUN_ID=elsewhere").communicate(timeout=120)[1]
    assert said.splitlines()[-1].startswith("error: RUN_ID=elsewhere has no page of this SAE's concepts; run notebooks")


class Page:
    def __init__(self, browser, url):
        self.browser, self.find = browser, lambda css: browser.find_element(By.CSS_SELECTOR, css)
        browser.get_log("browser")
        browser.get(url)
        self.wait(lambda: self.tokens())

    def wait(self, what):
        """Until what() holds; what the page takes away meanwhile is looked for again."""
        def holds(_):
            try:
                return what()
            except Exception as error:
                if type(error).__name__ in ("StaleElementReferenceException", "NoSuchElementException"):
                    return False
                raise
        return WebDriverWait(self.browser, 60, poll_frequency=0.05).until(holds)

    def tokens(self):
        return [each.text for each in self.browser.find_elements(By.CSS_SELECTOR, "#live .live-text span")]

    def texts(self):
        return [self.find(f"#live-{which}").text for which in ("plain", "steered")]

    def latents(self):
        return self.browser.find_elements(By.CSS_SELECTOR, "#live .live-latents button")

    def changes(self):
        return [row.text for row in self.browser.find_elements(By.CSS_SELECTOR, "#live .live-next tbody tr")]

    def type(self, text):
        box = self.find("#live-text")
        box.clear()
        box.send_keys(text)

    def slide(self, value):
        self.browser.execute_script("const slider = document.getElementById('live-strength');"
                                    "slider.value = arguments[0]; slider.dispatchEvent(new Event('input'));", value)

    def complaints(self):
        return [entry["message"] for entry in self.browser.get_log("browser")]

    def is_written(self):
        return "perplexity" in self.find("#live-steered").find_element(By.XPATH, "..").text

    def token(self, text):
        return next(each for each in self.browser.find_elements(By.CSS_SELECTOR, "#live .live-text span")
                    if each.text == text)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    driver = browser(tmp_path_factory.mktemp("chromium"))
    yield driver
    driver.quit()


def resize(browser, width, height):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False})


@pytest.fixture
def page(chromium, url):
    resize(chromium, 1280, 900)
    shown = Page(chromium, url)
    yield shown
    assert shown.complaints() == []


def test_type_click_steer_and_take_away(page):
    assert page.browser.current_url.endswith("/concepts.html") and "token" not in page.browser.current_url
    page.type("The dog <b>sat</b> & ran.")
    page.wait(lambda: "".join(page.tokens()).replace("·", "") == "Thedog<b>sat</b>&ran.")

    # a token, and one of its latents: the page shows it
    page.wait(lambda: page.token("dog").click() is None)
    page.wait(lambda: "dog" in page.find("#live h3").text and page.latents())
    number = page.wait(lambda: page.latents()[0].get_attribute("data-latent"))
    assert page.wait(lambda: "<b>&" in page.latents()[0].text)  # names are text
    page.wait(lambda: page.latents()[0].click() is None)
    page.wait(lambda: page.find("#live-chosen").text.startswith(f"latent {number}"))
    page.wait(lambda: page.browser.current_url.partition("#")[2].startswith(number))
    page.wait(lambda: number in page.find("#detail").text)

    # without it the next token changes
    page.wait(lambda: "nats" in page.find("#live .live-hint[role=status]").text)
    page.wait(lambda: len(page.changes()) >= 6 and all(re.search(r"\d %", change) for change in page.changes()))

    # at 0 both texts are the same, at 3 they are not
    page.find("#live details .live-line button").click()
    page.wait(lambda: all(page.texts()) and page.is_written())
    plain, steered = page.texts()
    assert plain == steered and len(plain) > 20
    page.slide(3)
    page.wait(lambda: page.texts()[1] != plain and page.is_written())
    assert page.texts()[0] == plain and page.find("#live output").text == "+3.00"


def test_the_keyboard_goes_from_token_to_token(page):
    page.type(TEXT)
    page.wait(lambda: "home" in page.tokens() and len(page.tokens()) > 8)
    page.wait(lambda: page.find("#live .live-text [tabindex='0']").text == ".")
    page.browser.execute_script("document.querySelector(\"#live .live-text [tabindex='0']\").focus()")
    for expected in ("home", "ran"):
        page.browser.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
        page.wait(lambda: page.browser.switch_to.active_element.text == expected)
        assert expected in page.find("#live h3").text


def test_a_key_is_answered_at_once(page):
    """From a key to the coloured tokens; measured on two busy cores it takes some 100 ms."""
    start = time.perf_counter()
    page.type("A cat")
    page.wait(lambda: page.tokens() == ["A", "cat"])
    assert time.perf_counter() - start < 5


def test_a_narrow_window_has_it_too_without_overflow(page):
    resize(page.browser, 390, 844)
    page.browser.refresh()
    button = page.wait(lambda: next(each for each in page.browser.find_elements(By.CSS_SELECTOR, "header .live-narrow")
                                    if each.is_displayed()))
    button.click()
    page.wait(lambda: page.tokens() and page.find("#live-text").is_displayed())
    page.wait(lambda: page.latents()[0].click() is None)
    page.wait(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#live .live-next tbody tr"))
    page.slide(2)
    page.wait(lambda: all(page.texts()))
    width, places = page.browser.execute_script(
        "return [document.documentElement.scrollWidth, [...document.querySelectorAll('#live *')].map(each =>"
        "each.getBoundingClientRect().right)]")
    assert width <= 390 and max(places) <= 390
    assert page.find("#live .live-stacked").is_displayed()
