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
from safetensors import safe_open
from safetensors.numpy import save_file

from latentflow.inference.opening import SHIPPED

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
    pytest.mark.skipif(find_spec("peft") is None, reason='needs peft: pip install -e ".[lora]"'),
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver on the PATH"),
]
PATIENCE = 600  # seconds: machines may be busy
STEPS = 8
DESKTOP, PHONE = (1280, 1080), (390, 844)
TABS = ("Generate", "Inpaint", "Edit")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one adapter, "glow": the layers of the shipped few-step adapter alone."""
    folder = tmp_path_factory.mktemp("adapters")
    shipped = SHIPPED / "fast" / "pytorch_lora_weights.safetensors"
    with safe_open(shipped, "np") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys() if "lora" in name}  # noqa: SIM118
    metadata["latentflow"] = json.dumps(json.loads(metadata["latentflow"]) | {"few_steps": {}})
    (folder / "glow").mkdir()
    save_file(tensors, folder / "glow" / shipped.name, metadata)
    return folder


@pytest.fixture(scope="module")
def address(adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real `latentflow app` on a free port; how long it took to start is printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "latentflow", "app", "--port", str(port), "--device", "cpu"]
    command += ["--lora-folder", str(adapters)]
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

    def open(self, address: str, size: tuple[int, int] = DESKTOP) -> None:
        """The page as it first looks, once the model is loaded."""
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(address)
        self.wait(lambda: self.all("#generate-prompt textarea"))
        self.wait(lambda: "pixels" in self.one("#header").text)

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

    def open_settings(self, tab: str) -> None:
        """Open the tab's advanced settings, if they are closed."""
        if not any(field.is_displayed() for field in self.all(f"#{tab}-steps")):
            [button] = [each for each in self.all("button.label-wrap") if each.is_displayed()]
            self.wait(lambda: self.clicked(button))
            self.wait(lambda: any(field.is_displayed() for field in self.all(f"#{tab}-steps")))

    def set_steps(self, tab: str, steps: int) -> None:
        self.open_settings(tab)
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
        self.ask("3d style: red apple", seed=0)
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

    def shows(self, css: str) -> bool:
        return any(element.is_displayed() for element in self.all(css))

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def screenshot(self, name: str) -> None:
        """Written where LATENTFLOW_SCREENSHOTS says."""
        if folder := os.environ.get("LATENTFLOW_SCREENSHOTS"):
            if name != "phone":  # as it looks before anybody opens the settings
                self.run(
                    "for (const each of document.querySelectorAll('button.label-wrap.open')) each.click()"
                )
                self.run("window.scrollTo(0, 0)")
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
    assert image.shape == (128, 128, 3)
    red, green, blue = image[40:112, 24:104].transpose(2, 0, 1)
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
    me.type("#inpaint-prompt textarea", "3d style: red apple")
    me.set_steps("inpaint", STEPS)
    me.screenshot("inpaint-mask")
    painted = pixels(me.draw("inpaint"))
    me.screenshot("inpaint")
    assert painted.shape == original.shape
    rows, columns = np.nonzero((painted != original).any(-1))
    to_pixels = 128 / (512 * int(zoom[1]) / 100)  # of the screen to the image
    brush = 128 / 512 * 40 + 2
    assert len(rows) > 20
    assert columns.min() >= 64 - 50 * to_pixels - brush and columns.max() <= 64 + 50 * to_pixels + brush
    assert rows.min() >= 64 - 40 * to_pixels - brush and rows.max() <= 64 - 35 * to_pixels + brush


def test_words_edit_an_image(me) -> None:
    original = me.draw_apple()
    me.one("#generate-to-edit").click()
    me.type("#edit-prompt textarea", "3d style: green apple")
    me.type("#edit-source textarea", "3d style: red apple")
    me.set_steps("edit", STEPS)
    edited = pixels(me.draw("edit"))
    me.screenshot("edit")
    greener = (edited - original)[40:112, 24:104, 1] - (edited - original)[40:112, 24:104, 0]
    assert greener.mean() > 30


def test_cancel_ends_a_long_run(me) -> None:
    me.type("#generate-prompt textarea", "3d style: red apple")
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
        visitor.ask(("3d style: red apple", "blue heart")[seed - 1], seed)
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


# ---------------------------------------------------------------- words and layout

# The labels and buttons on view whose text is covered, cut off or outside the window.
UNREADABLE = """
const style = document.head.appendChild(document.createElement("style"))
style.textContent = "* { pointer-events: auto !important }"  // elementsFromPoint passes over others
const found = []
const painted = (element) => {
    const look = getComputedStyle(element)
    return element.checkVisibility({opacityProperty: true, visibilityProperty: true})
        && (!["rgba(0, 0, 0, 0)", "transparent"].includes(look.backgroundColor) || look.backgroundImage != "none"
            || element.matches("img, canvas, svg *")
            || [...element.childNodes].some((node) => node.nodeType == 3 && node.textContent.trim()))
}
const shown = document.querySelectorAll(
    "#header *, label, [data-testid=block-info], [data-testid=block-label], button, .label-wrap span, #inpaint-hint")
for (const element of shown) {
    const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT)
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
        if (!node.textContent.trim() || !element.checkVisibility({visibilityProperty: true})) continue
        const range = document.createRange()
        range.selectNodeContents(node)
        if (!range.getClientRects().length || node.parentElement.closest(".sr-only, .visually-hidden")) continue
        node.parentElement.scrollIntoView({block: "center", behavior: "instant"})
        for (const box of range.getClientRects()) {
            if (box.width < 2 || box.height < 2) continue
            for (const part of [0.05, 0.5, 0.95]) {
                const x = box.left + part * box.width, y = box.top + box.height / 2
                const top = document.elementsFromPoint(x, y).find((element) =>
                    element.contains(node) || node.parentElement.contains(element) || painted(element))
                if (!top || !(top.contains(node) || node.parentElement.contains(top)))
                    found.push(`${node.textContent.trim()} is under ${top && top.outerHTML.slice(0, 80)}`)
            }
        }
    }
}
style.remove()
return [...new Set(found)]
"""


def within(visitor: Visitor, css: str) -> bool:
    """Whether all of an element is in the window."""
    return bool(
        visitor.run(
            """const box = document.querySelector(arguments[0]).getBoundingClientRect()
            return box.top >= 0 && box.left >= 0 && box.width > 0
                && box.bottom <= window.innerHeight && box.right <= window.innerWidth""",
            css,
        )
    )


def test_the_page_says_what_it_is_and_what_the_checkpoint_knows(me) -> None:
    assert me.driver.title == "pictograms-128 - latentflow"
    header = me.one("#header").text
    assert header.startswith("latentflow") and "pictograms-128" in header
    for fact in (
        "128 x 128 pixels",
        "text prompts",
        "trained to inpaint",
        "few-step adapter",
        "Fluent Emoji",
    ):
        assert fact in header
    next(
        each
        for each in me.all("#generate-examples button, .gallery-item")
        if each.text == "3d style: tiger face"
    ).click()
    me.wait(lambda: me.one("#generate-prompt textarea").get_attribute("value") == "3d style: tiger face")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_label_can_be_read(address, me, size, tmp_path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    me.open(address, size)
    for tab in TABS:
        me.open_tab(tab)
        if tab != "Generate":
            box = me.one(f"#{tab.lower()}-file")
            assert box.text.split() == [
                "Image",
                "Drop",
                "File",
                "Here",
                "-",
                "or",
                "-",
                "Click",
                "to",
                "Upload",
            ]
            unreadable = me.run(UNREADABLE)
            box.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(tmp_path / "red.png"))
            shown = "#inpaint-editor canvas" if tab == "Inpaint" else "#edit-original img"
            me.wait(lambda shown=shown: any(each.is_displayed() for each in me.all(shown)))
            assert unreadable == []
        me.open_settings(tab.lower())
        time.sleep(1)  # what unfolds has to
        assert me.run(UNREADABLE) == []
        assert me.run("return document.documentElement.scrollWidth <= window.innerWidth")


def test_on_a_phone_the_result_is_in_sight_once_it_is_there(address, me) -> None:
    me.open(address, PHONE)
    for tab in TABS:
        name = tab.lower()
        if tab != "Generate":
            me.open_tab("Generate")
            me.one(f"#generate-to-{name}").click()
            me.wait(lambda name=name: me.one(f"#{name}-go").is_displayed())
        if tab == "Inpaint":
            me.wait(lambda: re.search(r"(\d+)%", me.one("#inpaint-editor").text))
            time.sleep(2)  # the canvas settles
            canvas = ActionChains(me.driver).move_to_element(me.one("#inpaint-editor canvas"))
            canvas.click_and_hold().move_by_offset(30, 5).release().perform()
        me.type(f"#{name}-prompt textarea", "3d style: red apple")
        me.draw(name)
        me.wait(lambda name=name: within(me, f"#{name}-results img"), 10)
        if tab == "Generate":
            me.screenshot("phone")


def test_the_switch_and_the_picker_do_what_the_flags_of_generate_do(me, adapters, tmp_path) -> None:
    def generated(*flags: str) -> bytes:
        command = [
            sys.executable,
            "-m",
            "latentflow",
            "generate",
            "3d style: red apple",
            "--seed",
            "3",
            "--device",
            "cpu",
        ]
        subprocess.run([*command, "-o", str(tmp_path / "a.png"), "--overwrite", *flags], check=True)
        return (tmp_path / "a.png").read_bytes()

    def steps() -> str:
        return str(me.one("#generate-steps input[type=number]").get_attribute("value"))

    me.type("#generate-prompt textarea", "3d style: red apple")
    me.set_seed("generate", 3)
    plain = me.draw("generate")
    assert plain == generated()

    me.open_settings("generate")
    assert steps() == "16" and me.shows("#generate-guidance")
    me.one("#generate-fast input").click()
    me.wait(lambda: steps() == "4" and not me.shows("#generate-guidance"))
    fast = me.draw("generate")
    assert fast == generated("--fast")

    me.one("#generate-fast input").click()
    me.wait(lambda: steps() == "16" and me.shows("#generate-guidance"))
    assert me.draw("generate") == plain

    assert not me.shows("#generate-lora-weight-1")
    me.one("#generate-lora input").click()
    options = me.wait(lambda: [o for o in me.all("[role=option]") if o.text.split()[-1:] == ["glow"]])
    options[0].click()
    me.type("#generate-lora-weight-1 input[type=number]", "0.55")
    assert me.draw("generate") == generated("--lora", f"{adapters}/glow:0.55")
