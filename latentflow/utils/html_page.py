"""A report as one HTML file: no scripts, nothing fetched from elsewhere, readable in light and dark.

``Page("Report").table(...)``, ``.image(...)``, ``.write("report.html")``; a page is built from top to bottom, and
rendered by the template ``page.html.jinja``.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image


def render(template: str, **values: Any) -> str:
    """Render a template. In those of HTML (``.html.jinja``) every value is escaped."""
    return str(_environment().get_template(template).render(**values))


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader

    return Environment(
        loader=PackageLoader("latentflow"),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        keep_trailing_newline=True,
    )


class Section:
    """Parts of a page, one below the other. Every text is escaped.

    Attributes:
        parts: (kind, values) of each part, as the template takes them.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[str, dict[str, Any]]] = []

    def heading(self, text: str) -> None:
        """Add a heading."""
        self._add("heading", text=text)

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._add("text", text=text)

    def code(self, text: str) -> None:
        """Add a command or a file, unchanged."""
        self._add("code", text=text)

    def list(self, lines: Iterable[object]) -> None:
        """Add a list."""
        self._add("list", lines=lines)

    def table(self, header: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
        """Add a table."""
        self._add("table", header=header, rows=rows)

    def bars(self, counts: Mapping[str, float]) -> None:
        """Add counts as horizontal bars; the largest has the whole width."""
        self._add("bars", counts=counts, largest=max(counts.values(), default=1) or 1)

    def image(self, image: Image, caption: str = "", format: str = "png") -> None:
        """Add an image, embedded in the page; ``format`` is "png", "jpeg" or "webp"."""
        encoded = io.BytesIO()
        image.save(encoded, format)
        data = base64.b64encode(encoded.getvalue()).decode()
        self._add("image", data=data, caption=caption, format=format)

    def figure(self, figure: Figure, caption: str = "") -> None:
        """Add a matplotlib figure as SVG."""
        import matplotlib as mpl
        from markupsafe import Markup

        svg = io.StringIO()
        with mpl.rc_context({"svg.fonttype": "none"}):
            figure.savefig(svg, format="svg", metadata={"Date": None})
        # Without the XML header of a file. matplotlib escapes what it writes.
        text = svg.getvalue()
        self._add("figure", svg=Markup(text[text.index("<svg") :]), caption=caption)

    def details(self, summary: str) -> Section:
        """Add a folded section, and return it to be filled."""
        section = Section()
        self._add("details", summary=summary, section=section)
        return section

    def _add(self, kind: str, **values: Any) -> None:
        self.parts.append((kind, values))


class Page(Section):
    """A whole page."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def html(self) -> str:
        """Return the page as HTML."""
        return render("page.html.jinja", page=self)

    def write(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the page; a reader of the file sees all of it or the one before.

        Raises:
            UserError: the file exists and is not to be overwritten, or cannot be written.
        """
        path = Path(path)
        refuse_existing(path, overwrite)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                partial.write_text(self.html(), encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}", "Choose another place.") from error


def refuse_existing(path: str | Path, overwrite: bool) -> None:
    """Refuse a path that exists and is not to be overwritten; call it before long work.

    Raises:
        UserError: it exists.
    """
    if Path(path).exists() and not overwrite:
        raise UserError(f"{path} exists", "Choose another name, or use --overwrite to replace it.")
