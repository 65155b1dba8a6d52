"""Folders of the tiny checkpoints, for the programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .tiny import checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Save a tiny checkpoint as its users have it, once."""
    root = tmp_path_factory.mktemp("families")

    def saved(name: str) -> Path:
        if not (root / name).exists():
            checkpoint(name).save_pretrained(root / name)
        return root / name

    return saved
