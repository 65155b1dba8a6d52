"""A training step begins work on the device and never waits for it; what it found is read one step later."""

from __future__ import annotations

import dataclasses
import importlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from latentflow.config import AlignmentConfig, FlowConfig, LoopConfig, RoutingConfig
from latentflow.models import DiT
from latentflow.training import fit, log_to
from latentflow.training.loop import fit as fit_module
from latentflow.training.loop.fit import Callbacks, Loop
from latentflow.training.loop.loader import BatchPrefetcher, load_batches
from latentflow.training.loop.step_figures import StepFigures
from latentflow.training.losses import alignment, flow_loss
from latentflow.training.losses.alignment import Routing, make_alignment

from .test_loop import CONFIG, Line, Regression, weights

NETWORK = {"in_channels": 4, "width": 16, "depth": 2, "heads": 2}
META = torch.device("meta")


class Encoder(nn.Module):
    """As a text encoder of transformers is called."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        from types import SimpleNamespace

        return SimpleNamespace(last_hidden_state=self.table(input_ids) * attention_mask[..., None])


def batch_of(**more: Any) -> dict[str, Any]:
    return {"latents": torch.empty(6, 4, 8, 8, device=META), "sample_ids": [3, 4, 5, 9, 8, 7], **more}


def losses() -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Names of settings, and the loss with a batch for it, both on the meta device: it has no values to look at."""
    tokens = {
        name: torch.empty(6, 5, dtype=torch.long, device=META) for name in ("input_ids", "attention_mask")
    }
    classes = {"class_labels": torch.empty(6, dtype=torch.long, device=META)}
    found: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
    late = {"samples": 600, "samples_per_step": 6}
    with torch.device(META):
        plain, texts = DiT(**NETWORK, num_classes=3), DiT(**NETWORK, text_dim=8)
        found["classes"] = flow_loss(plain, FlowConfig(), 0), batch_of(**classes)
        std = {"latents_std": torch.empty(6, 4, 8, 8), "weights": torch.empty(6)}
        found["posterior"] = (
            flow_loss(plain, FlowConfig(path="variance-preserving"), 0),
            batch_of(**classes, **std),
        )
        found["late"] = flow_loss(plain, FlowConfig(time_uniform_from=0.5), 0, **late), batch_of(**classes)
        found["text"] = flow_loss(texts, FlowConfig(), 0, Encoder()), batch_of(**tokens)
        routing = Routing(RoutingConfig(route_share=0.5, route_blocks=(0, 1)), plain, (600, 6))
        found["routed"] = flow_loss(plain, FlowConfig(), 0, routing=routing), batch_of(**classes)
        aligned = make_alignment(AlignmentConfig(alignment="self"), plain)
        found["aligned"] = flow_loss(plain, FlowConfig(), 0, alignment=aligned), batch_of(**classes)
    return found


@pytest.mark.parametrize("name", ["classes", "posterior", "late", "text", "routed", "aligned"])
def test_a_loss_looks_at_no_value_on_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look would be an error, as would a tensor that was left on the CPU."""
    monkeypatch.setattr(alignment, "uncached_autocast", lambda device: nullcontext())  # meta has no autocast
    loss, batch = losses()[name]
    result = loss.train()(batch)
    result["loss"].backward()
    assert result["loss"].device == META
    with pytest.raises(RuntimeError, match="meta"):
        result["loss"].item()  # so a look would have been seen


def test_a_step_looks_at_no_value_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the step: forward, backward, clipping, figures, AdamW, averages; only `StepFigures.read` waits."""
    monkeypatch.setattr(Accelerator, "device", META)
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_: None)
    monkeypatch.setattr(fit_module, "keep_freed_memory", lambda: None)
    module, config = (
        flow_loss(DiT(**NETWORK), FlowConfig(), 0),
        dataclasses.replace(CONFIG, ema_lengths=(0.1,)),
    )
    loop = Loop({"flow": module}, Latents(), config, tmp_path, Callbacks(), "train", False)
    batches = BatchPrefetcher(
        load_batches(Latents(), loop.order.batches(0, 9, 0), num_workers=0, pin_memory=False)
    )
    for step in range(3):
        figures = loop.train_step(batches)
        loop.step = step + 1
    assert all(parameter.is_meta for parameter in module.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        figures.read()


def test_figures_are_read_when_the_next_step_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And at once where something of the step is kept: a checkpoint, a validation, the end."""
    happened: list[tuple[str, int]] = []
    begin, read = Loop.train_step, StepFigures.read

    def begun(self: Loop, batches: BatchPrefetcher) -> StepFigures:
        figures = begin(self, batches)
        happened.append(("begun", figures.step))
        return figures

    def seen(self: StepFigures) -> Any:
        happened.append(("read", self.step))
        return read(self)

    monkeypatch.setattr(Loop, "train_step", begun)
    monkeypatch.setattr(StepFigures, "read", seen)
    config = dataclasses.replace(CONFIG, max_train_steps=7, checkpointing_steps=4)
    assert fit({"flow": Regression()}, Line(), config, tmp_path)
    order = [("begun", 1)]
    for step in (2, 3, 4):
        order += [("begun", step), ("read", step - 1)]
    order += [("read", 4), ("begun", 5), ("begun", 6), ("read", 5), ("begun", 7), ("read", 6), ("read", 7)]
    assert happened == order


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_bad_step_changes_nothing_whoever_leaves_it_out(optimizer: str, tmp_path: Path) -> None:
    """AdamW on the device, Muon when the CPU says so. The bad step is the last before a checkpoint."""
    config = dataclasses.replace(
        CONFIG, optimizer=optimizer, lr_scheduler="constant", checkpointing_steps=100
    )
    for name, count, poison in (("three", 3, ()), ("four", 4, {3 * 6 + 2})):
        steps = dataclasses.replace(config, max_train_steps=count)
        assert fit({"flow": Regression(poison=poison)}, Line(), steps, tmp_path / name)
    first, second = weights(tmp_path / "three"), weights(tmp_path / "four")
    kept = [key for key in first if not key.startswith("flow-average")]
    assert len(kept) > 8 and all(torch.equal(first[key], second[key]) for key in kept)


class SteepAtZero(Regression):
    """At the poisoned samples the loss is finite, and its gradient is not a number: that of a square root at 0."""

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        poisoned, self.poison = self.poison, ()
        found = super().forward(batch)
        self.poison = poisoned
        if set(batch["sample_ids"]) & set(poisoned):
            found["loss"] = found["loss"] + (self.layers[0].weight.sum() * 0).sqrt()
        return found


def test_a_gradient_that_is_not_finite_is_named_and_left_out(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, lr_scheduler="constant", checkpointing_steps=100)
    log_to(tmp_path)
    for name, count in (("three", 3), ("four", 4)):
        steps = dataclasses.replace(config, max_train_steps=count)
        assert fit({"flow": SteepAtZero(poison={3 * 6 + 2})}, Line(), steps, tmp_path / name)
    first, second = weights(tmp_path / "three"), weights(tmp_path / "four")
    assert all(torch.equal(first[key], second[key]) for key in first if not key.startswith("flow-average"))
    assert "step 4: the loss or its gradient is not finite (loss 0." in (tmp_path / "train.log").read_text()
    assert "gradient norm nan); no single sample is to blame" in (tmp_path / "train.log").read_text()


def test_a_bad_first_step_leaves_the_optimizer_as_it_begins(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, lr_scheduler="constant", lr_warmup_steps=0, max_train_steps=1)
    assert fit({"flow": Regression(poison={0})}, Line(), config, tmp_path)
    found, fresh = weights(tmp_path), dict(Regression().named_parameters())
    for name, parameter in fresh.items():
        assert torch.equal(found[f"flow-weights/{name}"], parameter)
    assert all(not value.any() for key, value in found.items() if "/state/" in key)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_step_waits_for_a_gpu(optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA itself reports what waits; Muon asks once whether the step is good."""
    begin = Loop.train_step

    def watched(self: Loop, batches: BatchPrefetcher) -> StepFigures:
        torch.cuda.set_sync_debug_mode("error" if self.step > 2 and optimizer == "adamw" else "default")
        try:
            return begin(self, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Loop, "train_step", watched)
    loss = flow_loss(DiT(**NETWORK), FlowConfig(), 0)
    config = LoopConfig(
        max_train_steps=8, train_batch_size=6, optimizer=optimizer, validation_steps=0, preview_steps=0
    )
    assert fit({"flow": loss}, Latents(), config, tmp_path)


class Latents:
    """Random latents."""

    def __len__(self) -> int:
        return 20

    def __getitems__(self, uses: list[Any]) -> dict[str, Any]:
        return {"latents": torch.randn(len(uses), 4, 8, 8)}

    def name(self, index: int) -> str:
        return str(index)
