"""Table of the families for docs/guide/pretrained.md: `python -m latentflow.families.table` prints it."""

from __future__ import annotations

import inspect
import re

from . import FAMILIES, SIBLINGS


def table() -> list[str]:
    """Return the lines of the table in Markdown: a row for each family, from the docstring of its class."""
    pipelines: dict[type, list[str]] = {}
    for kind in FAMILIES:
        if not kind.startswith("LatentFlow"):
            pipelines.setdefault(FAMILIES[kind], []).append(kind)
    lines = ["| Pipeline class | Model | Also opens |", "|---|---|---|"]
    for family, kinds in pipelines.items():
        siblings = [name for name, kind in SIBLINGS.items() if kind in kinds]
        cells = [_code(kinds), described(family), _code(siblings)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def described(family: type) -> str:
    """Return what the docstring of a family says of its models and their guidance, without what its rows hold."""
    text = " ".join((inspect.getdoc(family) or "").split())
    text = re.split(r" (?:Raises|Args):", text)[0]
    text = re.sub(r" ?Its rows (?:have|are) .*?(?:\)|T5|CLIP)[^.]*?\.(?= |$)", "", text)
    text = re.sub(r" \([^()]* et al\. [^()]*\)| \(Peebles & Xie [^()]*\)", "", text).replace("``", "`")
    return text.removeprefix("Flow model of ")


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    print("\n".join(table()))
