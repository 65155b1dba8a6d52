"""A page holds everything itself, escapes what it is told, and overwrites nothing unasked."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from latentflow.errors import UserError
from latentflow.utils.html_page import Page


class Reader(HTMLParser):
    """Tags with their attributes, the text, and whether every tag that must be closed is."""

    def __init__(self, page: Page) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(str(page.html()))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "!doctype"):
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
    page.code("latentflow train 'a b'")
    page.list(["one", "<two>"])
    page.table(["name", "size"], [["a.png", 3], ["<b>.png", 4]])
    page.bars({"x<y": 5, "z": 10})
    page.image(Image.new("RGB", (3, 2), (255, 0, 0)), 'a "red" image')
    inside = page.details("more <of it>")
    inside.text("hidden & found")
    return page


def test_everything_is_escaped_and_closed(page: Page) -> None:
    seen = Reader(page)
    assert not seen.open
    assert {"script", "two", "b", "dogs", "of", "heading"}.isdisjoint(tag for tag, _ in seen.tags)
    for text in ("Cats & <dogs>", "A <heading>", "<script>alert(1)</script>", "<two>", "<b>.png", "x<y"):
        assert text in seen.words
    assert re.search(r"<details><summary>more &lt;of it&gt;</summary>\s*<p>hidden &amp; found", page.html())


def test_images_are_held_by_the_page_and_nothing_is_fetched(page: Page) -> None:
    seen = Reader(page)
    (tag,) = [attributes for name, attributes in seen.tags if name == "img"]
    header, data = (tag["src"] or "").split(",")
    assert header == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.size == (3, 2) and image.getpixel((0, 0)) == (255, 0, 0)
    assert tag["alt"] == 'a "red" image'
    assert "http" not in page.html() and "url(" not in page.html()


def test_bars_are_in_proportion(page: Page) -> None:
    assert re.findall(r"width: ([\d.]+)%", page.html().split("</style>")[1]) == ["50.0", "100.0"]
    empty = Page("nothing")
    empty.bars({})
    empty.bars({"a": 0})
    Reader(empty)


def test_a_figure_is_drawn_inline() -> None:
    figures = pytest.importorskip("matplotlib.figure")
    figure = figures.Figure(figsize=(2, 1))
    figure.subplots().set_title("loss < 1")
    page = Page("Run")
    page.figure(figure, "the loss")
    html = str(page.html())
    assert "<svg" in html and "loss &lt; 1" in html and html.count("<?xml") == 0 == html.count("DOCTYPE svg")


def test_write_keeps_what_exists(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "new" / "report.html"
    page.write(file)
    assert file.read_text(encoding="utf-8") == str(page.html())
    file.write_text("mine")
    with pytest.raises(UserError, match=r"report\.html exists\n.*--overwrite"):
        page.write(file)
    assert file.read_text() == "mine"
    page.write(str(file), overwrite=True)
    assert "Cats" in file.read_text() and [f.name for f in file.parent.iterdir()] == ["report.html"]


def test_a_place_that_cannot_be_written_is_told(page: Page, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        page.write(tmp_path / "file" / "report.html")
