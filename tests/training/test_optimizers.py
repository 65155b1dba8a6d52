"""Optimisers, schedules and the weight average."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from latentflow.models import DiT
from latentflow.training.config import LoopConfig
from latentflow.training.ema import WeightAverage
from latentflow.training.muon import Muon, orthogonalise
from latentflow.training.optimizers import OPTIMIZERS, learning_rate, make_optimizers


def test_orthogonalise_brings_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in [(3, 40, 40), (2, 24, 60), (2, 60, 24)]:
        matrices = torch.randn(shape, generator=generator)
        values = torch.linalg.svdvals(orthogonalise(matrices, steps=8).float())
        assert values.min() > 0.6 and values.max() < 1.3  # where the quintic iteration settles
        # The singular vectors stay: U V^T of the input is the nearest orthogonal matrix.
        u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
        ideal, found = (u @ vh).flatten(1), orthogonalise(matrices, steps=8).float().flatten(1)
        assert torch.cosine_similarity(ideal, found).min() > 0.97


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


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match="give the others to AdamW"):
        Muon([{"params": [nn.Parameter(torch.zeros(4))]}])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_own_every_parameter_once_and_learn(name: str) -> None:
    torch.manual_seed(0)
    network = DiT(in_channels=4, width=32, depth=2, heads=2, num_classes=3)
    config = LoopConfig(optimizer=name, learning_rate=3e-3)
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
    average = WeightAverage(module, decay=0.5)
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
    network = DiT(in_channels=4, width=32, depth=1, heads=2, num_classes=3, registers=2)
    names = {id(one): name for name, one in network.named_parameters()}
    muon, adamw = make_optimizers(network, LoopConfig(optimizer="muon"))
    taken = {names[id(one)] for group in muon.param_groups for one in group["params"]}
    assert taken == {
        f"blocks.0.{name}.weight"
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    }
    parts = {names[id(one)]: group["parts"] for group in muon.param_groups for one in group["params"]}
    assert parts["blocks.0.attn.qkv.weight"] == 3 and parts["blocks.0.adaLN_modulation.1.weight"] == 6
    assert all(group["weight_decay"] == 0 for group in adamw.param_groups if group["params"])
