"""Checkpoints: whole or not at all, verified, with a fallback."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from latentflow.errors import UserError
from latentflow.training.loop.checkpoint import (
    difference,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    snapshot,
    write_checkpoint,
)


def state(step: int) -> dict[str, object]:
    optimizer = {
        "state": {0: {"step": torch.tensor(3.0), "momentum": torch.randn(4)}},
        "param_groups": [{"lr": 0.1, "params": [0]}],
    }
    return {
        "step": step,
        "weights": {"a.b": torch.randn(3, 2), "n": torch.tensor(5)},
        "optimizer": [optimizer],
        "none": None,
    }


def save_checkpoint(folder: Path, state: dict[str, Any], total_limit: int) -> None:
    write_checkpoint(folder, snapshot(state), total_limit=total_limit)


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_round_trip_keeps_values_types_and_integer_keys(tmp_path: Path) -> None:
    written = state(7)
    save_checkpoint(tmp_path / "step-000007", written, total_limit=2)
    assert same(written, load_checkpoint(tmp_path / "step-000007"))
    assert not any(path.suffix in (".pt", ".bin", ".pkl") for path in tmp_path.rglob("*"))


def test_tied_tensors_survive(tmp_path: Path) -> None:
    shared = torch.randn(4)
    save_checkpoint(tmp_path / "step-1", {"w": {"a": shared, "b": shared}}, total_limit=1)
    assert torch.equal(load_checkpoint(tmp_path / "step-1")["w"]["b"], shared)


def test_the_oldest_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path / f"step-{step:06d}", state(step), total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000003", "step-000004"]


def test_a_save_that_was_killed_is_never_seen(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "step-000001", state(1), total_limit=2)
    torn = tmp_path / ".step-000002.tmp"
    torn.mkdir()
    (torn / "weights.safetensors").write_bytes(b"half")
    loaded = load_latest(tmp_path)
    assert loaded is not None and loaded["step"] == 1
    save_checkpoint(tmp_path / "step-000002", state(2), total_limit=2)  # and does not stand in the way
    assert load_checkpoint(tmp_path / "step-000002")["step"] == 2


def rewritten(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        document = json.loads((folder / "state.json").read_text())
        change(document)
        (folder / "state.json").write_text(json.dumps(document))

    return damage


def flipped(folder: Path) -> None:
    file = folder / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flip": flipped,
    "truncate": lambda folder: os.truncate(folder / "weights.safetensors", 50),
    "remove": lambda folder: (folder / "weights.safetensors").unlink(),
    "no JSON": lambda folder: (folder / "state.json").write_text("{"),
    "a list": lambda folder: (folder / "state.json").write_text("[]"),
    "not UTF-8": lambda folder: (folder / "state.json").write_bytes(b"\xff"),
    "nested": lambda folder: (folder / "state.json").write_text("[" * 5000),
    "no hashes": rewritten(lambda document: document.pop("sha256")),
    "hashes of another kind": rewritten(lambda document: document.update(sha256=[1])),
    "no state": rewritten(lambda document: document.update(state=None)),
    "another step": rewritten(lambda document: document["state"].update(step=3)),
    "another tensor": rewritten(lambda document: document["state"].update(more={"__tensor__": "more"})),
    "of an older version, a tensor missing": rewritten(
        lambda document: (document.pop("state_sha256"), document["state"].update(more={"__tensor__": "more"}))
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before_loudly(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path / f"step-{step:06d}", state(step), total_limit=5)
    DAMAGES[damage](tmp_path / "step-000002")
    logging.getLogger("latentflow").propagate = True
    with caplog.at_level(logging.WARNING):
        loaded = load_latest(tmp_path)
    assert loaded is not None and loaded["step"] == 1
    assert "step-000002 is damaged" in caplog.text and "falling back" in caplog.text
    assert (tmp_path / "step-000002").is_dir()  # nothing of it is removed


def test_a_checkpoint_of_an_older_version_is_read(tmp_path: Path) -> None:
    written = state(1)
    save_checkpoint(tmp_path / "step-000001", written, total_limit=1)
    rewritten(lambda document: document.pop("state_sha256"))(tmp_path / "step-000001")
    assert same(written, load_checkpoint(tmp_path / "step-000001"))


def test_only_damaged_checkpoints_are_an_error_none_is_not(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    save_checkpoint(tmp_path / "step-000001", state(1), total_limit=1)
    (tmp_path / "step-000001" / "state.json").unlink()
    with pytest.raises(UserError, match="all 1 checkpoints"):
        load_latest(tmp_path)


def test_difference_names_the_path_and_both_values() -> None:
    lines = list(difference({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 5, "c": 2}, "e": 4}))
    assert lines == ["a.b: 1 -> 5", "d: 3 -> None", "e: None -> 4"]
