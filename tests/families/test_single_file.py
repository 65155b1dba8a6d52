"""Pretrained models in one file: they draw what their folder does, and any other file is named for what it is."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from latentflow import FlowModel, LatentFlowInpaintPipeline, LatentFlowPipeline
from latentflow.config import AdapterChoice
from latentflow.errors import UserError
from latentflow.families.single_file import recognised
from latentflow.pipeline.over_model import ModelPipeline
from latentflow.web.inference_server import InferenceServer

from . import single_files as layouts
from .parts import kl
from .test_original import original_weights
from .test_pretrained import opened, seeded
from .tiny import TINY, checkpoint

Program = Callable[[str], Any]
PROMPT = "a red apple"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Save a tiny checkpoint's pipeline folder, once."""
    root = tmp_path_factory.mktemp("single")

    def saved(name: str) -> Path:
        if not (root / name).exists():
            checkpoint(name).save_pretrained(root / name)
        return root / name

    return saved


def weights_of(name: str) -> dict[str, torch.Tensor]:
    """Return a tiny checkpoint as it would be published in one file."""
    pipe = checkpoint(name)
    kind = name.partition("-")[0]
    if kind == "StableDiffusionPipeline":
        encoder = {"cond_stage_model__transformer__": layouts.clip(pipe.text_encoder)}
        return layouts.whole(pipe, layouts.unet(pipe.unet), **encoder)
    if kind == "StableDiffusionXLPipeline":  # its text encoders come from the folder
        return layouts.whole(pipe, layouts.unet(pipe.unet))
    if kind == "StableDiffusion3Pipeline":
        encoder = {"text_encoders__t5xxl__transformer__": pipe.text_encoder_3.state_dict()}
        del encoder["text_encoders__t5xxl__transformer__"]["encoder.embed_tokens.weight"]  # which is tied
        return layouts.whole(pipe, layouts.sd3(pipe.transformer), **encoder)
    if kind == "ZImagePipeline":
        return layouts.z_image(pipe.transformer)
    return dict(pipe.transformer.state_dict())  # diffusers' own names, the only ones of Qwen-Image


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("files")

    def written(name: str) -> Path:
        file = root / f"{name}.safetensors"
        return file if file.exists() else layouts.write(weights_of(name), file)

    return written


def image(pipe: Any, name: str) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    side = opened(name)[2].side
    drawn: torch.Tensor = pipe(
        PROMPT, height=side, width=side, num_inference_steps=2, generator=seeded(), output_type="pt"
    ).images
    return drawn


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline-dev",
        "ChromaPipeline", "Flux2KleinPipeline", "QwenImagePipeline", "ZImagePipeline", "SanaPipeline",
        "Lumina2Pipeline",
    ],
)  # fmt: skip
def test_it_draws_what_its_folder_does(
    name: str, files: Callable[[str], Path], folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """Whole checkpoints and networks alone, in their authors' names and in diffusers'."""
    options = {"family_options": TINY[name].call} if TINY[name].call else {}
    folder = folders(name)
    pipe = LatentFlowPipeline.from_single_file(files(name), folder, **options)
    assert isinstance(pipe, ModelPipeline)
    expected = image(LatentFlowPipeline.from_pretrained(folder, **options), name)
    assert expected.std() > 0.05
    torch.testing.assert_close(image(pipe, name), expected, rtol=0.0, atol=1e-6)
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    with torch.no_grad():
        for weight in getattr(pipe, part).parameters():
            weight.mul_(0.9)
    assert not torch.allclose(image(pipe, name), expected, atol=1e-3), "the network comes from the file"


def test_the_precision_that_is_asked_for(
    files: Callable[[str], Path], folders: Callable[[str], Path]
) -> None:
    for name in ("FluxPipeline", "StableDiffusionPipeline"):
        model = FlowModel.from_single_file(files(name), folders(name), dtype=torch.bfloat16)
        assert {model.network.dtype, model.vae.dtype, model.pipeline.text_encoder.dtype} == {torch.bfloat16}


def test_stable_diffusion_3_without_t5(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """Neither the file nor the folder has it: prompts are encoded without, as the stock pipeline does."""
    name, pipe = "StableDiffusion3Pipeline", checkpoint("StableDiffusion3Pipeline")
    file = layouts.write(layouts.whole(pipe, layouts.sd3(pipe.transformer)), tmp_path / "sd3.safetensors")
    folder = tmp_path / "sd3"
    pipe.save_pretrained(folder)
    (folder / "text_encoder_3" / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="no third text encoder"):
        model = FlowModel.from_single_file(file, folder)
    assert model.pipeline.text_encoder_3 is None and image(LatentFlowPipeline(model), name).isfinite().all()
    (folder / "text_encoder" / "model.safetensors").unlink()
    with (
        pytest.warns(UserWarning, match="no third text encoder"),
        pytest.raises(UserError, match=r"text_encoder|CLIPTextModelWithProjection"),
    ):
        FlowModel.from_single_file(file, folder)


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")
def test_a_quantised_network_in_gguf(
    folders: Callable[[str], Path], tmp_path: Path, load_program: Program
) -> None:
    """In 8 bits it draws nearly what its folder does, and the program takes it."""
    name = "FluxPipeline"
    file = layouts.gguf(checkpoint(name).transformer, tmp_path / "flux-Q8_0.gguf")
    options: dict[str, Any] = {"family_options": TINY[name].call}
    model = FlowModel.from_single_file(file, folders(name), dtype=torch.float32, **options)
    expected = image(LatentFlowPipeline.from_pretrained(folders(name), **options), name)
    drawn = image(LatentFlowPipeline(model), name)
    assert 0.0 < (drawn - expected).abs().max() < 0.1
    line = [PROMPT, "--checkpoint", str(file), "--steps", "2", "--height", "16", "--width", "16"]
    line += ["--family-options", "max_sequence_length=32", "-o", str(tmp_path / "out.png")]
    load_program("generate").main([*line, "--checkpoint-config", str(folders(name))])
    assert Image.open(tmp_path / "out.png").size == (16, 16)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(UserError, match="truncated or damaged"):
        load_program("generate").main(line)


def test_gguf_that_is_not_installed(
    tmp_path: Path, load_program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "flux.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"GGUF files need gguf(.|\n)*pip install"):
        load_program("generate").main([PROMPT, "--checkpoint", str(tmp_path / "flux.gguf")])


def test_the_programs(
    files: Callable[[str], Path],
    folders: Callable[[str], Path],
    load_program: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "StableDiffusion3Pipeline"
    file, config = str(files(name)), ["--checkpoint-config", str(folders(name))]
    common = ["--checkpoint", file, *config, "--steps", "2"]
    load_program("generate").main([PROMPT, "--height", "16", "--width", "16", "-o", "a.png", *common])
    folder = ["--checkpoint", str(folders(name)), "--steps", "2"]
    load_program("generate").main([PROMPT, "--height", "16", "--width", "16", "-o", "b.png", *folder])
    assert np.array_equal(np.array(Image.open("a.png")), np.array(Image.open("b.png")))
    mask = np.zeros((16, 16), np.uint8)
    mask[2:9, 3:10] = 255
    Image.fromarray(mask).save("mask.png")
    load_program("inpaint").main(["a.png", "mask.png", "green hat", "-o", "filled.png", *common])
    load_program("edit").main(["a.png", "green hat", "--from", PROMPT, "-o", "edited.png", *common])
    load_program("interpolate").main([PROMPT, "green hat", "--frames", "2", "-o", "way.png", *common])
    assert all(Path(made).exists() for made in ("filled.png", "edited.png", "way-1.png"))
    server = InferenceServer(file, "cpu", AdapterChoice(checkpoint_config=str(folders(name))))
    assert server.name == name and server.capabilities.text


def test_original_weights_are_opened_with_an_autoencoder(tmp_path: Path, load_program: Program) -> None:
    vae, file = tmp_path / "vae", tmp_path / "sit.pt"
    kl(shift=None).save_pretrained(vae)
    weights = original_weights("sit", 64, 2, 1)
    torch.save(weights, file)
    save_file(weights, tmp_path / "sit.safetensors")
    load_program("import").main([str(file), "--vae", str(vae), "-o", str(tmp_path / "imported")])
    rows_of = [
        FlowModel.from_pretrained(tmp_path / "imported"),
        FlowModel.from_single_file(file, vae=vae),
        FlowModel.from_single_file(tmp_path / "sit.safetensors", vae=vae),
        LatentFlowInpaintPipeline.from_single_file(file, vae=vae).model,
    ]
    x, t = torch.randn(1, 4, 32, 32, generator=seeded()), torch.tensor(0.3)
    with torch.no_grad():
        velocities = [model.velocity(model.encode_class(["goldfish"]), 2.0)(x, t) for model in rows_of]
    assert all(torch.equal(velocity, velocities[0]) for velocity in velocities)
    with pytest.raises(UserError, match=r"take no dtype"):
        FlowModel.from_single_file(file, vae=vae, dtype=torch.float32)
    for given in (file, tmp_path / "sit.safetensors"):
        with pytest.raises(UserError, match=r"latentflow import .* --vae"):
            FlowModel.from_single_file(given)
        with pytest.raises(UserError, match=r"latentflow import .* --vae"):
            load_program("generate").main(["--class", "goldfish", "--checkpoint", str(given)])


# ---------------------------------------------------------------- recognition


@pytest.mark.parametrize(
    ("weights", "hub_id"),
    [
        ({"model.diffusion_model.output_blocks.11.0.skip_connection.weight": (4,)}, "stable-diffusion-v1-5"),
        ({"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (4,)}, "stable-diffusion-xl-base"),
        ({"double_blocks.0.img_attn.norm.key_norm.scale": (4,)}, "FLUX.1-schnell"),
        ({"layers.0.adaLN_modulation.0.weight": (4,)}, "Z-Image-Turbo"),
    ],
)  # fmt: skip
def test_the_pipeline_that_is_wanted_is_named(
    weights: dict[str, tuple[int, ...]],
    hub_id: str,
    monkeypatch: pytest.MonkeyPatch,
    load_program: Program,
    tmp_path: Path,
) -> None:
    """Without a configuration, and where the hub cannot be asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in weights.items()}, file)
    with pytest.raises(UserError, match=rf"{hub_id}(.|\n)*--checkpoint-config FOLDER"):
        recognised(file, weights)
    with pytest.raises(UserError, match=rf"{hub_id}(.|\n)*--checkpoint-config FOLDER"):
        load_program("generate").main([PROMPT, "--checkpoint", str(file)])


def test_what_diffusers_does_not_know(files: Callable[[str], Path], load_program: Program) -> None:
    with pytest.raises(UserError, match=r"does not say of which model(.|\n)*--checkpoint-config"):
        load_program("generate").main([PROMPT, "--checkpoint", str(files("QwenImagePipeline"))])


# ---------------------------------------------------------------- other files


def parts() -> dict[str, tuple[dict[str, torch.Tensor], str]]:
    """Return name -> weights, and what is said of a file of them."""
    zero = torch.zeros(2)
    sd = checkpoint("StableDiffusionPipeline")
    return {
        "lora": (
            {"transformer.blocks.0.attn.to_q.lora_A.weight": zero},
            r"adapter \(LoRA\)(.|\n)*--lora FILE",
        ),
        "kohya": ({"lora_unet_down_blocks_0.lora_down.weight": zero}, r"adapter \(LoRA\)(.|\n)*--lora FILE"),
        "vae": (dict(sd.vae.state_dict()), r"an autoencoder(.|\n)*--vae"),
        "ldm-vae": (
            layouts.prefixed(layouts.vae(sd.vae), "first_stage_model."),
            r"an autoencoder(.|\n)*--vae",
        ),
        "controlnet": ({"controlnet_cond_embedding.conv_in.weight": zero}, "a ControlNet"),
        "clip": (layouts.clip(sd.text_encoder), "a text encoder"),
        "t5": (checkpoint("FluxPipeline").text_encoder_2.state_dict(), "a text encoder"),
        "model-00001-of-00003": ({"blocks.0.weight": zero}, "one of several shards"),
    }


@pytest.mark.parametrize("kind", list(parts()))
def test_parts_are_named(
    kind: str, folders: Callable[[str], Path], load_program: Program, tmp_path: Path
) -> None:
    weights, said = parts()[kind]
    file = layouts.write(weights, tmp_path / f"{kind}.safetensors")
    for config in ([], ["--checkpoint-config", str(folders("FluxPipeline"))]):
        with pytest.raises(UserError, match=said):
            load_program("generate").main([PROMPT, "--checkpoint", str(file), *config])
    with pytest.raises(UserError, match=said):
        FlowModel.from_single_file(file)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>not found</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"PK\x03\x04" + bytes(300), "pickled weights"),
        (b"hello, this is a text of some length", "is no file of weights"),
        (None, "truncated or damaged"),
    ],
)
def test_damaged_files_are_named(
    content: bytes | None, said: str, files: Callable[[str], Path], load_program: Program, tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(files("FluxPipeline").read_bytes()[:-100] if content is None else content)
    with pytest.raises(UserError, match=said):
        load_program("generate").main([PROMPT, "--checkpoint", str(file)])


def test_nothing_is_unpickled(tmp_path: Path, load_program: Program) -> None:
    """Weights of another model, and a pickle that would run code."""
    torch.save({"state_dict": {"model.diffusion_model.out.2.bias": torch.zeros(4)}}, tmp_path / "v1-5.ckpt")
    kl(shift=None).save_pretrained(tmp_path / "vae")
    for given in ({}, {"config": tmp_path}):
        with pytest.raises(UserError, match=r"pickled weights(.|\n)*\.safetensors"):
            FlowModel.from_single_file(tmp_path / "v1-5.ckpt", **given)
    with pytest.raises(UserError, match=r"pickled weights(.|\n)*\.safetensors"):
        load_program("generate").main([PROMPT, "--checkpoint", str(tmp_path / "v1-5.ckpt")])
    with pytest.raises(UserError, match="weights of another network"):
        FlowModel.from_single_file(tmp_path / "v1-5.ckpt", vae=tmp_path / "vae")


def test_files_that_do_not_fit(
    files: Callable[[str], Path], folders: Callable[[str], Path], load_program: Program, tmp_path: Path
) -> None:
    flux, qwen = folders("FluxPipeline"), folders("QwenImagePipeline")
    with pytest.raises(UserError, match=r"lacks weights that its pipeline"):
        FlowModel.from_single_file(files("FluxPipeline"), qwen)
    more = {**load_file(files("QwenImagePipeline")), "transformer_blocks.7.attn.to_q.weight": torch.zeros(2)}
    file = layouts.write(more, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match=r"no place for weights: transformer_blocks\.7\.attn\.to_q\.weight"):
        FlowModel.from_single_file(file, qwen)
    fewer = load_file(files("QwenImagePipeline"))
    del fewer["proj_out.weight"]
    file = layouts.write(fewer, tmp_path / "fewer.safetensors")
    with pytest.raises(UserError, match=r"lacks weights that its pipeline's network has"):
        FlowModel.from_single_file(file, qwen)
    with pytest.raises(UserError, match=r"component, 'transformer'(.|\n)*Give the pipeline folder"):
        load_program("generate").main(
            [PROMPT, "--checkpoint", str(flux / "transformer" / "diffusion_pytorch_model.safetensors")]
        )
    with pytest.raises(UserError, match=r"which has no family(.|\n)*"):
        index = tmp_path / "video" / "model_index.json"
        index.parent.mkdir()
        index.write_text(json.dumps({"_class_name": "WanPipeline"}))
        FlowModel.from_single_file(files("QwenImagePipeline"), index.parent)


def test_flags(files: Callable[[str], Path], folders: Callable[[str], Path], load_program: Program) -> None:
    run, file, folder = (
        load_program("generate").main,
        str(files("FluxPipeline")),
        str(folders("FluxPipeline")),
    )
    with pytest.raises(UserError, match=r"no file 'none.safetensors'"):
        run([PROMPT, "--checkpoint", "none.safetensors"])
    with pytest.raises(UserError, match=r"--checkpoint is no file"):
        run([PROMPT, "--checkpoint", folder, "--checkpoint-config", folder])
    with pytest.raises(UserError, match=r"no folder 'none'"):
        run([PROMPT, "--checkpoint", file, "--checkpoint-config", "./none"])
    with pytest.raises(UserError, match=r"--checkpoint-config FOLDER"):
        run([PROMPT, "--checkpoint", file, "--config", folder])
    with pytest.raises(UserError, match=r"from_single_file"):
        FlowModel.from_pretrained(file)
    with pytest.raises(UserError, match=r"from_single_file"):
        LatentFlowPipeline.from_pretrained(file)


def test_half_downloaded_folders(tmp_path: Path) -> None:
    """A truncated file, and a missing shard: the error names it."""
    pipe = checkpoint("FluxPipeline")
    pipe.save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(UserError, match=r"text_encoder/model\.safetensors"):
        FlowModel.from_pretrained(tmp_path / "cut")
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    lost = sorted((tmp_path / "shards" / "transformer").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(UserError, match=lost.name):
        FlowModel.from_pretrained(tmp_path / "shards")
