"""Adapters of pretrained models: made by peft, saved by the stock classes, loaded by programs and pipelines."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from latentflow import LatentFlowPipeline
from latentflow.config import AdapterChoice
from latentflow.errors import UserError
from latentflow.web.inference_server import InferenceServer

from .test_family_programs import flags, size
from .test_pretrained import opened, seeded
from .tiny import checkpoint

pytestmark = pytest.mark.usefixtures("no_grad")

peft = pytest.importorskip("peft", reason="peft is not installed")
Program = Callable[[str], Any]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
#: pipeline -> the layers that its adapter changes
ADAPTED = {
    "StableDiffusion3Pipeline": [*ATTENTION, "add_q_proj"],
    "FluxPipeline": [*ATTENTION, "proj_mlp"],
    "QwenImagePipeline": ATTENTION,
    "ZImagePipeline": ATTENTION[:3],
    "StableDiffusionXLPipeline": ATTENTION,
}
each_adapted = pytest.mark.parametrize("name", ADAPTED)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make the folder of an adapter of a family, as the family's own class saves it; each seed is another."""
    root = tmp_path_factory.mktemp("adapters")

    def made(name: str, seed: int = 0) -> Path:
        folder = root / f"{name}-{seed}"
        if folder.exists():
            return folder
        pipe = deepcopy(checkpoint(name))
        part = "unet" if hasattr(pipe, "unet") else "transformer"
        network = getattr(pipe, part)
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=ADAPTED[name], init_lora_weights=False)
        network.add_adapter(config)
        generator = seeded(seed)
        for key, weight in network.named_parameters():
            if "lora_" in key:
                weight.copy_(torch.randn(weight.shape, generator=generator))
        layers = peft.get_peft_model_state_dict(network)
        type(pipe).save_lora_weights(
            folder,
            **{
                f"{part}_lora_layers": layers,
                f"{part}_lora_adapter_metadata": network.peft_config["default"].to_dict(),
            },
        )
        return folder

    return made


def over(name: str) -> Any:
    """Return a pipeline of ours over a checkpoint of its own, into which an adapter may be loaded."""
    pipe = LatentFlowPipeline(type(opened(name)[1])(deepcopy(checkpoint(name)), **opened(name)[2].call))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_images(name: str, *weighted: tuple[Path, float]) -> np.ndarray:
    """Return what the stock pipeline draws with these adapters, merged by its own loader; (H, W, 3) in 0..255."""
    pipe, side = deepcopy(checkpoint(name)), opened(name)[2].side
    for number, (folder, _) in enumerate(weighted):
        pipe.load_lora_weights(folder, adapter_name=str(number))
    if weighted:
        pipe.set_adapters(
            [str(number) for number in range(len(weighted))], [weight for _, weight in weighted]
        )
    model = type(opened(name)[1])(pipe, **opened(name)[2].call)
    scale = {"true_cfg_scale": 1.0} if name == "QwenImagePipeline" else {}
    if not scale:
        scale = {"guidance_scale": model.usual_guidance}
    call = {**opened(name)[2].call, **scale, "height": side, "width": side, "num_inference_steps": 2}
    return np.array(pipe("red apple", generator=seeded(), **call).images[0]).astype(int)


@each_adapted
def test_the_program_draws_what_the_stock_pipeline_does(
    name: str,
    adapters: Callable[..., Path],
    folders: Callable[[str], Path],
    load_program: Program,
    tmp_path: Path,
) -> None:
    """With one adapter at a weight, and with two; by --lora."""
    first, second = adapters(name), adapters(name, 1)
    cases = [[(first, 0.5)], [(first, 0.5), (second, -0.25)]]
    guidance = "1" if name == "QwenImagePipeline" else f"{opened(name)[1].usual_guidance:g}"
    plain = stock_images(name)
    for case in cases:
        lora = [text for folder, weight in case for text in ("--lora", f"{folder}={weight}")]
        line = ["red apple", *size(name), *flags(name, folders(name)), *lora, "--guidance", guidance]
        load_program("generate").main([*line, "--overwrite", "-o", str(tmp_path / "out.png")])
        drawn = np.array(Image.open(tmp_path / "out.png")).astype(int)
        expected = stock_images(name, *case)
        diffusion = name == "StableDiffusionXLPipeline"  # which ends with a rest of noise in its own pipeline
        assert np.abs(drawn - expected).max() <= (12 if diffusion else 1)
        assert np.abs(plain - expected).max() > 15


@each_adapted
def test_our_pipelines_load_adapters(name: str, adapters: Callable[..., Path]) -> None:
    """By the name that diffusers' pipelines have for it; taken out, everything is as before."""
    side, pipe = opened(name)[2].side, over(name)
    few: dict[str, Any] = {
        "height": side, "width": side, "num_inference_steps": 2, "output_type": "latent",
    }  # fmt: skip

    def drawn() -> torch.Tensor:
        return pipe("red apple", generator=seeded(), **few).images

    base = drawn()
    pipe.load_lora_weights(adapters(name), adapter_name="one")
    full = drawn()
    pipe.set_adapters(["one"], [0.5])
    half = drawn()
    pipe.load_lora_weights(load_file(next(adapters(name, 1).iterdir())))
    pipe.set_adapters(["one"], [1.0])
    torch.testing.assert_close(drawn(), full, rtol=1e-5, atol=1e-5)
    assert (full - base).abs().max() > 0.01 and (half - base).abs().max() > 0.001
    assert not torch.allclose(full, half)
    pipe.unload_lora_weights()
    torch.testing.assert_close(drawn(), base, rtol=1e-5, atol=1e-5)


@each_adapted
@pytest.mark.parametrize("other", ADAPTED)
def test_the_adapter_of_another_family_is_refused(
    name: str, other: str, adapters: Callable[..., Path]
) -> None:
    if name == other:
        return
    pipe = over(name)
    with pytest.raises(UserError, match=f"trained for this model, a {name}") as caught:
        pipe.load_lora_weights(adapters(other))
    assert not any(pipe.get_list_adapters().values())
    if other == "FluxPipeline":
        assert "looks like one for FLUX" in caught.value.fix


def test_files_without_a_layer_of_the_model(adapters: Callable[..., Path], tmp_path: Path) -> None:
    pipe = over("FluxPipeline")
    factors = {"foo.lora_A.weight": torch.zeros(2, 3), "foo.lora_B.weight": torch.zeros(3, 2)}
    for tensors in ({}, factors):
        save_file(tensors, tmp_path / "other.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=r"other\.safetensors"):
            pipe.load_lora_weights(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"the adapter .*nowhere"):
        pipe.load_lora_weights(tmp_path / "nowhere")


def test_layers_without_a_place_are_reported(
    adapters: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = "FluxPipeline"
    tensors = load_file(next(adapters(name).iterdir()))
    tensors |= {
        "transformer.nowhere.lora_A.weight": torch.zeros(2, 32),
        "transformer.nowhere.lora_B.weight": torch.zeros(32, 2),
    }
    save_file(tensors, tmp_path / "more.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING, logger="latentflow"):
        over(name).load_lora_weights(tmp_path / "more.safetensors")
        assert "lack of a place in this FluxPipeline: 1 layer of the adapter" in caplog.text
        caplog.clear()
        over(name).load_lora_weights(adapters(name))
        assert not caplog.text


def test_an_adapter_that_is_damaged(adapters: Callable[..., Path], tmp_path: Path) -> None:
    tensors = load_file(next(adapters("FluxPipeline").iterdir()))
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, tmp_path / "nan.safetensors", {"format": "pt"})
    pipe = over("FluxPipeline")
    with pytest.raises(UserError, match=r"nan\.safetensors is not finite in transformer\."):
        pipe.load_lora_weights(tmp_path / "nan.safetensors")
    assert not any(pipe.get_list_adapters().values())


def test_the_dropout_of_a_file_is_not_applied_to_images(tmp_path: Path) -> None:
    """Training programs write it among the settings, and diffusers loads it in training mode."""
    pipe = deepcopy(checkpoint("FluxPipeline"))
    config = peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=ATTENTION, init_lora_weights=False)
    pipe.transformer.add_adapter(config)
    pipe.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    ours = over("FluxPipeline")
    ours.load_lora_weights(tmp_path)
    few: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}
    images = [ours("red apple", generator=seeded(), **few).images for _ in range(2)]
    assert torch.equal(*images)


def with_text_encoder(folder: Path, to: Path) -> Path:
    """Write the adapter of a folder with a layer of the first text encoder added."""
    tensors = load_file(next(folder.iterdir()))
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    width = checkpoint("StableDiffusionXLPipeline").text_encoder.config.hidden_size
    tensors |= {
        f"{layer}.lora_A.weight": torch.ones(2, width),
        f"{layer}.lora_B.weight": torch.ones(width, 2),
    }
    save_file(tensors, to, {"format": "pt"})
    return to


def test_layers_of_text_encoders_that_were_dropped_are_left_out(
    adapters: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The rest is loaded, and draws what the adapter without them does."""
    name = "StableDiffusionXLPipeline"
    file = with_text_encoder(adapters(name), tmp_path / "both.safetensors")
    few: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}
    images = []
    for source in (load_file(next(adapters(name).iterdir())), file):
        pipe = over(name)
        rows = pipe.model.encode_prompt(["red apple"])
        pipe.model.drop_text_encoders()
        base = pipe(prompt_embeds=rows, generator=seeded(), **few).images
        with caplog.at_level(logging.WARNING, logger="latentflow"):
            pipe.load_lora_weights(source)
        images.append(pipe(prompt_embeds=rows, generator=seeded(), **few).images)
    assert torch.equal(*images) and (images[0] - base).abs().max() > 0.01
    assert caplog.messages == [
        f"left out, as the pipeline has no text_encoder: 1 layer of the adapter {file}"
    ]


def test_an_adapter_that_fails_midway_is_taken_out(
    adapters: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader changes one component after the other: an error in the second leaves nothing of the first."""
    name = "StableDiffusionXLPipeline"
    file = with_text_encoder(adapters(name), tmp_path / "both.safetensors")
    few: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}
    pipe = over(name)
    kept = with_text_encoder(adapters(name, 1), tmp_path / "kept.safetensors")
    for number, source in ((1, kept), (2, adapters(name, 2))):
        pipe.load_lora_weights(source, adapter_name=f"kept-{number}")
    pipe.set_adapters(["kept-1", "kept-2"], [0.5, 0.25])
    before = pipe("red apple", generator=seeded(), **few).images

    for error, raised in ((ValueError("no such layer"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)):
        monkeypatch.setattr(type(pipe.text_encoder), "load_adapter", Mock(side_effect=error))
        with pytest.raises(raised):
            pipe.load_lora_weights(file, adapter_name="new")
        assert pipe.get_list_adapters() == {"unet": ["kept-1", "kept-2"], "text_encoder": ["kept-1"]}
        assert pipe.get_active_adapters() == ["kept-1", "kept-2"]
        assert torch.equal(pipe("red apple", generator=seeded(), **few).images, before)


def test_a_name_that_is_taken_is_refused(adapters: Callable[..., Path]) -> None:
    pipe = over("FluxPipeline")
    pipe.load_lora_weights(adapters("FluxPipeline"), adapter_name="one")
    with pytest.raises(UserError, match=r"named 'one' is loaded already\nChoose another name"):
        pipe.load_lora_weights(adapters("FluxPipeline", 1), adapter_name="one")
    with pytest.raises(UserError, match=r'hotswap overwrites.*\npipe.delete_adapters\("one"\), then'):
        pipe.load_lora_weights(adapters("FluxPipeline", 1), adapter_name="one", hotswap=True)
    assert pipe.get_list_adapters() == {"transformer": ["one"]}
    pipe.delete_adapters("one")
    pipe.load_lora_weights(adapters("FluxPipeline", 1), adapter_name="one", hotswap=False)
    assert pipe.get_list_adapters() == {"transformer": ["one"]}


def test_the_page_holds_one_pretrained_model(
    adapters: Callable[..., Path], folders: Callable[[str], Path]
) -> None:
    """With other adapters it is opened anew, and the one before is let go of: two may not fit into memory."""
    name = "StableDiffusion3Pipeline"
    server = InferenceServer(str(folders(name)), "cpu", AdapterChoice())
    first = weakref.ref(server.open(AdapterChoice()))
    server.open(AdapterChoice(lora=(f"{adapters(name)}=0.5",)))
    gc.collect()
    assert first() is None
