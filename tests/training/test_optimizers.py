"""Optimisers, schedules, the weight average and precision."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from latentflow.config import LoopConfig
from latentflow.errors import UserError
from latentflow.models import DiT
from latentflow.training import fit
from latentflow.training.estimate import state_bytes
from latentflow.training.loop import distributed
from latentflow.training.loop import optimizers as muon
from latentflow.training.loop.checkpoint import list_checkpoints, load_checkpoint
from latentflow.training.loop.optimizers import (
    OPTIMIZERS,
    QUINTICS,
    Muon,
    learning_rate,
    make_optimizers,
    orthogonalise,
)
from latentflow.training.loop.trained_module import TrainedModule, WeightAverage, warmed_up

from .test_loop import CONFIG, Line, Regression, assert_equal_weights, weights


@pytest.mark.parametrize(("iteration", "low", "high"), [("jordan", 0.66, 1.22), ("polar", 0.72, 1.28)])
@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 24, 60), (2, 60, 24)])
def test_orthogonalise_brings_singular_values_near_one(
    shape: tuple[int, ...], iteration: str, low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon, "has_fast_bfloat16", lambda device: False)
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    spectrum = torch.logspace(-1.5, 0, min(shape[1:]))
    found = orthogonalise(1e-3 * (u * spectrum) @ vh, iteration)
    values = torch.linalg.svdvals(found)
    assert values.min() > low and values.max() < high
    # The singular vectors stay: U V^T of the input is the nearest orthogonal matrix.
    assert torch.cosine_similarity((u @ vh).flatten(1), found.flatten(1)).min() > 0.97
    assert torch.equal(orthogonalise(torch.zeros(shape), iteration), torch.zeros(shape))


def test_the_quintics_of_the_polar_iteration_are_each_the_best_approximation_of_one() -> None:
    """Theirs is an error of equal size and turning sign in four points, one more than they have coefficients."""
    low, high = 0.01, 1.0
    for a, b, c in QUINTICS["polar"]:
        x = torch.linspace(low, high, 100_001, dtype=torch.float64)
        error = 1 - (a * x + b * x**3 + c * x**5)
        inner = (error[1:-1] - error[:-2]) * (error[2:] - error[1:-1]) < 0
        extremes = torch.cat([error[:1], error[1:-1][inner], error[-1:]])
        assert len(extremes) == 4
        torch.testing.assert_close(extremes.abs(), extremes.abs().mean().expand(4), rtol=1e-2, atol=2e-3)
        assert (extremes[1:] * extremes[:-1] < 0).all()
        low, high = 1 - float(extremes.abs().max()), 1 + float(extremes.abs().max())
    assert low == pytest.approx(0.731, abs=2e-3)


def test_muon_orthogonalises_stacked_maps_part_by_part() -> None:
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(3, 16, 16, generator=generator) * torch.tensor([1.0, 100.0, 0.01])[:, None, None]
    stacked = nn.Parameter(torch.zeros(48, 16))
    stacked.grad = gradient.reshape(48, 16).clone()
    Muon([{"params": [stacked], "parts": 3}], lr=1.0).step()
    alone = []
    for part in gradient:
        parameter = nn.Parameter(torch.zeros(16, 16))
        parameter.grad = part.clone()
        Muon([{"params": [parameter]}], lr=1.0).step()
        alone.append(parameter.detach())
    torch.testing.assert_close(stacked.detach(), torch.cat(alone), rtol=0, atol=0.05)  # bfloat16 iterations
    norms = stacked.detach().view(3, -1).norm(dim=1)
    assert norms.max() / norms.min() < 1.2  # each part takes a step of one size, whatever its gradient's


@pytest.mark.parametrize("iteration", ["jordan", "polar"])
@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (8, 3, 3, 3)])
def test_muon_s_steps_are_its_formula(
    shape: tuple[int, ...], iteration: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps in float64: Nesterov momentum, quintics of U S V^T, 0.2 sqrt(max(M, N)), decoupled decay; and with
    ``every=2``, an update twice as large after two gradients."""
    monkeypatch.setattr(muon, "has_fast_bfloat16", lambda device: False)
    start, *gradients = torch.randn(5, *shape, generator=torch.Generator().manual_seed(2))
    rate, momentum, decay = 0.05, 0.9, 0.3
    for every in (1, 2):
        parameter = nn.Parameter(start.clone())
        optimizer = Muon(
            [{"params": [parameter]}], lr=rate, momentum=momentum, weight_decay=decay, every=every
        )
        optimizer.param_groups[0]["iteration"] = iteration
        expected, moment = start.double().flatten(1), torch.zeros_like(start).double().flatten(1)
        for step, gradient in enumerate(gradients, 1):
            parameter.grad = gradient.clone()
            optimizer.step()
            g = gradient.double().flatten(1)
            moment = momentum * moment + (1 - momentum) * g
            if step % every == 0:
                u, s, vh = torch.linalg.svd(momentum * moment + (1 - momentum) * g, full_matrices=False)
                s = s / s.norm()
                if iteration == "polar":
                    s = s / (1.01 * s.pow(4).sum() ** 0.25)
                for a, b, c in QUINTICS[iteration]:
                    s = a * s + b * s**3 + c * s**5
                x = 0.2 * max(expected.shape) ** 0.5 * (u * s) @ vh
                expected = (1 - every * rate * decay) * expected - every * rate * x
            torch.testing.assert_close(parameter.detach().double().flatten(1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_inner_matrices_decay(name: str) -> None:
    """Without a gradient's push: of norms, biases, embeddings, first and last layers nothing is taken."""
    network = nn.ModuleDict({"network": DiT(in_channels=4, width=32, depth=1, heads=2, num_classes=3)})
    before = {key: one.detach().clone().fill_(1.0) for key, one in network.named_parameters()}
    with torch.no_grad():
        for one in network.parameters():
            one.fill_(1.0)
            one.grad = torch.zeros_like(one)
    for optimizer in make_optimizers(
        network, LoopConfig(optimizer=name, learning_rate=0.1, weight_decay=0.5)
    ):
        optimizer.step()
        optimizer.step()  # Muon's update
    inner = re.compile(r"network\.blocks\.0\.(attn|mlp|adaLN_modulation)\b.*\.weight")
    decayed = {key for key, one in network.named_parameters() if not torch.equal(one.detach(), before[key])}
    matrices = {key for key, one in before.items() if inner.fullmatch(key) and one.ndim >= 2}
    assert decayed == matrices and len(matrices) >= 5
    for key in matrices:
        at_once = name == "muon" and "adaLN" not in key
        left = 1 - 2 * 0.05 if at_once else 0.95**2
        torch.testing.assert_close(network.get_parameter(key).detach(), left * before[key])


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match="give the others to AdamW"):
        Muon([{"params": [nn.Parameter(torch.zeros(4))]}])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_own_every_parameter_once_and_learn(name: str) -> None:
    torch.manual_seed(0)
    network = DiT(in_channels=4, width=32, depth=2, heads=2, num_classes=3)
    config = LoopConfig(optimizer=name, learning_rate=3e-3, lr_scheduler="constant")
    optimizers = make_optimizers(network, config)
    owned = [
        id(one) for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]
    ]
    assert sorted(owned) == sorted(id(one) for one in network.parameters() if one.requires_grad)
    x, target = torch.randn(16, 4, 4, 4), torch.randn(16, 4, 4, 4) * 0.1 + 1.0
    losses = []
    for _ in range(30):
        loss = (network(x, 0.5) - target).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    config = LoopConfig(
        learning_rate=1.0, lr_warmup_steps=10, max_train_steps=110, lr_scheduler="linear", lr_decay_share=0.5
    )
    assert [learning_rate(step, config) for step in (0, 4, 9, 30, 54)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    assert learning_rate(55 + 11, config) == pytest.approx(0.8)
    assert learning_rate(110, config) == 0.0
    cosine = dataclasses.replace(config, lr_scheduler="cosine")
    assert learning_rate(55 + 55 // 2, cosine) == pytest.approx(0.5, abs=0.02)
    assert learning_rate(100, dataclasses.replace(config, lr_scheduler="constant")) == 1.0


def test_weight_average_follows_its_formula_and_swaps_back() -> None:
    module = nn.Linear(3, 2)
    average = WeightAverage(module, warmed_up(0.5))
    expected = module.weight.detach().clone()
    for step in range(1, 6):
        with torch.no_grad():
            module.weight += 1.0
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    live = module.weight.detach().clone()
    with average.applied():
        torch.testing.assert_close(module.weight.detach(), expected)
    assert torch.equal(module.weight.detach(), live)


def test_muon_takes_inner_matrices_only() -> None:
    network = DiT(in_channels=4, width=32, depth=1, heads=2, num_classes=3, registers=2, text_dim=8)
    names = {id(one): name for name, one in network.named_parameters()}
    inner, adamw = make_optimizers(network, LoopConfig(optimizer="muon"))
    taken = {names[id(one)] for group in inner.param_groups for one in group["params"]}
    assert taken == {
        f"blocks.0.{name}.weight"
        for name in (
            "attn.qkv", "attn.proj", "cross_attn.q", "cross_attn.kv", "cross_attn.proj", "mlp.fc1", "mlp.fc2",
        )
    }  # fmt: skip
    parts = {names[id(one)]: group["parts"] for group in inner.param_groups for one in group["params"]}
    assert parts["blocks.0.cross_attn.kv.weight"] == 2 and parts["blocks.0.cross_attn.q.weight"] == 1
    assert parts["blocks.0.attn.qkv.weight"] == 3
    decayed = {
        names[id(one)] for group in adamw.param_groups if group["weight_decay"] for one in group["params"]
    }
    assert decayed == {"blocks.0.adaLN_modulation.1.weight"}


def test_a_run_of_muon_that_was_begun_before_goes_on_as_it_was() -> None:
    """With adaLN's matrices among Muon's, five equal iterations, and an update in every step."""

    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"network": DiT(in_channels=4, width=32, depth=1, heads=2)})

    def gradients(module: nn.Module, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for one in module.parameters():
            one.grad = torch.randn(one.shape, generator=generator)

    config = LoopConfig(optimizer="muon", learning_rate=0.01)
    old = network()
    inner, adamw = muon._muon(dict(old.named_parameters()), config, modulation=True)
    for group in inner.param_groups:
        for new in ("iteration", "every", "steps"):
            del group[new]
    assert any(group["parts"] == 6 for group in inner.param_groups)
    trained = TrainedModule("flow", network(), config, Accelerator(cpu=True))
    state = trained.state()
    for step in range(3):
        if step == 1:
            saved = [each.state_dict() for each in (inner, adamw)]
            trained.load(copy.deepcopy(state | {"flow-weights": old.state_dict(), "flow-optimizer": saved}))
        gradients(old, step)
        gradients(trained.module, step)
        for optimizer in (inner, adamw):
            optimizer.step()
        trained.update(0.01, skip=torch.tensor(False))
    for name, one in old.named_parameters():
        assert torch.equal(one, trained.module.get_parameter(name)), name


class Wide(Regression):
    """Wide enough for moments in 8 bits, which small tensors do not get."""

    def __init__(self, width: int = 4096, **options: Any) -> None:
        super().__init__(**options)
        self.layers = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Dropout(0.2), nn.Linear(width, 1))


def steady(name: str) -> LoopConfig:
    return dataclasses.replace(CONFIG, optimizer=name, lr_scheduler="constant", learning_rate=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_that_died_and_goes_on_equals_the_uninterrupted_one(tmp_path: Path, name: str) -> None:
    fit({"flow": Wide()}, Line(), steady(name), tmp_path / "whole")
    with pytest.raises(InterruptedError):
        fit({"flow": Wide(at={7 * 6: InterruptedError()})}, Line(), steady(name), tmp_path / "died")
    fit({"flow": Wide()}, Line(), steady(name), tmp_path / "died")
    assert_equal_weights(tmp_path / "whole", tmp_path / "died")
    if name == "adamw-8bit":
        assert torch.uint8 in {one.dtype for one in weights(tmp_path / "whole").values()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_and_betas_are_those_of_the_start(name: str) -> None:
    """A saved state holds its own, which would otherwise rule the resumed run."""
    first, second = (
        TrainedModule(
            "m",
            nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
            dataclasses.replace(steady(name), weight_decay=decay, adam_beta2=beta),
            Accelerator(cpu=True),
        )
        for decay, beta in ((0.5, 0.9), (0.25, 0.99))
    )
    second.load(first.state())
    groups = [group for optimizer in second.optimizers for group in optimizer.param_groups]
    assert {group["weight_decay"] for group in groups} <= {0.0, 0.25} != {0.0}
    assert {group["betas"][1] for group in groups if "betas" in group} == {0.99}


def test_schedule_free_is_judged_by_its_own_average(tmp_path: Path) -> None:
    """Of what a run leaves, through a skipped step: the average is what the package calls evaluation weights."""
    module = Wide(poison={4 * 6})
    fit({"flow": module}, Line(), steady("schedule-free"), tmp_path)
    state = load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[-1])
    (optimizer,) = make_optimizers(module, steady("schedule-free"))
    module.load_state_dict(state["flow-weights"])
    optimizer.load_state_dict(state["flow-optimizer"][0])
    trained = {name: one.detach().clone() for name, one in module.named_parameters()}
    optimizer.eval()  # type: ignore[attr-defined]
    assert any(not torch.allclose(one, trained[name]) for name, one in module.named_parameters())
    for name, one in module.named_parameters():
        torch.testing.assert_close(one.detach(), state["flow-average"][name], rtol=1e-5, atol=1e-6)


def test_schedule_free_goes_on_from_a_state_in_its_evaluation_mode() -> None:
    def module() -> TrainedModule:
        return TrainedModule("flow", Wide(), steady("schedule-free"), Accelerator(cpu=True))

    def step(one: TrainedModule, number: int) -> None:
        torch.manual_seed(number)
        one.trained({"x": torch.ones(2, 1), "y": torch.zeros(2, 1), "sample_ids": [0, 1]})["loss"].backward()
        one.update(1e-3, skip=torch.tensor(False))
        one.update_averages(number)

    whole, second = module(), module()
    for number in (1, 2):
        step(whole, number)
    whole.optimizers[0].eval()
    second.load(copy.deepcopy(whole.state()))
    whole.optimizers[0].train()
    for one in (whole, second):
        step(one, 3)
    for a, b in zip(whole.trained.parameters(), second.trained.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"lr_scheduler": "cosine"}, "--lr-scheduler constant"), ({"adam_beta1": 0.0}, "--adam-beta1 0")],
)
def test_settings_that_contradict_schedule_free_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(steady("schedule-free"), **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_plan_counts_what_optimizers_really_keep(name: str) -> None:
    network = DiT(in_channels=4, width=64, depth=2, heads=2, num_classes=3)
    optimizers = make_optimizers(network, steady(name))
    network(torch.randn(2, 4, 4, 4), 0.5).mean().backward()
    kept, seen = 0, set()
    for optimizer in optimizers:
        optimizer.step()
        for state in optimizer.state.values():
            for key, one in state.items():
                if isinstance(one, torch.Tensor) and key != "step" and one.data_ptr() not in seen:
                    seen.add(one.data_ptr())  # all share the table of 8-bit values
                    kept += one.numel() * one.element_size()
    size = sum(one.numel() for one in network.parameters())
    assert state_bytes(network, steady(name), torch.float32) - 12 * size == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_layer_decay_scales_rates_by_the_distance_from_the_end_and_spares_tables(name: str) -> None:
    network = DiT(in_channels=4, width=32, depth=2, heads=2, num_classes=3)
    stage = nn.ModuleDict({"network": network, "alignment": nn.Linear(32, 32)})
    config = dataclasses.replace(steady(name), lr_layer_decay=0.5, lr_embeddings=10.0)
    scale = {
        id(one): group["lr_scale"]
        for optimizer in make_optimizers(stage, config)
        for group in optimizer.param_groups
        for one in group["params"]
    }
    assert scale.keys() == {id(one) for one in stage.parameters() if one.requires_grad}
    assert {scale[id(one)] for one in network.blocks[1].parameters()} == {0.5}
    assert {scale[id(one)] for one in network.blocks[0].parameters()} == {0.25}
    assert {scale[id(one)] for one in network.x_embedder.parameters()} == {0.125}
    assert {scale[id(one)] for one in network.final_layer.parameters()} == {1.0}
    assert {scale[id(one)] for one in stage["alignment"].parameters()} == {1.0}
    assert scale[id(network.y_embedder.embedding_table.weight)] == 10.0
    with pytest.raises(UserError, match="network of blocks"):
        make_optimizers(nn.ModuleDict({"network": nn.Linear(2, 2)}), config)


def test_a_scaled_rate_reaches_the_weights() -> None:
    torch.manual_seed(0)
    stage = nn.ModuleDict({"network": DiT(in_channels=4, width=32, depth=2, heads=2)})
    config = LoopConfig(lr_layer_decay=0.5, weight_decay=0.0)
    module = TrainedModule("flow", stage, config, Accelerator(cpu=True))
    before = {key: one.detach().clone() for key, one in stage.named_parameters()}
    for one in stage.parameters():
        one.grad = torch.ones_like(one)
    module.update(0.01, skip=torch.tensor(False))  # AdamW's first step has the length of its rate
    moved = {key: float((one.detach() - before[key]).abs().max()) for key, one in stage.named_parameters()}
    assert moved["network.final_layer.linear.bias"] == pytest.approx(0.01, rel=1e-3)
    assert moved["network.blocks.0.attn.proj.bias"] == pytest.approx(0.0025, rel=1e-3)


# ---- the precision that a run takes by itself ----

CPU = torch.device("cpu")


@pytest.mark.parametrize(("fast", "chosen"), [(True, "bf16"), (False, "no")])
def test_auto_is_bfloat16_where_the_device_computes_in_it(
    fast: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "has_fast_bfloat16", lambda device: fast)
    assert distributed.resolve("auto", CPU) == chosen
    assert distributed.resolve("no", CPU) == "no" and distributed.resolve("bf16", CPU) == "bf16"


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_muon_does_not_emulate_bfloat16(
    fast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU without it, bfloat16 matrix products take up to 70 times as long as those in float32."""
    monkeypatch.setattr(muon, "has_fast_bfloat16", lambda device: fast)
    assert orthogonalise(torch.randn(1, 4, 8)).dtype == dtype


def test_this_machine_is_asked() -> None:
    assert distributed.has_fast_bfloat16(CPU) is bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert not distributed.has_fast_bfloat16(torch.device("meta"))
