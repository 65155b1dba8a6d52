"""The loop on a linear regression whose answer is known: resume, signals, non-finite losses, accumulation."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from latentflow.config import LoopConfig
from latentflow.errors import UserError
from latentflow.training import Callbacks, fit, log_to
from latentflow.training.loop.checkpoint import list_checkpoints, step_of
from latentflow.training.loop.data_order import DataOrder, SampleUse
from latentflow.training.loop.random_numbers import CounterRandom
from latentflow.training.report.folder import read_metrics

CONFIG = LoopConfig(
    max_train_steps=12, train_batch_size=6, learning_rate=0.1, lr_warmup_steps=2, weight_decay=0.0,
    mixed_precision="no", checkpointing_steps=4, validation_steps=0, preview_steps=0, log_steps=1,
)  # fmt: skip


At = Mapping[int, signal.Signals | Exception]  # sample -> what happens when it is used


def happens(at: At, samples: Iterable[int]) -> None:
    for what in (at[sample] for sample in samples if sample in at):
        if isinstance(what, Exception):
            raise what
        os.kill(os.getpid(), what)


class Line:
    """y = 2x + 1 at 20 points.

    Args:
        at: sample -> the signal that the process which loads it gets, or the error that is raised there.
    """

    def __init__(self, at: At | None = None) -> None:
        self.at = at or {}

    def __len__(self) -> int:
        return 20

    def __getitems__(self, draws: list[SampleUse]) -> dict[str, Any]:
        happens(self.at, (draw.sample_id for draw in draws))
        x = torch.tensor([[draw.index / 20] for draw in draws])
        return {"x": x, "y": 2 * x + 1}

    def name(self, index: int) -> str:
        return f"point {index}"


class Regression(nn.Module):
    """Noise from the draws and dropout from torch's own generator: both must survive a resume.

    Args:
        poison: samples whose loss is not a number.
        at: sample -> the signal that the process gets, or the error that is raised, when the loop is there.
    """

    def __init__(
        self,
        poison: Collection[int] = (),
        *,
        dropout: float = 0.2,
        at: At | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))
        self.poison, self.at = poison, at or {}

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        happens(self.at, batch["sample_ids"])
        noise = CounterRandom(0, batch["sample_ids"]).normal((1,))
        error = (self.layers(batch["x"]) - batch["y"] - 0.01 * noise).square().flatten()
        bad = torch.tensor([number in self.poison for number in batch["sample_ids"]])
        error = error + torch.where(bad, float("nan"), 0.0)
        return {"loss": error.mean(), "per_sample": error.detach(), "t": torch.zeros(len(error))}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    last = list_checkpoints(folder / "checkpoints")[-1]
    names = ("flow-weights", "flow-average", "flow-optimizer")
    return {key: one for name in names for key, one in load_file(last / f"{name}.safetensors").items()}


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints that a run has kept."""
    return [step_of(path) for path in list_checkpoints(folder / "checkpoints")]


def run(folder: Path, config: LoopConfig = CONFIG, module: nn.Module | None = None, **kwargs: Any) -> bool:
    return fit({"flow": module or Regression()}, Line(), config, folder, **kwargs)


def assert_equal_weights(a: Path, b: Path) -> None:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and len(first) > 8
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_accumulation_gives_the_same_update_as_one_large_batch(tmp_path: Path) -> None:
    run(tmp_path / "large", module=Regression(dropout=0.0))
    split = dataclasses.replace(CONFIG, train_batch_size=2, gradient_accumulation_steps=3)
    run(tmp_path / "split", split, module=Regression(dropout=0.0))
    first, second = weights(tmp_path / "large"), weights(tmp_path / "split")
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-4, atol=1e-5)


class Plain(nn.Module):
    """Everything that an optimiser treats in its own way: matrices, biases, a norm, a buffer that forward changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(
            nn.Linear(1, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
        )
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        self.calls += 1  # type: ignore[operator]
        return {"loss": (self.layers(batch["x"]) - batch["y"]).square().mean()}


@pytest.mark.parametrize("limit", [0.05, 0.0])
def test_the_loop_takes_the_steps_that_are_written_out_here(tmp_path: Path, limit: float) -> None:
    """In float64: the samples of a step, their mean loss, clipping, rate, AdamW, average; and the log says so."""
    config = dataclasses.replace(
        CONFIG, max_train_steps=14, train_batch_size=3, gradient_accumulation_steps=2, learning_rate=0.03,
        lr_warmup_steps=4, lr_scheduler="linear", lr_decay_share=0.5, weight_decay=0.2, max_grad_norm=limit,
        ema_decay=0.6, adam_beta1=0.8, adam_beta2=0.9,
    )  # fmt: skip
    assert run(tmp_path, config, module=Plain())
    logged = read_metrics(tmp_path)
    plain, average = Plain().double(), Plain().double()
    parameters = dict(plain.named_parameters())
    first, second = ({key: torch.zeros_like(one) for key, one in parameters.items()} for _ in range(2))
    passes = iter(DataOrder(size=20, batch_size=3, accumulation=2).batches(0, 14, 0))
    for step in range(1, 15):
        draws = [*next(passes), *next(passes)]
        loss = plain({name: one.double() for name, one in Line().__getitems__(draws).items()})["loss"]
        gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        norm = torch.stack([one.norm() for one in gradients.values()]).norm()
        scale = min(1.0, limit / float(norm)) if limit else 1.0
        rate = 0.03 * min(1.0, step / 4) * min(1.0, (15 - step) / 7)
        with torch.no_grad():
            for key, one in parameters.items():
                g = gradients[key] * scale
                first[key] = 0.8 * first[key] + 0.2 * g
                second[key] = 0.9 * second[key] + 0.1 * g.square()
                if one.ndim == 2:
                    one.mul_(1 - rate * 0.2)
                moment, size = first[key] / (1 - 0.8**step), second[key] / (1 - 0.9**step)
                one.sub_(rate * moment / (size.sqrt() + 1e-8))
                kept = min(0.6, (1 + step) / (10 + step))
                average.get_parameter(key).mul_(kept).add_((1 - kept) * one)
        row = logged[step - 1]
        assert row["step"] == step and {"images_per_second", "memory_gib"} <= row.keys()
        for name, value in (("loss", float(loss.detach())), ("grad_norm", float(norm)), ("lr", rate)):
            assert row[name] == pytest.approx(value, rel=1e-3), (step, name)
    found = weights(tmp_path)
    assert int(found["flow-weights/calls"]) == 2 * 14 and "flow-average/calls" not in found
    for key, one in parameters.items():
        torch.testing.assert_close(found[f"flow-weights/{key}"].double(), one.detach(), rtol=0, atol=2e-5)
        averaged = average.get_parameter(key).detach()
        torch.testing.assert_close(found[f"flow-average/{key}"].double(), averaged, rtol=0, atol=2e-5)


def test_a_non_finite_loss_names_the_sample_skips_the_update_and_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "run" / "train.log"
    log.parent.mkdir()
    log_to(log.parent)
    module = Regression(poison={3 * 6 + 2})  # one sample of step 3
    assert run(tmp_path / "run", dataclasses.replace(CONFIG, max_train_steps=4), module=module)
    text = log.read_text()
    assert "step 4" in text and "point " in text and "t = 0.0000" in text and "skipped" in text
    assert all(torch.isfinite(one).all() for one in module.parameters())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # No invented loss for the skipped step.
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]


def test_a_skipped_update_moves_no_weight_and_no_moment(tmp_path: Path) -> None:
    """Although the gradient itself is finite here."""
    three = dataclasses.replace(CONFIG, max_train_steps=3, lr_scheduler="constant")
    assert run(tmp_path / "three", three)
    four = dataclasses.replace(three, max_train_steps=4)
    assert run(tmp_path / "four", four, module=Regression(poison={3 * 6 + 2}))
    first, second = weights(tmp_path / "three"), weights(tmp_path / "four")
    kept = [key for key in first if not key.startswith("flow-average")]
    assert len(kept) > 8 and all(torch.equal(first[key], second[key]) for key in kept)


def test_a_run_that_stays_non_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    module = Regression(poison=set(range(5 * 6, 10**4)))
    with pytest.raises(UserError, match="3 updates in a row") as caught:
        run(tmp_path, dataclasses.replace(CONFIG, max_nonfinite_steps=3), module=module)
    assert "learning-rate" in caught.value.fix
    assert steps(tmp_path) == [4]
    assert all(torch.isfinite(one).all() for one in weights(tmp_path).values())


def test_changed_data_or_architecture_is_refused_with_the_difference_unless_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(tmp_path, description={"data": "abc", "network": {"depth": 2}})
    longer = dataclasses.replace(CONFIG, max_train_steps=14)
    with pytest.raises(UserError, match=r"network\.depth: 2 -> 3"):
        run(tmp_path, longer, description={"data": "abc", "network": {"depth": 3}})
    allowed = dataclasses.replace(longer, allow_changes=True)
    caplog.set_level("INFO")
    assert run(tmp_path, allowed, description={"data": "abc", "network": {"depth": 3}})
    assert "changed since step 12, as allowed: network.depth: 2 -> 3" in caplog.text


def test_the_same_data_in_another_order_is_refused_in_words(tmp_path: Path) -> None:
    """A step takes samples by their number: renamed files would have it take others."""
    assert run(tmp_path, description={"data": "abc"})  # an earlier version, which wrote no order: it goes on
    longer, longest = (dataclasses.replace(CONFIG, max_train_steps=steps) for steps in (14, 16))
    assert run(tmp_path, longer, description={"data": "abc", "data_order": "1"})
    told = r"data_order: the same images in another order \(files were renamed or moved\)"
    with pytest.raises(UserError, match=told):
        run(tmp_path, longest, description={"data": "abc", "data_order": "2"})
    with pytest.raises(UserError, match="data: other images, captions") as refused:
        run(tmp_path, longest, description={"data": "abd", "data_order": "2"})
    assert "data_order" not in str(refused.value)
    assert run(tmp_path, longest, description={"data": "abc", "data_order": "1"})


def test_a_checkpoint_of_other_shapes_is_refused_in_words(tmp_path: Path) -> None:
    assert run(tmp_path)
    with pytest.raises(UserError, match="does not fit the networks"):
        module = Regression()
        module.layers[3] = nn.Linear(8, 2)
        run(tmp_path, dataclasses.replace(CONFIG, max_train_steps=14), module=module)


def test_a_reached_target_changes_nothing(tmp_path: Path) -> None:
    assert run(tmp_path)
    before = weights(tmp_path)
    # The export is made if the run died between its last checkpoint and it, and left alone if it is there.
    assert run(tmp_path, callbacks=Callbacks(export=lambda folder: None, export_to=tmp_path / "result"))
    assert (tmp_path / "result").is_dir()
    (tmp_path / "result" / "note").touch()
    assert run(tmp_path, callbacks=Callbacks(export=lambda folder: None, export_to=tmp_path / "result"))
    assert (tmp_path / "result" / "note").exists()
    assert all(torch.equal(before[key], one) for key, one in weights(tmp_path).items())


def test_callbacks_see_the_averaged_weights_and_leave_no_trace(tmp_path: Path) -> None:
    """Validation and previews draw random numbers and switch modes; the run must not notice."""
    module, seen = Regression(), []

    def validate() -> dict[str, float]:
        torch.rand(100)
        assert not module.layers.training and not torch.is_grad_enabled()
        seen.append({name: one.detach().clone() for name, one in module.named_parameters()})
        return {"loss": 1.0}

    watched = dataclasses.replace(CONFIG, validation_steps=3)
    assert run(tmp_path / "watched", watched, module=module, callbacks=Callbacks(validate=validate))
    assert run(tmp_path / "plain")
    assert_equal_weights(tmp_path / "watched", tmp_path / "plain")
    average = {
        key.removeprefix("flow-average/"): one
        for key, one in weights(tmp_path / "plain").items()
        if "average" in key
    }
    assert average and all(torch.equal(seen[-1][name], average[name]) for name in average)


def test_fp16_without_a_gpu_is_refused(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        run(tmp_path, dataclasses.replace(CONFIG, mixed_precision="fp16"))
