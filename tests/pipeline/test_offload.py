"""Weights that are elsewhere while they are not needed: every pipeline draws what it draws with all of them in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoencoderDC
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor, nn

from latentflow.autoencoder import mask_channels
from latentflow.models import UNet, encode_text
from latentflow.pipeline import LatentFlowPipeline
from latentflow.pipeline.edit import LatentFlowEditPipeline
from latentflow.pipeline.img2img import LatentFlowImg2ImgPipeline
from latentflow.pipeline.inpaint import LatentFlowInpaintPipeline
from latentflow.utils.placement import execution_device

from .conftest import NAMES, awake, quiet, seeds, tiny_dit, tiny_text, tiny_vae

CPU = torch.device("cpu")
MASKS = mask_channels(tiny_vae())
DIT = {"text_dim": 16, "registers": 2, "size_conditioning": True, "condition_channels": MASKS}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "DiT of captions": lambda: tiny_dit(**DIT),
    "DiT of classes": lambda: tiny_dit(num_classes=3, position="sincos", interval_conditioning=True),
    "U-Net of captions": lambda: tiny_unet(text_dim=16, size_conditioning=True, condition_channels=MASKS),
    "U-Net of classes": lambda: tiny_unet(num_classes=3),
}


def tiny_unet(**config: Any) -> nn.Module:
    return awake(UNet(in_channels=2, channels=(8, 16), head_dim=8, layers_per_block=1, sample_size=4, **config))


def tiny_pipe(network: nn.Module, vae: Any = None) -> LatentFlowPipeline:
    components = tiny_text() if network.config.text_dim is not None else {"id2label": NAMES}
    return quiet(LatentFlowPipeline(vae or tiny_vae(), network, **components))


@pytest.fixture(params=NETWORKS)
def pipe(request: pytest.FixtureRequest) -> LatentFlowPipeline:
    return tiny_pipe(NETWORKS[request.param]())


def draw(pipe: LatentFlowPipeline, images: Tensor) -> dict[str, Tensor]:
    """Return what every pipeline with the components of ``pipe`` draws; they are offloaded as these are."""
    first, second = ({"prompt": "a red apple"}, {"prompt": "green tree"}) if pipe.takes_text else (
        {"class_labels": "apple"}, {"class_labels": "tree"},
    )  # fmt: skip
    ends = {name: [value, second[name]] for name, value in first.items()}
    mask = torch.zeros(images.shape[2:])
    mask[2:6, 2:6] = 1.0
    few = {"num_inference_steps": 2, "output_type": "pt"}
    made = {"generate": pipe(**first, generator=seeds(0), **few).images}
    for kind in (LatentFlowImg2ImgPipeline, LatentFlowInpaintPipeline, LatentFlowEditPipeline):
        other = quiet(kind.from_pipe(pipe))
        masked = {"mask_image": mask} if kind is LatentFlowInpaintPipeline else {}
        made[kind.__name__] = other(**second, image=images, generator=seeds(0), **masked, **few).images
    made["invert"] = other.invert(images, **first, num_inference_steps=2).latents
    made["interpolate"] = other.interpolate(**ends, frames=3, generator=seeds(0), **few).images
    made["to_images"] = pipe.to_images(torch.ones(1, 2, 4, 4), "pt")
    return made


def sequential(pipe: LatentFlowPipeline, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    # diffusers makes "cpu" into "cpu:0", on which accelerate's own parameters are no longer parameters.
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, device, **options: cpu_offload(model, CPU, **options))
    pipe.enable_sequential_cpu_offload(device="cpu")
    for component in (pipe.transformer, pipe.vae, pipe.text_encoder or pipe.vae):
        assert {weight.device.type for weight in component.parameters()} == {"meta"}


def by_model(pipe: LatentFlowPipeline, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def by_group(**options: Any) -> Callable[..., None]:
    """Return group offloading in which an offloaded weight, which stays on the CPU here, is not a number."""

    def offload(pipe: LatentFlowPipeline, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        away: dict[Tensor, Tensor] = {}

        def tensors(group: ModuleGroup) -> list[Tensor]:
            inside = [tensor for module in group.modules for tensor in (*module.parameters(), *module.buffers())]
            return [*inside, *group.parameters, *group.buffers]

        def leave(group: ModuleGroup) -> None:
            for tensor in tensors(group):
                if tensor not in away and tensor.is_floating_point():
                    away[tensor] = tensor.data
                    tensor.data = torch.full_like(tensor.data, math.nan)

        def come_back(group: ModuleGroup) -> None:
            for tensor in tensors(group):
                if tensor in away:
                    tensor.data = away.pop(tensor)

        monkeypatch.setattr(ModuleGroup, "offload_", leave)
        monkeypatch.setattr(ModuleGroup, "onload_", come_back)
        pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, **options)
        assert pipe.transformer.final_layer.linear.weight.isnan().all() if hasattr(pipe.transformer, "blocks") else True

    return offload


def to_disk(pipe: LatentFlowPipeline, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    options = {"offload_type": "leaf_level", "offload_to_disk_path": str(folder)}
    pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, **options)


MODES = {
    "sequential": sequential,
    "model": by_model,
    "groups of blocks": by_group(offload_type="block_level", num_blocks_per_group=1),
    "groups of leaves": by_group(offload_type="leaf_level"),
    "disk": to_disk,
}


@pytest.mark.parametrize("mode", MODES)
def test_offloaded_pipelines_draw_the_same_bits(
    mode: str, pipe: LatentFlowPipeline, images: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = draw(pipe, images())
    MODES[mode](pipe, monkeypatch, tmp_path)
    for call in ("first", "second"):
        for name, made in draw(pipe, images()).items():
            assert torch.equal(made, expected[name]), (name, call)
