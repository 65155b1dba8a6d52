"""Weights that are elsewhere while they are not needed: every pipeline draws what it draws with them in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import accelerate
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import PipelineQuantizationConfig
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor, nn

from latentflow.autoencoder import encode, mask_channels
from latentflow.errors import UserError
from latentflow.models import UNet, encode_text
from latentflow.pipeline import LatentFlowPipeline
from latentflow.pipeline.edit import LatentFlowEditPipeline
from latentflow.pipeline.img2img import LatentFlowImg2ImgPipeline
from latentflow.pipeline.inpaint import LatentFlowInpaintPipeline
from latentflow.utils.placement import execution_device

from .adapters import make_adapter
from .conftest import NAMES, awake, close, quiet, seeds, tiny_dit, tiny_text, tiny_vae

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
    return awake(
        UNet(in_channels=2, channels=(8, 16), head_dim=8, layers_per_block=1, sample_size=4, **config)
    )


def tiny_pipe(network: nn.Module, vae: Any = None) -> LatentFlowPipeline:
    components = tiny_text() if network.config.text_dim is not None else {"id2label": NAMES}
    return quiet(LatentFlowPipeline(vae or tiny_vae(), network, **components))


@pytest.fixture(params=NETWORKS)
def pipe(request: pytest.FixtureRequest) -> LatentFlowPipeline:
    return tiny_pipe(NETWORKS[request.param]())


def generate(pipe: LatentFlowPipeline) -> Tensor:
    condition = {"prompt": "a red apple"} if pipe.takes_text else {"class_labels": "apple"}
    few = {"num_inference_steps": 2, "solver": "euler", "output_type": "pt"}
    return pipe(**condition, generator=seeds(0), **few).images


def draw(pipe: LatentFlowPipeline, images: Tensor) -> dict[str, Tensor]:
    """Return what every pipeline with the components of ``pipe`` draws; they are offloaded as these are."""
    name, first, second = (
        ("prompt", "a red apple", "green tree") if pipe.takes_text else ("class_labels", "apple", "tree")
    )
    mask = torch.zeros(images.shape[2:])
    mask[2:6, 2:6] = 1.0
    few = {name: second, "generator": seeds(0), "num_inference_steps": 2, "output_type": "pt"}
    image_to_image, inpaint, edit = (
        quiet(kind.from_pipe(pipe))
        for kind in (LatentFlowImg2ImgPipeline, LatentFlowInpaintPipeline, LatentFlowEditPipeline)
    )
    euler = {"num_inference_steps": 2, "solver": "euler"}
    return {
        "generate": generate(pipe),
        "image-to-image": image_to_image(image=images, solver="euler", **few).images,
        "inpaint": inpaint(image=images, mask_image=mask, **few | {"generator": seeds(0)}).images,
        "edit": edit(image=images, **few | {"generator": seeds(0)}).images,
        "invert": edit.invert(images, **{name: first}, **euler).latents,
        "interpolate": edit.interpolate(
            **{name: [first, second]}, frames=3, generator=seeds(0), output_type="pt", **euler
        ).images,
        "to_images": pipe.to_images(torch.ones(1, 2, 4, 4), "pt"),
    }


def sequential(pipe: LatentFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    # diffusers makes "cpu" into "cpu:0", on which accelerate's own parameters are no longer parameters.
    monkeypatch.setattr(
        accelerate, "cpu_offload", lambda model, device, **options: cpu_offload(model, CPU, **options)
    )
    pipe.enable_sequential_cpu_offload(device="cpu")
    for component in (pipe.transformer, pipe.vae, pipe.text_encoder or pipe.vae):
        assert {weight.device.type for weight in component.parameters()} == {"meta"}


def by_model(pipe: LatentFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def by_group(**options: Any) -> Callable[..., None]:
    """Return group offloading in which an offloaded weight, which stays on the CPU here, is not a number."""

    def offload(pipe: LatentFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        away: dict[Tensor, Tensor] = {}

        def tensors(group: ModuleGroup) -> list[Tensor]:
            inside = [
                tensor for module in group.modules for tensor in (*module.parameters(), *module.buffers())
            ]
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
        assert next(pipe.transformer.parameters()).isnan().all()

    return offload


MODES = {
    "sequential": sequential,
    "model": by_model,
    "groups of blocks": by_group(offload_type="block_level", num_blocks_per_group=1),
    "groups of leaves": by_group(offload_type="leaf_level"),
}


@pytest.mark.parametrize("mode", MODES)
def test_offloaded_pipelines_draw_the_same_bits(
    mode: str, pipe: LatentFlowPipeline, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = draw(pipe, images())
    MODES[mode](pipe, monkeypatch)
    for name, made in draw(pipe, images()).items():
        assert torch.equal(made, expected[name]), name
    assert torch.equal(generate(pipe), expected["generate"])  # also after all of these


@pytest.mark.parametrize("level", [{"offload_type": "leaf_level"}, {"num_blocks_per_group": 1}], ids=str)
def test_weights_on_the_disk(
    level: dict[str, Any], pipe: LatentFlowPipeline, images: Any, tmp_path: Path
) -> None:
    expected = draw(pipe, images())
    # diffusers loses weights that two modules share, as those of T5's words.
    disk = {"offload_to_disk_path": str(tmp_path), "exclude_modules": "text_encoder"}
    pipe.enable_group_offload(CPU, **level, **disk)
    assert [*tmp_path.glob("*.safetensors")]
    for name, made in draw(pipe, images()).items():  # weights at other places in memory may round otherwise
        close(made, expected[name], 1e-4)


def test_a_block_of_diffusers_u_net_is_a_group_of_its_own() -> None:
    network = tiny_unet(num_classes=3)
    network.enable_group_offload(CPU, num_blocks_per_group=1)
    offloaded = {part for part, module in network.unet.named_modules() if hasattr(module, "_diffusers_hook")}
    assert {"down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1"} <= offloaded


def test_a_callback_previews_while_weights_are_away(images: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, seen = tiny_pipe(NETWORKS["DiT of captions"]()), []

    def preview(pipe: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> None:
        seen.append(pipe.to_images(tensors["prediction"], "pt"))

    def call() -> list[Tensor]:
        seen.clear()
        options = {"callback_on_step_end": preview, "callback_on_step_end_tensor_inputs": ["prediction"]}
        pipe("a red apple", generator=seeds(0), num_inference_steps=2, **options)
        return [*seen]

    expected = call()
    sequential(pipe, monkeypatch)
    assert len(expected) == 2 and all(map(torch.equal, call(), expected))


# ---------------------------------------------------------------- the device that computes

META = torch.device("meta")  # stands for an accelerator where weights compute there, else for where they wait


def leaf_by_leaf(module: nn.Module) -> torch.device:
    cpu_offload(module, META)
    return META


def as_a_whole(module: nn.Module) -> torch.device:
    cpu_offload_with_hook(module, META)
    return META


def in_groups(module: nn.Module) -> torch.device:
    with mock.patch.object(ModuleGroup, "offload_"):  # which does not know "meta"
        apply_group_offloading(module, CPU, META, offload_type="leaf_level")
    nn.Module.to(module, META)
    return CPU


@pytest.mark.parametrize("offload", [leaf_by_leaf, as_a_whole, in_groups])
def test_inputs_go_where_an_offloaded_component_computes(
    offload: Callable[[nn.Module], torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, vae, given = tiny_text(), tiny_vae(), {}
    for module in (text["text_encoder"], vae):
        assert execution_device(module) == CPU
        device = offload(module)
        assert execution_device(module) == device

    def forward(name: str) -> Callable[..., Any]:
        def called(*values: Tensor, **tensors: Any) -> Any:
            given[name] = {
                value.device for value in (*values, *tensors.values()) if isinstance(value, Tensor)
            }
            return SimpleNamespace(last_hidden_state=torch.zeros(1, 4, 16), latents=torch.zeros(1, 2, 4, 4))

        return called

    monkeypatch.setattr(text["text_encoder"], "forward", forward("text"))
    monkeypatch.setattr(vae, "encode", forward("encode"))
    encode_text(text["tokenizer"], text["text_encoder"], ["a red apple"])
    encode(vae, torch.zeros(1, 3, 8, 8))
    assert given == {"text": {device}, "encode": {device}}


@pytest.mark.parametrize("name", ["DiT of captions", "U-Net of captions"])
def test_a_network_split_between_memory_and_disk(name: str, images: Any, tmp_path: Path) -> None:
    whole = NETWORKS[name]()
    whole.save_pretrained(tmp_path / "network")
    size = sum(weight.nbytes for weight in whole.parameters())
    options = {
        "device_map": "auto",
        "max_memory": {"cpu": size // 2},
        "offload_folder": str(tmp_path / "disk"),
    }
    split = type(whole).from_pretrained(tmp_path / "network", **options)
    assert "disk" in split.hf_device_map.values()
    expected = draw(tiny_pipe(whole), images())
    for way, made in draw(tiny_pipe(split), images()).items():
        close(made, expected[way], 1e-4)


def test_a_pipeline_whose_components_diffusers_places(dit_folder: Path) -> None:
    def drawn(**options: Any) -> Tensor:
        pipe = quiet(LatentFlowPipeline.from_pretrained(dit_folder, **options))
        return pipe("a red apple", generator=seeds(0), num_inference_steps=2, output_type="pt").images

    expected = drawn()
    for options in ({"device_map": "cpu"}, {"device_map": "balanced"}, {"low_cpu_mem_usage": False}):
        assert torch.equal(drawn(**options), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bitsandbytes does not refuse a GPU")
def test_a_library_that_does_not_quantise_here_is_no_damaged_file(dit_folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = PipelineQuantizationConfig("bitsandbytes_4bit", {"load_in_4bit": True}, "transformer")
    with pytest.raises(
        UserError, match="\nIf the files are whole, change quantization_config, or leave it out"
    ):
        LatentFlowPipeline.from_pretrained(dit_folder, quantization_config=config)


# ---------------------------------------------------------------- adapters


def weights_in_groups(pipe: LatentFlowPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.enable_group_offload(CPU, offload_type="leaf_level")


@pytest.mark.parametrize("offload", [sequential, by_model, weights_in_groups])
@pytest.mark.parametrize("first", ["adapter", "offload"])
def test_an_adapter_loads_before_and_after(
    first: str, offload: Any, dit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    make_adapter(dit_folder, tmp_path, words=["zebra"], lora_text_encoder=True, lora_layers=("all",))

    def drawn(pipe: LatentFlowPipeline) -> Tensor:
        call = pipe("a red zebra", generator=seeds(0), num_inference_steps=2, output_type="pt")
        return call.images

    plain, pipe = (quiet(LatentFlowPipeline.from_pretrained(dit_folder)) for _ in range(2))
    base = drawn(plain)
    plain.load_lora_weights(tmp_path)
    steps = [lambda: pipe.load_lora_weights(tmp_path), lambda: offload(pipe, monkeypatch)]
    for step in steps if first == "adapter" else reversed(steps):
        step()
    assert not torch.equal(drawn(plain), base)
    assert torch.equal(drawn(pipe), drawn(plain))
    if offload is weights_in_groups:
        layers = [*pipe.transformer.modules(), *pipe.text_encoder.modules()]
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        assert all(layer._diffusers_hook.get_hook("group_offloading") for layer in linear)
    pipe.unload_lora_weights()
    assert torch.equal(drawn(pipe), base)


@pytest.mark.parametrize("offload", [sequential, by_model, weights_in_groups])
@pytest.mark.parametrize("new", ["word", "class"])
def test_a_call_scales_new_words_and_classes(
    new: str, offload: Any, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    base = request.getfixturevalue("dit_folder" if new == "word" else "class_folder")
    added: dict[str, Any] = {"words": ["zebra"]} if new == "word" else {"classes": ["boat"]}
    make_adapter(base, tmp_path, **added)
    condition: dict[str, Any] = {"prompt": "a red zebra"} if new == "word" else {"class_labels": "boat"}
    plain, pipe = (quiet(LatentFlowPipeline.from_pretrained(base)) for _ in range(2))

    def drawn(of: LatentFlowPipeline, scale: float) -> Tensor:
        few: dict[str, Any] = {"generator": seeds(0), "num_inference_steps": 2, "output_type": "pt"}
        made: Tensor = of(**condition, attention_kwargs={"scale": scale}, **few).images
        return made

    for each in (plain, pipe):
        each.load_lora_weights(tmp_path)
    offload(pipe, monkeypatch)
    for scale in (0.5, 1.0, 0.0, 1.0):
        assert torch.equal(drawn(pipe, scale), drawn(plain, scale)), scale


def test_an_offloaded_pipeline_is_saved(
    dit_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = quiet(LatentFlowPipeline.from_pretrained(dit_folder))
    sequential(pipe, monkeypatch)
    pipe.save_pretrained(tmp_path)
    for file in dit_folder.rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / file.relative_to(dit_folder)).read_bytes()
    assert {weight.device for weight in pipe.transformer.parameters()} == {META}
