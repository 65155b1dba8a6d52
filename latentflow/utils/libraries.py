"""Optional libraries: their requirements, which pyproject.toml declares, and the error where one is missing."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from ..errors import UserError

#: Name of latentflow's distribution. On the package index `latentflow` is another project ("Latent Variable Models").
DISTRIBUTION = "latent-flow-matching"

_PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def missing(purpose: str, *libraries: str, instead: str = "") -> UserError:
    """Build the error for optional libraries that are not installed, or are older than latentflow needs.

    Args:
        purpose: the beginning of the sentence, with its verb: "adapters need".
        libraries: names of distributions, such as "peft".
        instead: what else the user may do, the end of a sentence: "set it to 0".
    """
    needed = " and ".join(requirement(library) for library in libraries)
    return UserError(
        f"{purpose} {needed}, which {'is' if len(libraries) == 1 else 'are'} not installed",
        install_command(*libraries) + (f", or {instead}." if instead else ""),
    )


def install_command(*libraries: str) -> str:
    """Return the line that installs optional libraries: ``pip install "peft>=0.20"``."""
    return " ".join(["pip install", *(f'"{requirement(library)}"' for library in libraries)])


def requirement(library: str) -> str:
    """Return the requirement of an optional library, such as "peft>=0.20"; its bare name where none is declared."""
    return _requirements().get(library, library)


@cache
def _requirements() -> dict[str, str]:
    """Return the requirements of all extras by the library's name."""
    declared = _declared_beside()
    if declared is None:
        declared = _declared_by_metadata()
    return {re.split(r"[^\w.-]", line, maxsplit=1)[0]: line for line in declared}


def _declared_beside() -> list[str] | None:
    """Return what the extras in a clone's pyproject.toml require; None where this is no clone.

    The file comes before the metadata: those of an editable installation stay as they were when it was made.
    """
    import tomllib

    if not _PYPROJECT.is_file():
        return None
    project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8")).get("project", {})
    if project.get("name") != DISTRIBUTION:
        return None
    return [line for lines in project["optional-dependencies"].values() for line in lines]


def _declared_by_metadata() -> list[str]:
    """Return what the extras of the installed distribution require; nothing where it is only on Python's path."""
    import importlib.metadata

    try:
        declared = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [line.partition(";")[0].strip() for line in declared if re.search(r"\bextra\s*==", line)]
