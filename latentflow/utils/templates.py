"""Rendering of the Jinja templates in ``latentflow/templates``."""

from __future__ import annotations

from functools import cache
from typing import Any


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
