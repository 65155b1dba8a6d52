"""A folder of a dozen small captioned images."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from latentflow.data.sources.shapes import train_source
from latentflow.training.loop import run_folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rows = []
    for number, example in enumerate(train_source().examples[:240:20]):
        example.open().resize((24, 20)).save(folder / f"{number:02d}.png")
        rows.append({"file_name": f"{number:02d}.png", "text": example.text})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Save a tiny checkpoint of tests/families/tiny.py as its users have it, once; do not change its files."""
    from ..families.tiny import checkpoint

    root = tmp_path_factory.mktemp("pretrained")

    def saved(name: str) -> Path:
        if not (root / name).exists():
            checkpoint(name).save_pretrained(root / name)
        return root / name

    return saved


@pytest.fixture(scope="module")
def no_memorisation() -> Iterator[None]:
    """Runs over pretrained models end without drawing 16 images to see what was memorised."""
    from latentflow.training import pretrained_result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained_result, "FEW", 0)
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing that failed is tried again at once."""
    monkeypatch.setattr(run_folder, "RETRY_SECONDS", (0.0, 0.0))


@pytest.fixture(autouse=True, scope="session")
def _autograd_without_threads() -> None:
    """A plan of memory, on fake tensors, starts threads of autograd that no forked process has, unless it was begun
    with real ones."""
    torch.zeros((), requires_grad=True).backward()  # type: ignore[no-untyped-call]


@pytest.fixture(autouse=True, scope="session")
def _usual_signals() -> Iterator[None]:
    """Signals as a terminal leaves them: nohup and a shell's background jobs ignore some, and then runs do as well."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    ignored = [number for number in usual if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, usual[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
