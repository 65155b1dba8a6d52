"""Adapters that bring inputs for control images, in their file, to networks of our own that have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentflow import LatentFlowPipeline
from latentflow.config import AdapterConfig
from latentflow.data.labels import to_label_image
from latentflow.errors import UserError
from latentflow.models import MODELS, Condition
from latentflow.pipeline.adapter_conversion import in_layout
from latentflow.training.fine_tune.adapters import Adapter
from latentflow.training.trained_model import extended

from ..models.tiny import build, latents, perturb
from .command import TINY, call, opened, same_state, sampled

pytest.importorskip("peft", reason='needs peft: pip install -e ".[lora]"')

FILE = "pytorch_lora_weights.safetensors"
CONTROL = {"image": 4, "labels": [["sky", "#0000ff"], ["sea", ""]], "cell": 2, "label_width": 3}
LED = Condition(
    control=torch.randn(3, 4, 6, 4, generator=torch.Generator().manual_seed(5)),
    layout=torch.randint(-1, 2, (3, 12, 8), generator=torch.Generator().manual_seed(6)),
)


def trained(name: str, folder: Path, base: dict[str, Any] | None = None) -> tuple[Any, Any, Any]:
    """Save a base, and an adapter that has learnt something; return network, its values at first, and the adapter."""
    network = build(name, **(base or {}))
    LatentFlowPipeline(None, network).save_pretrained(folder / "base")
    model = LatentFlowPipeline(None, extended(network, control=CONTROL).eval()).model
    adapter = Adapter(model, AdapterConfig(lora_rank=2), str(folder / "base"))
    first = [model.network(latents(), 0.3, condition) for condition in (LED, Condition())]
    perturb(model.network)  # what learns, alone
    adapter.save(folder / "adapter")
    return model.network, first, adapter


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_file_makes_the_base_take_control_images_until_it_is_taken_away(
    name: str, tmp_path: Path
) -> None:
    network, first, adapter = trained(name, tmp_path)
    pipe = LatentFlowPipeline.from_pretrained(tmp_path / "base", vae=None)
    x = latents()

    def drawn(condition: Condition) -> Tensor:
        found: Tensor = pipe.transformer(x, 0.3, condition)
        return found

    before = drawn(Condition())
    assert all(torch.equal(value, before) for value in first)  # nothing learnt, to the last bit
    pipe.load_lora_weights(tmp_path / "adapter", adapter_name="led")
    assert pipe.model.control_kinds == ("image", "labels")
    assert pipe.model.control_labels == (("sky", "#0000ff"), ("sea", ""))
    led, without = network(x, 0.3, LED), network(x, 0.3)
    torch.testing.assert_close(drawn(LED), led)
    torch.testing.assert_close(drawn(Condition()), without)
    assert not torch.allclose(led, without, atol=1e-3)
    pipe.set_adapters("led", 0.0)  # the weight is that of the inputs as well
    torch.testing.assert_close(drawn(LED), before)
    pipe.set_adapters("led", 1.0)
    torch.testing.assert_close(drawn(LED), led)
    torch.testing.assert_close(adapter.merged()["transformer"](x, 0.3, LED), led)

    pipe.disable_lora()
    assert pipe.model.control_kinds == () and torch.equal(drawn(Condition()), before)
    pipe.enable_lora()
    torch.testing.assert_close(drawn(LED), led)
    pipe.unload_lora_weights()
    assert pipe.model.control_kinds == () and torch.equal(drawn(Condition()), before)

    pipe.load_lora_weights(tmp_path / "adapter")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "merged")
    merged = LatentFlowPipeline.from_pretrained(tmp_path / "merged", vae=None)
    assert merged.model.control_kinds == ("image", "labels")
    torch.testing.assert_close(merged.transformer(x, 0.3, LED), led)


@torch.no_grad()
@pytest.mark.parametrize(("name", "layer"), [("dit", "x_embedder.proj"), ("unet", "unet.conv_in")])
def test_peft_adapts_the_first_convolution_too(name: str, layer: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    network = build(name, control=CONTROL, condition_channels=2)
    expected = network(latents(), 0.3, LED)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=[layer]), network, "more")
    assert torch.equal(network(latents(), 0.3, LED), expected)
    perturb(network)
    assert not torch.allclose(network(latents(), 0.3, LED), expected, atol=1e-3)


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    trained("dit", tmp_path)

    def refused(network: Any, source: Any = tmp_path / "adapter") -> str:
        pipe = LatentFlowPipeline(None, network)
        with pytest.raises(UserError) as error:
            pipe.load_lora_weights(source, any_base=True)
        assert pipe.transformer.config.get("control") == network.config.get("control")
        return error.value.what

    assert "has its own" in refused(build("dit", control={**CONTROL, "image": 0}))
    tensors = load_file(tmp_path / "adapter" / FILE)
    assert {key for key in tensors if key.startswith("added.")} == {
        "added.control.table.weight", "added.control.proj.image.weight", "added.control.proj.labels.weight"
    }  # fmt: skip
    with pytest.raises(UserError, match="inputs for control images"):
        in_layout(tensors, None, "comfyui", None, "it")
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter" / FILE, "pt") as file:
        metadata = file.metadata()
    (tmp_path / "cut").mkdir()
    del tensors["added.control.table.weight"]
    save_file(tensors, tmp_path / "cut" / FILE, metadata)
    assert "do not fit" in refused(build("dit"), tmp_path / "cut")
    assert "does not say of which kind" in refused(build("dit"), tensors)


def test_a_further_kind_of_control_images_is_for_all_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="beside another kind"):
        trained("dit", tmp_path, {"control": {**CONTROL, "image": 0}})


def test_the_command_trains_and_draws_with_one(tmp_path: Path) -> None:
    folder, cache = tmp_path / "data", tmp_path / "cache"
    folder.mkdir()
    for number in range(8):
        image = Image.new("RGB", (16, 16), "red" if number % 2 else "blue")
        image.putpixel((number, 0), (0, 255, 0))
        image.save(folder / f"{number}.png")
        ids = torch.zeros(16, 16, dtype=torch.uint8)
        ids[number:] = number % 2
        to_label_image(ids.numpy(), (("sky", "#0000ff"), ("sea", "#00ff00"))).save(
            folder / f"{number}-control.png"
        )
    quiet = [*TINY, "--preview-steps", 0, "--validation-steps", 0, "--condition", "none"]
    call(cache, folder, *quiet, "--max-train-steps", 1, "--control", "labels", "-o", tmp_path / "led")
    whole = opened(tmp_path / "led" / "pipeline")
    whole.register_modules(transformer=extended(whole.transformer, control=None))
    whole.save_pretrained(tmp_path / "base")

    line = [folder, *quiet, "--init-from", tmp_path / "base", "--control", "labels", "--lora-rank", 2]
    line += ["--checkpointing-steps", 1]
    call(cache, *line, "--max-train-steps", 2, "-o", tmp_path / "run")
    call(cache, *line, "--max-train-steps", 1, "-o", tmp_path / "stopped")
    call(cache, *line, "--max-train-steps", 2, "-o", tmp_path / "stopped", "--allow-changes")
    assert same_state(tmp_path / "run", tmp_path / "stopped")
    pipe = opened(tmp_path / "base")
    plain = sampled(pipe, num_images_per_prompt=1)
    pipe.load_lora_weights(tmp_path / "run" / "adapter")
    assert pipe.model.control_kinds == ("labels",) and len(pipe.model.control_labels) == 2
    assert load_file(tmp_path / "run" / "adapter" / FILE)["added.control.proj.labels.weight"].any()
    led = sampled(pipe, control_image=torch.ones(16, 16, dtype=torch.long))
    assert led.isfinite().all() and not torch.equal(led, plain)
    words = [
        "--checkpoint",
        tmp_path / "base",
        "--lora",
        tmp_path / "run",
        "--control",
        folder / "1-control.png",
    ]
    call(cache, *words, "--steps", 1, "-o", tmp_path / "out.png", file="../pipelines/generate")
    assert Image.open(tmp_path / "out.png").size == (16, 16)
