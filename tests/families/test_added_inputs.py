"""Input channels for masks and control images in pretrained networks: the base to the last bit at first, then a wider
first layer."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file
from torch import Tensor, nn

from latentflow import LatentFlowInpaintPipeline
from latentflow.autoencoder import masked_condition
from latentflow.config import AdapterConfig, FlowConfig
from latentflow.errors import UserError
from latentflow.families import FAMILIES
from latentflow.families.added_inputs import KEPT
from latentflow.training.fine_tune.pretrained_adapter import PretrainedAdapter
from latentflow.training.losses.control import ControlImages
from latentflow.training.losses.flow import Masking
from latentflow.training.losses.pretrained import PretrainedLoss, in_batch

from .test_pretrained import seeded
from .tiny import TINY, checkpoint

#: two that differ in layout; the others are slow
LAYOUTS = ("StableDiffusion3Pipeline", "FluxPipeline-dev")
MORE = (
    "ChromaPipeline", "Flux2KleinPipeline", "QwenImagePipeline", "ZImagePipeline", "SanaPipeline", "Lumina2Pipeline"
)  # fmt: skip
pytestmark = pytest.mark.parametrize(
    "name", [*LAYOUTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)


def opened(name: str) -> Any:
    return FAMILIES[name.partition("-")[0]](deepcopy(checkpoint(name)), **TINY[name].call)


def half_hidden(side: int, count: int = 2) -> tuple[Tensor, Tensor]:
    """Random images (count, 3, side, side), and masks of their right halves."""
    images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    masks = torch.zeros(count, 1, side, side)
    masks[..., side // 2 :] = 1.0
    return images, masks


LABELS = (("sky", "#80c0ff"), ("road", ""), ("tree", "#208020"))


def labelled(side: int, count: int = 2) -> Tensor:
    """Random label maps (count, side, side), a quarter of whose pixels have no label."""
    return torch.randint(-1, 3, (count, side, side), generator=torch.Generator().manual_seed(4))


def randomised(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    for added in model.added_inputs.values():
        nn.init.normal_(added.weight, std=0.1, generator=generator)


@torch.no_grad()
def test_the_base_to_the_last_bit_before_training(name: str) -> None:
    model, side = opened(name), TINY[name].side
    rows = model.encode_prompt(["a red apple", "a pear"])
    images, masks = half_hidden(side)
    x = model.noise(2, side, side, torch.Generator().manual_seed(2))

    def velocity(rows: Any, guidance: float = 2.0) -> Tensor:
        return model.velocity(rows, guidance)(x, torch.tensor(0.4))  # type: ignore[no-any-return]

    before = velocity(rows)
    assert not model.takes_masks and not model.control_kinds
    model.add_inputs({"masks": None, "control": None})
    assert model.takes_masks and model.control_kinds == ("image",)
    known, led = rows.with_known(images, masks), rows.with_control(-images)
    both = known.with_control(-images)
    for given in (rows, known, led, both):
        assert torch.equal(velocity(given), before)
    randomised(model)
    assert torch.equal(velocity(rows), before)  # nothing is given
    found = [velocity(given) for given in (known, led, both)]
    for number, one in enumerate(found):
        assert not torch.allclose(one, before, atol=1e-3)
        assert not torch.allclose(one, found[number - 1], atol=1e-3)
    scaled = velocity(model.with_control_scale(both, 0.25), 1.0)  # guidance of some families is not linear
    torch.testing.assert_close(scaled, torch.lerp(velocity(known, 1.0), velocity(both, 1.0), 0.25))
    assert torch.equal(velocity(model.with_control_scale(both, 0.0)), found[0])

    control = model.added_inputs["control"].weight.clone()
    model.remove_inputs()
    assert torch.equal(velocity(rows), before)
    assert not model.added_inputs and not [key for key in model.network.state_dict() if ".added." in key]
    model.add_inputs({"control": control})
    torch.testing.assert_close(velocity(led), found[1])  # one input alone: as without what the other takes


@torch.no_grad()
def test_equals_a_network_with_a_wider_first_layer(name: str) -> None:
    """diffusers' own network with as many input channels, the weights side by side in its first layer."""
    if name == "ZImagePipeline":
        pytest.skip("diffusers has no such network with other channels at its input than at its output")
    model, side = opened(name), TINY[name].side
    model.add_inputs({"masks": None, "control": None, "labels": None}, labels=LABELS)
    randomised(model)
    images, masks = half_hidden(side)
    rows = model.encode_prompt(["a red apple", "a pear"]).with_known(images, masks).with_control(-images)
    rows = model.with_layout(rows, labelled(side))
    x = model.noise(2, side, side, torch.Generator().manual_seed(2))
    ours = model.velocity(rows, 1.0)(x, torch.tensor(0.4))

    condition = model.arrange(rows)
    beside = torch.cat([x, *(condition[kept] for kept in KEPT.values())], 1)
    weights = [added.weight.clone() for added in model.added_inputs.values()]
    network, parts = model.network, model.patch**2 if model.cells_in_order else 1
    first = f"{model.first_layer}.weight"
    model.remove_inputs()
    state = network.state_dict()
    own = state[first]
    state[first] = torch.cat([each.unflatten(1, (parts, -1)) for each in (own, *weights)], 2).flatten(1, 2)
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    channels = config["in_channels"]
    more = sum(weight.shape[1] for weight in weights) * channels // own.shape[1]
    out = config.get("out_channels") or channels
    wide = type(network)(**{**config, "in_channels": channels + more, "out_channels": out}).eval()
    wide.load_state_dict(state)
    model.pipeline.transformer = wide
    model.with_extra = lambda x, condition: beside
    torch.testing.assert_close(model.velocity(rows, 1.0)(x, torch.tensor(0.4)), ours)


def test_label_maps_lead_pixel_by_pixel_and_their_table_is_in_the_file(name: str, tmp_path: Path) -> None:
    model, side = opened(name), TINY[name].side
    rows, layout = model.encode_prompt(["a red apple", "a pear"]), labelled(side)
    x = model.noise(2, side, side, torch.Generator().manual_seed(2))

    @torch.no_grad()
    def velocity(model: Any, rows: Any) -> Tensor:
        return model.velocity(rows, 1.0)(x, torch.tensor(0.4))  # type: ignore[no-any-return]

    before = velocity(model, rows)
    with pytest.raises(UserError, match="takes no label map"):
        model.with_layout(rows, layout)
    with pytest.raises(UserError, match="of which labels"):
        model.add_inputs({"labels": None})
    adapter = PretrainedAdapter(model, AdapterConfig(lora_rank=2))
    model.add_inputs({"control": None, "labels": None}, labels=LABELS)
    assert model.control_kinds == ("image", "labels") and model.control_labels == LABELS
    with pytest.raises(UserError, match="from -1 to 3"):
        model.with_layout(rows, layout + (layout == 2).long())
    led = model.with_layout(rows, layout)
    assert torch.equal(velocity(model, led), before)  # to the last bit, before training
    added, cell = model.added_inputs["labels"], model._cell
    channels = model.arrange(led)["layout"].unflatten(1, (-1, cell, cell))
    for y, x_ in ((0, 0), (side - 1, side // 2)):
        label = int(layout[1, y, x_])
        expected = added.table.weight[label] if label >= 0 else torch.zeros(added.table.weight.shape[1])
        assert torch.equal(channels[1, :, y % cell, x_ % cell, y // cell, x_ // cell], expected)

    batch = {
        **in_batch(rows),
        "latents": x.clone(),
        "layout": torch.where(layout < 0, 255, layout)[:, None].to(torch.uint8),
        "sample_ids": [0, 1],
    }
    control = ControlImages(model.control_inputs, 0.0, 1)
    loss = PretrainedLoss(model, FlowConfig(), seed=1, control=control)
    learned = [weight for weight in model.network.parameters() if weight.requires_grad]
    optimizer, start = (
        torch.optim.AdamW(learned, lr=1e-2, weight_decay=0.0),
        added.table.weight.detach().clone(),
    )
    for _ in range(3):
        optimizer.zero_grad()
        loss(batch)["loss"].backward()
        optimizer.step()
    assert added.weight.any() and not torch.equal(added.table.weight, start)
    loss.eval()
    found = velocity(model, led)
    assert not torch.allclose(found, velocity(model, rows), atol=1e-4)
    nothing = model.with_layout(rows, torch.full_like(layout, -1))
    assert torch.equal(velocity(model, nothing), velocity(model, rows))

    adapter.save(tmp_path)
    pipe: Any = LatentFlowInpaintPipeline(type(model)(deepcopy(checkpoint(name)), **TINY[name].call))
    pipe.load_lora_weights(tmp_path, adapter_name="led")
    stock = pipe.model
    assert stock.control_labels == LABELS  # with their colours
    led = stock.with_layout(stock.encode_prompt(["a red apple", "a pear"]), layout)
    torch.testing.assert_close(velocity(stock, led), found, atol=1e-5, rtol=0)
    pipe.set_adapters("led", 0.0)
    torch.testing.assert_close(velocity(stock, led), before)
    pipe.unload_lora_weights()
    assert not stock.control_kinds
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(UserError, match="load that file"):  # its names are in the file's metadata
        pipe.load_lora_weights(tensors)
    table = {"labels": tensors["added.control.labels.weight"], "table": tensors["added.control.labels.table"]}
    with pytest.raises(UserError, match=r"have a table.weight of shape \(3, 8\).*would have \(2, 8\)"):
        stock.add_inputs(table, labels=LABELS[:2])
    with pytest.raises(UserError, match="is not finite in its input channels"):
        pipe.load_lora_weights({**tensors, "added.control.weight": torch.tensor([torch.nan])})
    assert not stock.added_inputs and not any(pipe.get_list_adapters().values())


@torch.no_grad()
def test_what_is_known_is_that_of_networks_of_our_own(name: str) -> None:
    model, side = opened(name), TINY[name].side
    model.add_inputs({"masks": None})
    images, masks = half_hidden(side)
    masks[1] = 1.0  # nothing is known
    rows = model.encode_prompt(["a red apple", "a pear"])
    with torch.autocast("cpu", torch.bfloat16):  # of a training step, where the autoencoder stays in float32
        rows = rows.with_known(images, masks)
    torch.testing.assert_close(rows.kept["channels"], masked_condition(model.vae, images, masks))
    assert not rows.kept["channels"][1].any()
    channels = model.latent_shape(side, side)[0]
    assert torch.equal(model.known_latents(rows), rows.kept["channels"][:, -channels:])


def test_refusals(name: str) -> None:
    model, side = opened(name), TINY[name].side
    images, masks = half_hidden(side)
    rows = model.encode_prompt(["a red apple"])
    with pytest.raises(UserError, match="not trained with masks"):
        rows.with_known(images[:1], masks[:1])
    with pytest.raises(UserError, match="takes no control image"):
        rows.with_control(images[:1])
    for kind, words in (("masks", "for masks"), ("control", "for control images")):
        with pytest.raises(UserError, match=f"{words} have a weight of shape"):
            model.add_inputs({"control": None, kind: torch.zeros(3, 5)})
    assert not model.added_inputs
    model.add_inputs({"masks": None})
    with pytest.raises(UserError, match="for masks already"):
        model.add_inputs({"control": None, "masks": None})
    assert [*model.added_inputs] == ["masks"]
    with pytest.raises(UserError, match="masks have shape"):
        rows.with_known(images[:1], masks)
    with pytest.raises(UserError, match="takes no control image"):
        rows.with_control(images[:1])


@torch.no_grad()
def test_the_flow_starts_from_what_is_known_with_a_data_dependent_coupling(name: str, tmp_path: Path) -> None:
    """In training as in sampling, and the file says so; without known images it starts from noise."""
    model, side = opened(name), TINY[name].side
    adapter = PretrainedAdapter(model, AdapterConfig(lora_rank=2))
    model.add_inputs({"masks": None, "control": None}, coupling="data-dependent")
    assert model.coupling == "data-dependent"
    images, masks = half_hidden(side)
    masks[1] = 1.0  # nothing is known
    rows = model.encode_prompt(["a red apple", "a pear"])
    known = rows.with_known(images, masks)
    loss = PretrainedLoss(model, FlowConfig(inpainting=True, coupling="data-dependent"), seed=1)
    noise = model.noise(2, side, side, seeded())
    left = noise.shape[3] // 2
    source = loss.source(noise, known)
    assert torch.equal(source[0, ..., :left], model.known_latents(known)[0, ..., :left])
    assert torch.equal(source[..., left:], noise[..., left:]) and torch.equal(source[1], noise[1])
    assert torch.equal(loss.source(noise, rows), noise)

    adapter.save(tmp_path)
    pipe: Any = LatentFlowInpaintPipeline(type(model)(deepcopy(checkpoint(name)), **TINY[name].call))
    pipe.load_lora_weights(tmp_path)
    assert pipe.model.coupling == "data-dependent"
    begins = []

    def keep_first(_: Any, step: int, t: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        begins.append(state["latents"].clone())
        return {}

    call: dict[str, Any] = {
        "prompt": "a red apple", "image": images[:1] / 2 + 0.5, "mask_image": masks[:1], "method": "trained"
    }  # fmt: skip
    pipe(
        **call, num_inference_steps=2, latents=noise[:1], output_type="latent",
        callback_on_step_end=keep_first, callback_on_step_end_tensor_inputs=["latents"],
    )  # fmt: skip
    for state in begins:  # what is known stays as it is from the start on
        torch.testing.assert_close(state[0, ..., :left].cpu(), source[0, ..., :left])
    pipe.disable_lora()
    assert pipe.model.coupling == "independent"


def test_a_trained_adapter_opens_on_the_base(name: str, tmp_path: Path) -> None:
    """Held-out holes are filled better under control images, and one file brings layers and channels to the stock
    base."""
    model, side = opened(name), TINY[name].side
    kind = type(model)
    with torch.no_grad():
        images = half_hidden(side, 8)[0] * 0.1 + 0.5
        batch = {
            **in_batch(model.encode_prompt([f"a red apple {number}" for number in range(8)])),
            "latents": model.encode(images).contiguous(),  # as in a cache
            "control": model.encode(-images),
            "pixels": ((images + 1) * 127.5).round().to(torch.uint8),
            "sample_ids": [*range(8)],
        }
    plain = PretrainedLoss(model, FlowConfig(), seed=1).eval()
    with torch.no_grad():
        base = plain(batch)["per_sample"]
    adapter = PretrainedAdapter(model, AdapterConfig(lora_rank=2, lora_alpha=3.0))
    model.add_inputs({"masks": None, "control": None})
    masking = Masking(model.vae, {"half-plane": 1.0}, 1, model.mask_condition)
    control = ControlImages(model.control_inputs, 0.25, 1)
    loss = PretrainedLoss(model, FlowConfig(inpainting=True), seed=1, masking=masking, control=control)

    def held_out() -> Tensor:
        loss.eval()
        with torch.no_grad():
            found = loss(batch)["per_sample"]
        loss.train()
        return found

    assert torch.equal(held_out(), base)
    learned = [weight for weight in model.network.parameters() if weight.requires_grad]
    for added in model.added_inputs.values():
        assert any(weight is added.weight for weight in learned)
    optimizer = torch.optim.AdamW(learned, lr=3e-3)
    for step in range(1, 31):
        made = loss({**batch, "sample_ids": [8 * step + number for number in range(8)]})
        optimizer.zero_grad()
        made["loss"].backward()
        optimizer.step()
    assert held_out().mean() < base.mean()
    assert all(added.weight.any() for added in model.added_inputs.values())
    adapter.save(tmp_path)

    call: dict[str, Any] = {
        "prompt": "a red apple", "num_inference_steps": 3, "output_type": "np", "method": "trained",
        "image": (images[:1] / 2 + 0.5), "mask_image": half_hidden(side, 1)[1],
        "control_image": {"image": -images[:1] / 2 + 0.5},
    }  # fmt: skip
    drawn = LatentFlowInpaintPipeline(model)(generator=seeded(), **call).images
    stock = deepcopy(checkpoint(name))
    pipe: Any = LatentFlowInpaintPipeline(kind(stock, **TINY[name].call))
    with pytest.raises(UserError, match="not trained with masks"):
        pipe(**call)
    pipe.load_lora_weights(tmp_path)
    again = pipe(generator=seeded(), **call).images
    assert float(abs(again - drawn).max()) <= 1e-5
    left = (images[0].permute(1, 2, 0)[:, : side // 2] / 2 + 0.5).numpy()
    assert float(abs(again[0][:, : side // 2] - left).max()) <= 1e-6  # kept pixels are the image's own

    without = pipe(generator=seeded(), **{**call, "control_scale": 0.0}).images
    assert float(abs(without - again).max()) > 1e-4
    assert (
        float(abs(pipe(generator=seeded(), **{**call, "control_image": None}).images - without).max()) == 0.0
    )

    pipe.disable_lora()
    assert not pipe.takes_masks and not pipe.model.control_kinds
    pipe.enable_lora()
    assert pipe.takes_masks and pipe.model.control_kinds == ("image",)
    pipe.unload_lora_weights()
    assert not pipe.model.added_inputs and not pipe.get_list_adapters()
    other = deepcopy(checkpoint(name))
    with torch.no_grad():
        next(weight for weight in other.transformer.parameters() if weight.ndim == 1).add_(0.5)
    others: Any = LatentFlowInpaintPipeline(kind(other, **TINY[name].call))
    with pytest.raises(UserError, match="made for a base with other weights"):
        others.load_lora_weights(tmp_path)
    assert not others.takes_masks
    file = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = load_file(file)
    for key, inputs in (("added.masks", "masks"), ("added.control.weight", "control images")):
        with pytest.raises(UserError, match=f"input channels for {inputs} have a weight of shape"):
            pipe.load_lora_weights({**tensors, key: tensors[key][:, :-1]})
        assert not pipe.model.added_inputs and not any(pipe.get_list_adapters().values())


def adapter_file(
    name: str, folder: Path, layers: tuple[str, ...] | None = None, inputs: Any = ("masks",)
) -> Path:
    """Write an adapter of random numbers, which brings these inputs."""
    model, generator = opened(name), torch.Generator().manual_seed(5)
    config = AdapterConfig(lora_rank=2) if layers is None else AdapterConfig(lora_rank=2, lora_layers=layers)
    adapter = PretrainedAdapter(model, config)
    for key, weight in model.network.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(weight, std=0.1, generator=generator)
    model.add_inputs(dict.fromkeys(inputs))
    randomised(model)
    adapter.save(folder)
    return folder


def filled(pipe: Any, name: str, **options: Any) -> Tensor:
    images, masks = half_hidden(TINY[name].side, 1)
    call: dict[str, Any] = {"image": images / 2 + 0.5, "mask_image": masks, "method": "trained", **options}
    return pipe(  # type: ignore[no-any-return]
        "a red apple", num_inference_steps=2, generator=seeded(), output_type="pt", **call
    ).images


def test_the_weight_of_an_adapter_is_that_of_its_inputs(name: str, tmp_path: Path) -> None:
    """As of all its layers: with weight 0 the base is left."""
    file = adapter_file(name, tmp_path)
    pipe: Any = LatentFlowInpaintPipeline(opened(name))
    pipe.load_lora_weights(file, adapter_name="fill")
    model, side = pipe.model, TINY[name].side
    x = model.noise(1, side, side, seeded())

    @torch.no_grad()
    def velocity() -> Tensor:
        rows = model.encode_prompt(["a red apple"]).with_known(*half_hidden(side, 1))
        return model.velocity(rows, 1.0)(x, torch.tensor(0.4))  # type: ignore[no-any-return]

    whole = velocity()
    pipe.set_adapters("fill", 0.5)
    half, drawn = velocity(), filled(pipe, name)
    pipe.set_adapters("fill", 1.0)
    assert torch.equal(filled(pipe, name, joint_attention_kwargs={"scale": 0.5}), drawn)
    pipe.set_adapters("fill", 0.0)
    base, rows = velocity(), opened(name).encode_prompt(["a red apple"])
    torch.testing.assert_close(base, opened(name).velocity(rows, 1.0)(x, torch.tensor(0.4)))
    assert not torch.allclose(half, whole, atol=1e-3) and not torch.allclose(half, base, atol=1e-3)


def test_an_adapter_around_the_first_layer_takes_the_inputs_over(name: str, tmp_path: Path) -> None:
    model: Any = opened(name)
    if not isinstance(model.network.get_submodule(model.first_layer), nn.Linear) or name == "ZImagePipeline":
        pytest.skip("our adapters leave its first layer out")
    fill = adapter_file(name, tmp_path / "fill")
    other = adapter_file(name, tmp_path / "other", (model.first_layer,), ())
    pipe: Any = LatentFlowInpaintPipeline(model)
    pipe.load_lora_weights(fill, adapter_name="fill")
    alone = filled(pipe, name)
    pipe.load_lora_weights(other, adapter_name="other")
    pipe.set_adapters(["fill", "other"], [1.0, 0.0])
    torch.testing.assert_close(filled(pipe, name), alone)
    pipe.set_adapters(["fill", "other"])
    assert not torch.allclose(filled(pipe, name), alone, atol=1e-3)
    pipe.fuse_lora(adapter_names=["fill"])
    with pytest.raises(UserError, match="is fused, and cannot be unloaded"):
        pipe.unload_lora_weights()
    pipe.unfuse_lora()
    pipe.fuse_lora(adapter_names=["other"])  # which brings no inputs
    pipe.unload_lora_weights()
    first = model.network.get_submodule(model.first_layer)
    assert not model.added_inputs and not first._forward_hooks and not first._forward_pre_hooks


@pytest.mark.parametrize("how", ["sequential", "leaves"])
def test_adapters_of_offloaded_models(
    name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hooks replace what a layer computes; an input that comes later, or goes, needs them too."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(  # see test_memory.py
        accelerate, "cpu_offload", lambda model, device, **options: cpu_offload(model, cpu, **options)
    )
    file = adapter_file(name, tmp_path)
    pipe: Any = LatentFlowInpaintPipeline(opened(name))
    pipe.load_lora_weights(file)
    expected = filled(pipe, name)

    pipe = LatentFlowInpaintPipeline(opened(name))
    steered = filled(pipe, name, method="replacement")
    if how == "leaves":
        pipe.enable_group_offload(cpu, offload_type="leaf_level")
    else:
        pipe.enable_sequential_cpu_offload(device="cpu")
    pipe.load_lora_weights(file)
    added = pipe.model.added_inputs["masks"]
    assert hasattr(added, "_hf_hook") or how != "sequential"
    torch.testing.assert_close(filled(pipe, name), expected)
    pipe.unload_lora_weights()
    torch.testing.assert_close(filled(pipe, name, method="replacement"), steered)
