"""The web page in a real Chromium, as somebody uses it, with the shipped checkpoint.

Needs `pip install -e ".[test,browser]"` and Chromium with its driver (Debian: apt install chromium-driver):

    pytest tests/web/test_browser.py --run-slow
    LATENTFLOW_SCREENSHOTS=docs/guide pytest tests/web/test_browser.py --run-slow     # writes docs/guide/app-*.png too
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("selenium", reason='needs Selenium: pip install -e ".[browser]"')
from selenium import webdriver
from selenium.common.exceptions import ElementClickInterceptedException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason='needs Gradio: pip install -e ".[app]"'),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH"),
]
PATIENCE = 600  # seconds: machines may be busy
STEPS = 8


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real `latentflow app` on a free port; how long it took to start is printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "latentflow", "app", "--port", str(port), "--device", "cpu"]
    errors = (tmp_path_factory.mktemp("app") / "stderr").open("w+")
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as app:
        try:
            assert app.stdout is not None
            line = app.stdout.readline().strip()
            print(f"\nlatentflow app started in {time.monotonic() - began:.1f} s")
            assert line == f"http://127.0.0.1:{port}", Path(errors.name).read_text()
            yield line
        finally:
            app.terminate()
    # The server may complain of windows that were closed in the middle of an answer; no line of ours may fail.
    complaints = Path(errors.name).read_text()
    assert "/latentflow/" not in complaints, complaints


class Visitor:
    """One browser window on the page."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        options.add_argument("--headless=new")
        options.add_argument("--window-size=1280,1080")
        for switch in ("no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
            options.add_argument(f"--{switch}")
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        self.driver.set_page_load_timeout(PATIENCE)

    def open(self, address: str) -> None:
        """The page as it first looks."""
        self.driver.get(address)
        self.wait(lambda: self.all("#generate-prompt textarea"))

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def one(self, css: str) -> Any:
        return self.wait(lambda: self.all(css))[0]

    def wait(self, condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        return WebDriverWait(self.driver, seconds, 0.1).until(lambda driver: condition())

    def open_tab(self, name: str) -> None:
        tab = next(tab for tab in self.all("button[role=tab]") if tab.text == name)
        self.wait(lambda: self.clicked(tab))
        self.wait(lambda: self.one(f"#{name.lower()}-go").is_displayed())

    @staticmethod
    def clicked(element: Any) -> bool:
        """Whether nothing, such as the veil of a page that is still loading, lay over it."""
        try:
            element.click()
        except ElementClickInterceptedException:
            return False
        return True

    def type(self, css: str, text: str) -> None:
        field = self.one(css)
        field.clear()
        field.send_keys(text + "\t")

    def set_steps(self, tab: str, steps: int) -> None:
        self.type(f"#{tab}-steps input[type=number]", str(steps))

    def set_seed(self, tab: str, seed: int) -> None:
        box = self.one(f"#{tab}-new-seed input")
        if box.is_selected():
            box.click()
        self.type(f"#{tab}-seed input", str(seed))

    def source(self, tab: str) -> str:
        images = self.all(f"#{tab}-results img")
        return images[0].get_attribute("src") if images else ""

    def draw(self, tab: str) -> bytes:
        """Press the button and wait for another image than before; its file."""
        before = self.source(tab)
        self.one(f"#{tab}-go").click()
        complaints = ".toast-body.warning, .toast-body.error"
        self.wait(lambda: self.source(tab) not in ("", before) or self.all(complaints))
        assert self.source(tab) not in ("", before), self.message()
        return self.fetched(tab)

    def draw_apple(self) -> Any:
        """Its pixels."""
        self.ask("red apple", seed=0)
        return pixels(self.draw("generate"))

    def ask(self, prompt: str, seed: int) -> None:
        self.type("#generate-prompt textarea", prompt)
        self.set_steps("generate", STEPS)
        self.set_seed("generate", seed)

    def fetched(self, tab: str) -> bytes:
        with urllib.request.urlopen(self.source(tab)) as answer:
            content: bytes = answer.read()
            return content

    def caption(self, tab: str) -> str:
        return str(self.one(f"#{tab}-results .caption-label").text)

    def message(self) -> str:
        """What the page says, once it has faded in: text that nobody sees yet is empty here."""
        return str(self.wait(lambda: " ".join(toast.text for toast in self.all(".toast-body"))))

    def contacted(self) -> set[str | None]:
        """The hosts of every request so far."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return {urlsplit(url).hostname for url in urls if urlsplit(url).scheme not in ("data", "blob")}

    def screenshot(self, name: str) -> None:
        """Written where LATENTFLOW_SCREENSHOTS says."""
        if folder := os.environ.get("LATENTFLOW_SCREENSHOTS"):
            time.sleep(1)  # what fades in has to
            self.driver.save_screenshot(str(Path(folder) / f"app-{name}.png"))


@pytest.fixture(scope="module")
def windows() -> Iterator[list[Visitor]]:
    """Two browsers, which know nothing of one another."""
    visitors = [Visitor(), Visitor()]
    yield visitors
    for visitor in visitors:
        visitor.driver.quit()


@pytest.fixture
def me(address: str, windows: list[Visitor]) -> Visitor:
    windows[0].open(address)
    return windows[0]


def pixels(content: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def test_a_prompt_becomes_an_image_and_nobody_else_is_contacted(me) -> None:
    image = me.draw_apple()
    assert image.shape == (64, 64, 3)
    red, green, blue = image[20:56, 12:52].transpose(2, 0, 1)
    assert ((red > 150) & (green < 130) & (blue < 130)).mean() > 0.4
    assert me.caption("generate") == "seed 0"
    assert me.contacted() == {"127.0.0.1"}
    me.screenshot("generate")


def test_what_is_painted_over_is_drawn_anew_and_nothing_else(me) -> None:
    original = me.draw_apple()
    me.one("#generate-to-inpaint").click()
    zoom = me.wait(lambda: re.search(r"(\d+)%", me.one("#inpaint-editor").text))
    time.sleep(2)  # the canvas settles
    canvas = me.one("#inpaint-editor canvas")
    drag = ActionChains(me.driver).move_to_element_with_offset(canvas, -50, -40).click_and_hold()
    drag.move_by_offset(50, 5).move_by_offset(50, -5).release().perform()
    me.type("#inpaint-prompt textarea", "red apple")
    me.set_steps("inpaint", STEPS)
    me.screenshot("inpaint-mask")
    painted = pixels(me.draw("inpaint"))
    me.screenshot("inpaint")
    assert painted.shape == original.shape
    rows, columns = np.nonzero((painted != original).any(-1))
    to_pixels = 64 / (512 * int(zoom[1]) / 100)  # of the screen to the image
    brush = 64 / 512 * 40 + 2
    assert len(rows) > 20
    assert columns.min() >= 32 - 50 * to_pixels - brush and columns.max() <= 32 + 50 * to_pixels + brush
    assert rows.min() >= 32 - 40 * to_pixels - brush and rows.max() <= 32 - 35 * to_pixels + brush


def test_words_edit_an_image(me) -> None:
    original = me.draw_apple()
    me.one("#generate-to-edit").click()
    me.type("#edit-prompt textarea", "green apple")
    me.type("#edit-source textarea", "red apple")
    me.set_steps("edit", STEPS)
    edited = pixels(me.draw("edit"))
    me.screenshot("edit")
    greener = (edited - original)[20:56, 12:52, 1] - (edited - original)[20:56, 12:52, 0]
    assert greener.mean() > 30


def test_cancel_ends_a_long_run(me) -> None:
    me.type("#generate-prompt textarea", "red apple")
    me.type("#generate-images input[type=number]", "16")
    me.set_steps("generate", 200)
    me.one("#generate-go").click()
    me.wait(lambda: re.search(r"\b[1-9]\d*/200", me.one("#generate-results").text))  # it moves
    me.screenshot("progress")
    me.one("#generate-cancel").click()
    me.wait(lambda: "/200" not in me.one("#generate-results").text)
    assert me.source("generate") == ""
    me.type("#generate-images input[type=number]", "1")
    me.set_steps("generate", 1)
    assert me.draw("generate")  # the line is free again


def test_two_windows_keep_their_own_seeds_and_images(address, me, windows) -> None:
    visitors = {1: me, 2: windows[1]}
    visitors[2].open(address)
    for seed, visitor in visitors.items():
        visitor.ask(("red apple", "blue heart")[seed - 1], seed)
    for visitor in visitors.values():  # at once
        visitor.one("#generate-go").click()
    together = {}
    for seed, visitor in visitors.items():
        visitor.wait(lambda visitor=visitor: visitor.source("generate"))
        assert visitor.caption("generate") == f"seed {seed}"
        together[seed] = visitor.fetched("generate")
    assert together[1] != together[2]
    for seed, visitor in visitors.items():  # again, each alone
        visitor.set_seed("generate", 7)
        visitor.draw("generate")
        visitor.set_seed("generate", seed)
        assert np.array_equal(pixels(visitor.draw("generate")), pixels(together[seed]))


def test_a_bad_upload_gets_a_message(me, tmp_path) -> None:
    (tmp_path / "notes.png").write_text("not an image")
    for tab in ("inpaint", "edit"):
        me.open_tab(tab.capitalize())
        me.one(f"#{tab}-file input[type=file]").send_keys(str(tmp_path / "notes.png"))
        assert "notes.png is not an image" in me.message()
        assert str(Path("/tmp/gradio")) not in me.message()
        for close in me.all(".toast-close"):
            close.click()
        me.wait(lambda: not me.all(".toast-body"))
