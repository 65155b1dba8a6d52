"""A report as one HTML file: no scripts, nothing fetched from elsewhere, readable in light and dark.

``Page("Report").table(...)``, ``.image(...)``, ``.write("report.html")``; a page is built from top to bottom.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment
from markupsafe import Markup

from ..errors import UserError
from .files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --bar: #4f7cc4; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; margin: .7rem 0; } th, td { padding: .15rem .8rem .15rem 0; text-align: left; }
td { border-top: 1px solid var(--line); overflow-wrap: anywhere; } td.bar { min-width: 14rem; }
.bar div { background: var(--bar); height: .8rem; border-radius: 2px; }
figure { margin: 1rem 0; } figcaption { opacity: .7; } img { max-width: 100%; }
figure.drawing { background: white; color: black; border-radius: 6px; padding: .5rem; width: fit-content; }
svg { max-width: 100%; height: auto; } summary { cursor: pointer; }
code, pre { font-family: ui-monospace, monospace; }
pre { background: #8882; padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere; }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title><style>{{ style }}</style></head>
<body><h1>{{ title }}</h1>
{{ body }}
</body></html>
"""
_HEADING = "<h2>{{ text }}</h2>"
_TEXT = "<p>{{ text }}</p>"
_CODE = "<pre>{{ text }}</pre>"
_LIST = "<ul>{% for line in lines %}<li>{{ line }}</li>{% endfor %}</ul>"
_TABLE = """<table><tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>"""
_BARS = """<table>{% for name, count in counts.items() %}<tr><td>{{ name }}</td><td>{{ count }}</td>
<td class="bar"><div style="width: {{ '%.1f' % (100 * count / most) }}%"></div></td></tr>
{% endfor %}</table>"""
_IMAGE = """<figure><img alt="{{ caption }}" src="data:image/{{ format }};base64,{{ data }}">
<figcaption>{{ caption }}</figcaption></figure>"""
_FIGURE = """<figure class="drawing">{{ drawing }}<figcaption>{{ caption }}</figcaption></figure>"""
_DETAILS = "<details><summary>{{ summary }}</summary>\n{{ body }}\n</details>"


class Section:
    """Parts of a page, one below the other. Every text is escaped."""

    def __init__(self) -> None:
        self._parts: list[Section | Markup] = []

    def heading(self, text: str) -> None:
        self._add(_HEADING, text=text)

    def text(self, text: str) -> None:
        self._add(_TEXT, text=text)

    def code(self, text: str) -> None:
        """A command or a file, as it is."""
        self._add(_CODE, text=text)

    def list(self, lines: Iterable[object]) -> None:
        self._add(_LIST, lines=lines)

    def table(self, header: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
        self._add(_TABLE, header=header, rows=rows)

    def bars(self, counts: Mapping[str, float]) -> None:
        """Counts as horizontal bars, the largest the whole width."""
        self._add(_BARS, counts=counts, most=max(counts.values(), default=1) or 1)

    def image(self, image: Image, caption: str = "", format: str = "png") -> None:
        """An image, held by the page itself; ``format`` is "png", "jpeg" or "webp"."""
        held = io.BytesIO()
        image.save(held, format)
        data = base64.b64encode(held.getvalue()).decode()
        self._add(_IMAGE, data=data, caption=caption, format=format)

    def figure(self, figure: Figure, caption: str = "") -> None:
        """A figure of matplotlib's as a drawing that stays sharp."""
        import matplotlib as mpl

        held = io.StringIO()
        with mpl.rc_context({"svg.fonttype": "none"}):
            figure.savefig(held, format="svg", metadata={"Date": None})
        drawing = held.getvalue()
        # Without the header of a file of its own. matplotlib escapes what it writes.
        self._add(_FIGURE, drawing=Markup(drawing[drawing.index("<svg") :]), caption=caption)

    def details(self, summary: str) -> Section:
        """A folded section, to be filled."""
        section = _Details(summary)
        self._parts.append(section)
        return section

    def html(self) -> Markup:
        return Markup("\n").join(part.html() if isinstance(part, Section) else part for part in self._parts)

    def _add(self, template: str, **values: Any) -> None:
        self._parts.append(_render(template, **values))


class _Details(Section):
    def __init__(self, summary: str) -> None:
        super().__init__()
        self._summary = summary

    def html(self) -> Markup:
        return _render(_DETAILS, summary=self._summary, body=super().html())


class Page(Section):
    """A whole page."""

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def html(self) -> Markup:
        return _render(_PAGE, title=self.title, style=Markup(_STYLE), body=super().html())

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
    """Raises UserError if ``path`` exists and is not to be overwritten: to be asked before long work."""
    if Path(path).exists() and not overwrite:
        raise UserError(f"{path} exists", "Choose another name, or use --overwrite to replace it.")


@cache
def _template(text: str) -> Any:
    return Environment(autoescape=True).from_string(text)


def _render(template: str, **values: Any) -> Markup:
    return Markup(_template(template).render(**values))
