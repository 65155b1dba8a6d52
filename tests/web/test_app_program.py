"""The program `latentflow app`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest

from latentflow.errors import UserError


def test_without_gradio_it_says_what_to_install(
    load_program: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = load_program("app")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "latentflow\[app\]"'):
        program.main([])


def test_it_listens_on_this_machine_alone_unless_told_otherwise(load_program: Callable[[str], Any]) -> None:
    assert load_program("app").AppConfig().host == "127.0.0.1"
