"""The files of a run folder that are read again: metrics.jsonl, and environment.jsonl with one line for each start."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from .processes import process_state

_PACKAGES = ("diffusers", "transformers", "accelerate", "safetensors", "numpy", "pillow")

Row = dict[str, float]


def open_metrics(folder: Path) -> TextIO:
    """``metrics.jsonl`` for appending. A line that a killed run left torn is ended, so that the next one is whole."""
    path = folder / "metrics.jsonl"
    file = path.open("a", encoding="utf-8")
    if file.tell():
        with path.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read() != b"\n":
                file.write("\n")
    return file


def metric_lines(folder: Path) -> Iterator[Row]:
    """Every line of ``metrics.jsonl`` that can be read, as it was written: killed runs repeat and tear some."""
    for row in _lines(folder / "metrics.jsonl"):
        if isinstance(row.get("step"), int):
            # JSON as Python writes it has NaN and Infinity too: no curve can show them.
            yield {name: value for name, value in row.items() if _finite(value)}


def read_metrics(folder: Path) -> list[Row]:
    """One row for each step that was logged, in order, with all its figures.

    A run that was resumed from an earlier step took the steps after it once more: what it wrote then is what counts.
    """
    kept: dict[int, Row] = {}
    last = 0
    for row in metric_lines(folder):
        step = int(row["step"])
        if step < last:
            kept = {one: values for one, values in kept.items() if one < step}
        kept[step] = kept.get(step, {}) | row
        last = step
    return list(kept.values())


def record_start(folder: Path, step: int) -> None:
    """Append to ``environment.jsonl`` what this start of the run, at ``step``, ran on."""
    state = process_state()
    device = str(state.device)
    if state.device.type == "cuda":
        device = torch.cuda.get_device_name(state.device)
    line = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "step": step,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "device": device,
        "processes": state.num_processes,
        "machine": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "latentflow": _version("latentflow"),
        "torch": str(torch.__version__),  # with the CUDA that it was built for
        **{name: _version(name) for name in _PACKAGES},
    }
    with (folder / "environment.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """What `record_start` wrote, oldest first; empty for a run without it."""
    return list(_lines(folder / "environment.jsonl"))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        # A line torn by a kill may hold the next start's first one at its end; ours are flat.
        for text in (line, line[line.rfind("{") :]):
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                yield row
                break


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        from ... import __version__

        return __version__ if package == "latentflow" else "unknown"
