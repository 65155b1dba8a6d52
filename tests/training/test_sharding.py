"""FSDP2 with two processes: what it learns, and that its checkpoints are anybody's."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from latentflow.config import AlignmentConfig, DataConfig, LoopConfig, RunConfig
from latentflow.errors import RunError, UserError
from latentflow.training import Callbacks, fit, training_run
from latentflow.training.loop import trained_module
from latentflow.training.loop.checkpoint import list_checkpoints, load_checkpoint
from latentflow.training.loop.data_order import DataOrder, SampleUse
from latentflow.training.loop.distributed import is_sharded, process_state, together
from latentflow.training.loop.loader import by_group
from latentflow.training.train import train as train_flow

from .forking import run_ranks
from .test_loop import CONFIG, Line

STEPS = 6
ALONE = dataclasses.replace(
    CONFIG, max_train_steps=STEPS, checkpointing_steps=2, gradient_accumulation_steps=2, learning_rate=0.01,
    lr_scheduler="constant", max_grad_norm=0.1, validation_steps=3,
)  # fmt: skip
PAIR = dataclasses.replace(ALONE, train_batch_size=3, shard=True)  # of two processes


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.inner(x))


class Blocks(nn.Module):
    """A regression through blocks that are sharded one by one, with odd sizes, a frozen weight and a buffer."""

    _repeated_blocks = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(1, 8)
        self.blocks = nn.Sequential(Block(), Block())
        self.last = nn.Linear(8, 1)
        self.same = self.last  # tied weights have two names
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        error = self.last(self.blocks(self.first(batch["x"]))) * self.scale - batch["y"]
        return {"loss": error.square().mean()}


class Sorts(Line):
    """Points of several groups, which cannot pass through a network together."""

    groups = torch.arange(20) % 7

    def __getitems__(self, draws: list[SampleUse]) -> dict[str, Any]:
        assert len({int(self.groups[draw.index]) for draw in draws}) == 1
        return super().__getitems__(draws)


def train(folder: Path, config: LoopConfig, data: Line | None = None) -> None:
    network = Blocks()

    def export(place: Path) -> None:
        save_file(dict(network.named_parameters()), place / "weights.safetensors")

    callbacks = Callbacks(
        validate=lambda: {"loss": float(network({"x": torch.ones(1, 1), "y": torch.ones(1, 1)})["loss"])},
        export=export,
        export_to=folder / "result",
    )
    assert fit({"flow": network}, data or Line(), config, folder, callbacks=callbacks)


def in_two(folder: Path, config: LoopConfig, data: Line | None = None) -> None:
    run_ranks(2, lambda rank: train(folder, config, data))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All of the last checkpoint, and the result."""

    def flat(value: Any, path: str) -> dict[str, torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return {path: value}
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        return {name: one for key, item in items for name, one in flat(item, f"{path}/{key}").items()}

    state = load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    return flat(state, "") | flat(load_file(folder / "result" / "weights.safetensors"), "result")


def assert_close(a: Path, b: Path, atol: float) -> None:
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys() and len(first) > 30
    for name, one in first.items():
        torch.testing.assert_close(one, second[name], rtol=0, atol=atol)


@pytest.mark.parametrize(
    "optimizer",
    ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("schedule-free", "muon"))],
)
def test_sharded_runs_learn_what_one_process_learns_and_go_on_from_one_anothers_checkpoints(
    tmp_path: Path, optimizer: str
) -> None:
    alone, pair = (dataclasses.replace(one, optimizer=optimizer) for one in (ALONE, PAIR))
    train(tmp_path / "alone", alone)
    in_two(tmp_path / "pair", pair)
    assert len(list((list_checkpoints(tmp_path / "pair" / "checkpoints")[-1]).glob("shard-*"))) == 2
    assert_close(tmp_path / "alone", tmp_path / "pair", 1e-6)
    # Two processes go on from one, one from two.
    for folder, first, second in (("to-pair", alone, pair), ("to-alone", pair, alone)):
        for config, steps in ((first, STEPS // 2), (second, STEPS)):
            some = dataclasses.replace(config, max_train_steps=steps)
            (in_two if config is pair else train)(tmp_path / folder, some)
        assert_close(tmp_path / "alone", tmp_path / folder, 1e-6)


def test_a_sharded_run_of_one_process_learns_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "alone", ALONE)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(trained_module, "is_sharded", lambda *_: True)
        train(tmp_path / "sharded", ALONE)
        train(tmp_path / "sharded", dataclasses.replace(ALONE, max_train_steps=STEPS + 1))
    finally:
        dist.destroy_process_group()
    monkeypatch.undo()
    train(tmp_path / "alone", dataclasses.replace(ALONE, max_train_steps=STEPS + 1))
    assert_close(tmp_path / "alone", tmp_path / "sharded", 1e-6)


@pytest.mark.parametrize("shard", [True, False])
def test_processes_whose_batches_have_different_numbers_of_parts_learn_what_one_learns(
    tmp_path: Path, shard: bool
) -> None:
    order = DataOrder(size=20, batch_size=3, accumulation=2, processes=2, groups=Sorts.groups)
    parts = [
        [len(by_group(draws, Sorts.groups)) for draws in order.batches(0, STEPS, process)]
        for process in (0, 1)
    ]
    assert any(a < b for a, b in zip(*parts, strict=True)) and any(a > b for a, b in zip(*parts, strict=True))
    train(tmp_path / "alone", ALONE, Sorts())
    in_two(tmp_path / "pair", dataclasses.replace(PAIR, shard=shard), Sorts())
    assert_close(tmp_path / "alone", tmp_path / "pair", 1e-6)


@pytest.mark.slow
def test_a_checkpoint_of_another_optimizer_is_refused_in_words(tmp_path: Path) -> None:
    def other(rank: int) -> None:
        with pytest.raises(UserError, match="does not fit"):
            train(tmp_path, dataclasses.replace(PAIR, max_train_steps=8, optimizer="muon"))

    train(tmp_path, ALONE)
    run_ranks(2, other)


def test_a_failure_of_one_process_is_one_of_all_in_the_same_words() -> None:
    """Also of errors that cannot be sent to another process as they are."""

    class UnsendableError(OSError): ...

    errors = {
        UserError("a", "b"): (UserError, "a\nb"), MemoryError("full"): (MemoryError, "full"),
        UnsendableError(28, "No space"): (OSError, "No space"),
        KeyError("x"): (RuntimeError, "in another process: KeyError: 'x'"),
    }  # fmt: skip

    def rank(number: int) -> None:
        process_state()
        for error, (kind, words) in errors.items():
            with pytest.raises(type(error) if number else kind) as caught:
                together(Mock(side_effect=error if number else None))
            assert caught.value is error if number else words in str(caught.value)

    run_ranks(2, rank)


def test_what_goes_wrong_in_a_sharded_run_leaves_its_last_checkpoint(tmp_path: Path) -> None:
    class Short(Blocks):
        def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
            if 3 * 12 in batch["sample_ids"] or 3 * 12 + 3 in batch["sample_ids"]:
                raise MemoryError
            return super().forward(batch)

    def rank(number: int) -> None:
        def write(self: Any, plan: Any, planner: Any) -> Any:
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(
            RunError, match=r"No checkpoint could be written; the last good one is step-000002"
        ):
            fit({"flow": Short()}, Line(), PAIR, tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            if number:  # the disk of one process only
                patch.setattr(HuggingFaceStorageWriter, "write_data", write)
            with pytest.raises(RunError, match=r"No space left.*the last good one is step-000002"):
                fit({"flow": Blocks()}, Line(), dataclasses.replace(PAIR, max_train_steps=4), tmp_path)

    run_ranks(2, rank)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


def test_what_cannot_be_sharded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_sharded(PAIR, 2) and not is_sharded(ALONE, 2) and not is_sharded(PAIR, 1)
    with pytest.raises(UserError, match="--auto-micro-batch cannot be used with --shard"):
        is_sharded(dataclasses.replace(PAIR, auto_micro_batch=True), 2)
    with pytest.raises(UserError, match="adamw-8bit cannot be used with --shard"):
        is_sharded(dataclasses.replace(PAIR, optimizer="adamw-8bit"), 2)
    with pytest.raises(UserError, match="fp16 cannot be used with --shard"):
        is_sharded(dataclasses.replace(PAIR, mixed_precision="fp16"), 2)
    with pytest.raises(UserError, match="--alignment self cannot be used with --shard"):
        is_sharded(PAIR, 2, needs_average=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # what accelerate launch --use_fsdp sets
    assert LoopConfig().shard
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(UserError, match="offload"):
        is_sharded(PAIR, 2)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"loop": dataclasses.replace(PAIR, optimizer="adamw-8bit")},
            "--optimizer adamw-8bit cannot be used",
        ),
        ({"loop": PAIR, "alignment": AlignmentConfig(alignment="self")}, "--alignment self cannot be used"),
    ],
)
def test_it_is_refused_before_anything_is_read(
    settings: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are no such data, and no such run folder afterwards."""
    pair = SimpleNamespace(num_processes=2, device=torch.device("cpu"), is_main_process=True)
    monkeypatch.setattr(training_run, "process_state", lambda: pair)
    config = RunConfig(data=DataConfig(data=str(tmp_path / "none")), output=str(tmp_path / "run"), **settings)
    with pytest.raises(UserError, match=said):
        train_flow(config, "", (), Mock())
    assert not (tmp_path / "run").exists()
