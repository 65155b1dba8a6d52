"""Promises of every velocity network."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin

from latentflow.errors import UserError
from latentflow.models import MODELS, Condition

from .tiny import FULL, build, full_condition, latents, perturb


@pytest.mark.parametrize(("height", "width"), [(4, 4), (6, 2), (2, 10), (5, 7)])
def test_any_rectangle_in_gives_the_same_rectangle_out(name: str, height: int, width: int) -> None:
    model = build(name, **FULL)
    x = latents(2, height, width)
    out = model(x, 0.5, full_condition(2, height, width))
    assert out.shape == x.shape and out.dtype == x.dtype and out.isfinite().all()
    new = build(name, perturbed=False, **FULL)(x, 0.5, full_condition(2, height, width))
    assert not new.any()  # a new network says exactly zero


def test_one_time_equals_the_same_time_for_every_row(name: str) -> None:
    model, x = build(name, out_channels=8), latents()  # what is computed beyond the velocity is not returned
    expected = model(x, torch.full((3,), 0.3))
    assert expected.shape == x.shape
    assert torch.equal(model(x, 0.3, return_dict=True).sample, expected)
    assert torch.equal(model(x, 0.3), expected)
    assert torch.equal(model(x, torch.tensor(0.3, dtype=torch.float64)), expected)


def test_every_row_has_its_own_time(name: str) -> None:
    model, x, times = build(name), latents(), torch.tensor([0.1, 0.5, 0.9])
    together = model(x, times)
    alone = torch.cat([model(x[i : i + 1], times[i]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, model(x, 0.1), atol=1e-3)


def test_a_dropped_row_depends_on_neither_class_nor_text(name: str) -> None:
    model, x, cond = build(name, **FULL), latents(), full_condition()
    other = replace(cond, class_labels=(cond.class_labels + 1) % 3, text=torch.randn_like(cond.text))
    dropped = model(x, 0.5, cond.unconditional())
    assert torch.equal(dropped, model(x, 0.5, other.unconditional()))
    nothing = Condition(channels=cond.channels)
    torch.testing.assert_close(dropped, model(x, 0.5, nothing), rtol=1e-4, atol=1e-5)
    kept = model(x, 0.5, cond)
    assert not torch.allclose(dropped, kept, atol=1e-3)
    drop = torch.tensor([True, False, True])  # each row for itself
    mixed = model(x, 0.5, replace(cond, drop=drop))
    torch.testing.assert_close(
        mixed, torch.where(drop[:, None, None, None], dropped, kept), rtol=1e-4, atol=1e-5
    )


def test_class_text_and_channels_each_change_the_velocity(name: str) -> None:
    model, x, cond = build(name, **FULL), latents(), full_condition()
    out = model(x, 0.5, cond)
    for other in (
        replace(cond, class_labels=(cond.class_labels + 1) % 3),
        replace(cond, text=cond.text.flip(2)),
        replace(cond, channels=cond.channels + 1.0),
    ):
        assert not torch.allclose(out, model(x, 0.5, other), atol=1e-3)


def test_padding_of_the_text_does_not_matter(name: str) -> None:
    model, x, cond = build(name, **FULL), latents(), full_condition()
    padded = replace(
        cond,
        text=torch.cat([cond.text, torch.full((3, 4, 6), 100.0)], dim=1),
        text_mask=torch.cat([cond.text_mask, torch.zeros(3, 4, dtype=torch.bool)], dim=1),
    )
    torch.testing.assert_close(model(x, 0.5, padded), model(x, 0.5, cond), rtol=1e-4, atol=1e-5)
    # Without any token it is the null text.
    empty = replace(cond, class_labels=None, drop=None, text_mask=torch.zeros_like(cond.text_mask))
    nothing = Condition(channels=cond.channels)
    model = build(name, text_dim=6, condition_channels=2)
    torch.testing.assert_close(model(x, 0.5, empty), model(x, 0.5, nothing), rtol=1e-4, atol=1e-5)


def test_half_precision_stays_close_to_float32(name: str) -> None:
    """It does by autocast and with weights in bfloat16; latents and velocities stay in float32."""
    model, x, cond = build(name, **FULL), latents(), full_condition()
    expected = model(x, 0.5, cond)
    with torch.autocast("cpu", torch.bfloat16):
        by_autocast = model(x, 0.5, cond)
    by_weights = model.to(torch.bfloat16)(x, 0.5, cond)
    assert model.dtype == torch.bfloat16
    for out, tolerance in ((by_autocast, 0.03), (by_weights, 0.05)):
        assert out.dtype == torch.float32
        assert (out - expected).norm() / expected.norm() < tolerance


def arguments(model: Any) -> dict[str, Any]:
    """The configuration as it is written, without diffusers' own notes."""
    config = json.loads(model.to_json_string())
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("max_shard_size", ["10GB", "30KB"])
def test_saving_and_loading_is_exact(name: str, max_shard_size: str, tmp_path: Path) -> None:
    model, x, cond = build(name, **FULL, sample_size=6), latents(), full_condition()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    shards = list(tmp_path.glob("*.safetensors"))
    assert (len(shards) > 1) == (max_shard_size == "30KB")
    again = MODELS[name].from_pretrained(tmp_path).eval()
    assert arguments(again) == arguments(model)
    assert torch.equal(again(x, 0.5, cond), model(x, 0.5, cond))


def test_a_half_precision_variant_loads_as_it_was_saved(name: str, tmp_path: Path) -> None:
    model = build(name, **FULL).half()
    model.save_pretrained(tmp_path, variant="fp16")
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    again = MODELS[name].from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    state = again.state_dict()
    assert again.dtype == torch.float16
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    cond = replace(full_condition(), drop=torch.tensor([True, False, False]))
    model(latents(), torch.tensor([0.1, 0.5, 0.9]), cond).square().mean().backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = build(name, **FULL).train()
    expected = gradients(model)
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    recomputed = gradients(model)
    assert recomputed.keys() == expected.keys()
    for key, gradient in recomputed.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-7, msg=key)


def test_every_parameter_learns(name: str) -> None:
    found = gradients(build(name, **FULL).train())
    model = build(name, **FULL)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad and not key.endswith("to_k.bias"):  # softmax does not see a key's bias
            assert found[key].abs().sum() > 0, key


def test_extra_condition_channels_start_without_effect(name: str) -> None:
    base = build(name)
    extended = build(name, perturbed=False, condition_channels=2)
    with torch.no_grad():
        for old, new in zip(base.parameters(), extended.parameters(), strict=True):
            if old.shape == new.shape:
                new.copy_(old)
            else:
                assert new.shape[1] == old.shape[1] + 2
                new[:, : old.shape[1]].copy_(old)
    x = latents()
    expected = base(x, 0.5)
    out = extended(x, 0.5, Condition(channels=torch.randn(3, 2, 6, 4)))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    perturb(extended)
    first = extended(x, 0.5, Condition(channels=torch.ones(3, 2, 6, 4)))
    assert torch.equal(extended(x, 0.5), extended(x, 0.5, Condition(channels=torch.zeros(3, 2, 6, 4))))
    assert not torch.allclose(first, extended(x, 0.5), atol=1e-3)


def test_a_network_first_used_in_inference_mode_can_be_trained(name: str) -> None:
    model, x = build(name), latents(2, 10, 6)
    with torch.inference_mode():
        expected = model(x, 0.5).clone()
    out = model.train()(x, 0.5)
    out.sum().backward()
    torch.testing.assert_close(out.detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiles_without_a_graph_break(name: str) -> None:
    model, x, cond = build(name, **FULL), latents(), full_condition()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, torch.tensor(0.5), cond), model(x, 0.5, cond), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        (Condition(class_labels=torch.zeros(3, dtype=torch.long)), "no num_classes"),
        (Condition(text=torch.zeros(3, 2, 6)), "no text_dim"),
        (Condition(channels=torch.zeros(3, 2, 6, 4)), "no condition_channels"),
        (Condition(drop=torch.zeros(2, dtype=torch.bool)), r"drop has shape \(2,\): it must be \(3\)"),
    ],
)
def test_a_condition_that_does_not_fit_is_refused(name: str, cond: Condition, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name)(latents(), 0.5, cond)


def test_wrong_channels_or_times_are_refused(name: str) -> None:
    model = build(name)
    with pytest.raises(ValueError, match=r"takes \(B, 4, H, W\)"):
        model(torch.zeros(1, 3, 4, 4), 0.5)
    with pytest.raises(ValueError, match=r"t has shape \(2,\)"):
        model(latents(), torch.zeros(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out_channels": 2}, "out_channels 2 is less than in_channels 4"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"sample_size": (4, 4, 4)}, "sample_size is "),
    ],
)
def test_sizes_that_make_no_network_are_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(name, **arguments)
    with pytest.raises(UserError, match="not all multiples of head_dim 16"):
        build("unet", channels=(16, 24))


def test_the_loader_finds_the_class_by_its_module(name: str) -> None:
    module = importlib.import_module(MODELS[name].__module__)
    assert module.ModelMixin is ModelMixin  # diffusers looks for this name in the component's own module
