"""A page embeds everything, escapes its texts, and overwrites nothing unasked."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from latentflow.errors import UserError
from latentflow.utils.html_page import Page


class Reader(HTMLParser):
    """Tags with their attributes, and the text; every tag that must be closed is."""

    def __init__(self, page: Page) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(page.html())
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture
def page() -> Page:
    page = Page("Cats & <dogs>")
    page.heading("A <heading>")
    page.text("<script>alert(1)</script>")
    page.code("latentflow train 'a b' <c>")
    page.list(["one", "<two>"])
    page.table(["name", "<size>"], [["a.png", 3], ["<b>.png", 4]])
    page.bars({"x<y": 5, "z": 10})
    page.image(Image.new("RGB", (3, 2), (255, 0, 0)), 'a "red" <image>')
    page.details("more <of it>").text("hidden & found")
    return page


def test_every_text_is_there_and_escaped(page) -> None:
    seen = Reader(page)
    assert {"script", "two", "b", "c", "dogs", "of", "heading", "size", "image"}.isdisjoint(dict(seen.tags))
    for text in (
        "Cats & <dogs>", "A <heading>", "<script>alert(1)</script>", "latentflow train 'a b' <c>", "<two>", "<b>.png",
        "x<y", "name", "<size>", 'a "red" <image>',
    ):  # fmt: skip
        assert text in seen.words
    assert re.search(r"<details><summary>more &lt;of it&gt;</summary>\s*<p>hidden &amp; found", page.html())
    assert re.findall(r"width: ([\d.]+)%", page.html().split("</style>")[1]) == ["50.0", "100.0"]


def test_images_are_embedded_and_nothing_is_fetched(page) -> None:
    [attributes] = [attributes for tag, attributes in Reader(page).tags if tag == "img"]
    header, data = (attributes["src"] or "").split(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert header == "data:image/png;base64" and attributes["alt"] == 'a "red" <image>'
    assert image.size == (3, 2) and image.getpixel((0, 0)) == (255, 0, 0)
    assert "http" not in page.html() and "url(" not in page.html()


def test_bars_of_nothing() -> None:
    empty = Page("nothing")
    empty.bars({})
    empty.bars({"a": 0})
    Reader(empty)


def test_a_figure_is_drawn_inline() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(2, 1))
    figure.subplots().set_title("loss < 1")
    page = Page("Run")
    page.figure(figure, "the loss")
    html = page.html()
    assert "<svg" in html and "loss &lt; 1" in html and html.count("<?xml") == 0 == html.count("DOCTYPE svg")


def test_write_keeps_what_exists(page, tmp_path) -> None:
    file = tmp_path / "new" / "report.html"
    page.write(file)
    assert file.read_text(encoding="utf-8") == page.html()
    file.write_text("mine")
    with pytest.raises(UserError, match=r"report\.html exists\n.*--overwrite"):
        page.write(file)
    assert file.read_text() == "mine"
    page.write(str(file), overwrite=True)
    assert "Cats" in file.read_text() and [f.name for f in file.parent.iterdir()] == ["report.html"]
    with pytest.raises(UserError, match="cannot be written"):
        page.write(file / "report.html")
