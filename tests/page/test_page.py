"""The page in headless Chromium, over a gateway whose models answer as they are told."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait
from serve_data import VECTOR, Models, gateway, read_as, variant

from rgalign_ray.ops.local_cluster import free_port
from rgalign_ray.serve import api, web
from rgalign_ray.serve.access import Access, digest
from rgalign_ray.serve.variants import Variants

pytestmark = pytest.mark.skipif(
    not shutil.which("chromium") or not shutil.which("chromedriver"),
    reason="needs Chromium: apt-get install chromium chromium-driver",
)

KEY = "a-key-of-the-page"
PICTURES = os.environ.get("RGALIGN_PICTURES")
"""Folder to keep screenshots in."""
ENTRY = datetime(2026, 1, 5, 12)


class Told(Models):
    """Writes a query and prefers intents of its own."""

    def __init__(self, query: str, favourite: int) -> None:
        super().__init__()
        self.query, self.favourite = query, favourite

    async def read(self, text: str, seed: int | None) -> tuple[np.ndarray, str | None]:
        self.read_texts.append(text)
        return VECTOR, self.query

    async def score(self, row: dict[str, Any], candidates: np.ndarray, vector: np.ndarray | None) -> np.ndarray:
        return -np.abs(candidates - self.favourite).astype(np.float32)

    async def parts(self, row: dict[str, Any], candidates: np.ndarray, vector: np.ndarray | None) -> np.ndarray:
        query = -np.abs(candidates - self.favourite) + 1.5
        return np.stack([np.full(len(candidates), -2.0), np.full(len(candidates), 1.0), query, query * 0 - 0.5], axis=1)


@pytest.fixture(scope="module")
def models() -> list[Told]:
    return [Told("where is my parcel, it should be here by now?", 0), Told("parcel", 2)]


@pytest.fixture(scope="module")
def address(models: list[Told], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    reader = read_as(tmp_path_factory.mktemp("log"))
    made = gateway(reader, models[0])
    pairs = zip(("aligned", "frozen"), models, (1.0, 0.0), strict=True)
    made.variants = Variants([variant(reader, model, name, weight) for name, model, weight in pairs])

    def example(number: int, words: str) -> api.Example:
        event = api.Event(event="chat", text=words, ts=ENTRY - timedelta(hours=number))
        features = {"tab": "To Receive", "hour": 3.0, "cards": ["visa"]}
        session = api.Session(user_id=f"u{number}", region="SG", ts=ENTRY, history=[event], features=features)
        return api.Example(name=f"s{number}", session=session)

    async def ready() -> bool:
        return True

    offered = [example(1, "my parcel is late"), example(2, "I want <b>my</b> money back")]
    app = web.build(made, ready, Access({"page": digest(KEY)}, None), lambda: None, offered)
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    quiet = [
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-quic",
    ]
    for word in ("headless=new", "no-sandbox", "disable-gpu", f"user-data-dir={tmp_path}", *quiet):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_window_size(1280, 1000)
    yield driver
    wrong = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    driver.quit()
    assert all("status of 401" in message or "status of 422" in message for message in wrong), wrong


def cards(browser: webdriver.Chrome) -> list[WebElement]:
    return browser.find_elements(By.CSS_SELECTOR, "#answers section")


def queries(browser: webdriver.Chrome) -> list[str]:
    return [card.find_element(By.TAG_NAME, "blockquote").text for card in cards(browser)]


def titles(card: WebElement) -> list[str]:
    return [line.text for line in card.find_elements(By.CSS_SELECTOR, ".title span:first-child")]


def wait(browser: webdriver.Chrome, until: Any) -> None:
    WebDriverWait(browser, 20).until(until)


def ranked(browser: webdriver.Chrome) -> None:
    done = "return document.getElementById('answers').getAttribute('aria-busy') === 'false'"
    wait(browser, lambda it: len(cards(it)) == 2 and it.execute_script(done))


def opened(browser: webdriver.Chrome, address: str) -> None:
    """The page asks for a key, and begins when it has one."""
    browser.get(address)
    wait(browser, lambda it: it.find_element(By.ID, "key").is_displayed())
    assert "a known key is asked for" in browser.find_element(By.ID, "status").text
    browser.find_element(By.ID, "key").send_keys(KEY, Keys.TAB)
    ranked(browser)


def picture(browser: webdriver.Chrome, name: str) -> None:
    if PICTURES:
        browser.save_screenshot(f"{PICTURES}/{name}.png")


def test_click_through(browser: webdriver.Chrome, address: str, models: list[Told]) -> None:
    opened(browser, address)
    assert queries(browser) == ["“where is my parcel, it should be here by now?”", "“parcel”"]
    aligned, frozen = cards(browser)
    assert titles(aligned) == [f"{place}. i{intent}" for place, intent in enumerate([0, 1, 2, 3, 4], 1)]
    assert titles(frozen)[0] == "1. i2"
    assert frozen.find_element(By.CSS_SELECTOR, ".moved").text == "3. with aligned"
    bar = aligned.find_element(By.CSS_SELECTOR, ".bar").get_attribute("aria-label")
    assert bar == "base rate -2.00, user and intent 1.00, query and intent 1.50, all three together -0.50"
    assert {row.text.split()[0] for row in aligned.find_elements(By.CSS_SELECTOR, ".stages div")} == {
        "read",
        "reasoner",
        "ranker",
        "total",
    }
    wait(browser, lambda it: "aligned 0 1 0" in it.find_element(By.ID, "counts").text)
    picture(browser, "light")

    Select(browser.find_element(By.ID, "example")).select_by_index(1)
    wait(browser, lambda _: "I want" in models[0].read_texts[-1])
    ranked(browser)
    tab = browser.find_element(By.ID, "feature-tab")
    tab.clear()
    tab.send_keys("Cancelled")
    browser.find_element(By.ID, "add").click()
    ActionChains(browser).send_keys("never mind").perform()  # the new event's words have the focus
    browser.find_element(By.ID, "rank").click()
    wait(browser, lambda _: models[1].read_texts[-1].startswith("Cancelled: never mind, I want"))
    ranked(browser)
    assert not browser.find_elements(By.CSS_SELECTOR, "#history b"), "words are text, whatever they look like"

    browser.find_element(By.TAG_NAME, "summary").click()
    hour = browser.find_element(By.ID, "feature-hour")
    hour.clear()
    hour.send_keys("noon", Keys.TAB)
    browser.find_element(By.ID, "rank").click()
    wait(browser, lambda it: "session.features.hour: must be of type float" in it.find_element(By.ID, "status").text)


def test_by_keyboard_alone_dark_and_on_a_phone(browser: webdriver.Chrome, address: str, models: list[Told]) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    opened(browser, address)
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(20, 24, 22)"
    picture(browser, "dark")
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth"), "it fits the phone"
    picture(browser, "phone")
    told = len(models[0].read_texts)
    for _ in range(40):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        if browser.switch_to.active_element.get_attribute("id") == "rank":
            break
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    wait(browser, lambda _: len(models[0].read_texts) == told + 1)
    ranked(browser)
    controls = "[...document.querySelectorAll('input, select, button')]"
    unnamed = f"return {controls}.filter(it => !it.labels?.length && !it.ariaLabel && !it.textContent.trim()).length"
    assert browser.execute_script(unnamed) == 0, "everything has a name for those who do not see it"
