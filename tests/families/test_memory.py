"""Memory of pretrained models: precision, quantisation, offloading, dropped text encoders, memory that runs out."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import PipelineQuantizationConfig
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from latentflow import FlowModel, LatentFlowEditPipeline, LatentFlowInpaintPipeline, LatentFlowPipeline
from latentflow.config import MemoryConfig
from latentflow.errors import UserError
from latentflow.families import FAMILIES
from latentflow.inference.memory import check_memory_flags
from latentflow.utils.files import SHIPPED_CHECKPOINTS
from latentflow.utils.memory import OutOfMemory, memory_phase

from .test_pretrained import PROMPTS, opened, seeded
from .tiny import TINY, checkpoint

CPU = torch.device("cpu")
#: four that differ in layout: plain latents, packed ones, packed ones of videos, a U-Net
LAYOUTS = ("StableDiffusion3Pipeline", "FluxPipeline", "QwenImagePipeline", "StableDiffusionXLPipeline")
#: how much memory a tiny network may ask for before a fake says that there is none
CUDA_WORDS = "CUDA out of memory. Tried to allocate 20.00 MiB"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Save a tiny checkpoint once, in a precision and as a variant."""
    root = tmp_path_factory.mktemp("checkpoints")

    def saved(name: str, dtype: torch.dtype = torch.float32, variant: str | None = None) -> Path:
        folder = root / f"{name} {dtype} {variant}"
        if not folder.exists():
            pipe = checkpoint(name)
            if dtype != torch.float32:
                pipe = deepcopy(pipe).to(dtype)
            pipe.save_pretrained(folder, variant=variant)
        return folder

    return saved


def load(folder: Path, name: str, **options: Any) -> FlowModel:
    return FlowModel.from_pretrained(folder, family_options=dict(TINY[name].call), **options)


def precisions(model: FlowModel) -> dict[str, torch.dtype]:
    return {
        name: part.dtype for name, part in model.pipeline.components.items() if isinstance(part, nn.Module)
    }


def pipe_of(kind: Any, model: FlowModel) -> Any:
    pipe = kind(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(model: FlowModel, side: int) -> dict[str, Tensor]:
    """Return what the pipelines draw: from noise, in a hole, and of an image."""
    image = torch.rand(1, 3, side, side, generator=seeded(1))
    mask = torch.zeros(1, 1, side, side)
    mask[..., 2:9, 3:10] = 1.0
    few: dict[str, Any] = {"prompt": PROMPTS[0], "num_inference_steps": 2, "output_type": "pt"}
    calls = {
        LatentFlowPipeline: {"height": side, "width": side},
        LatentFlowInpaintPipeline: {"image": image, "mask_image": mask},
        LatentFlowEditPipeline: {"image": image, "source_prompt": PROMPTS[1]},
    }
    return {
        kind.__name__: pipe_of(kind, model)(**few, **call, generator=seeded()).images
        for kind, call in calls.items()
    }


# ---------------------------------------------------------------- precision and variants


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
def test_the_precision_that_is_asked_for(name: str, keyword: str, folders: Callable[..., Path]) -> None:
    model = load(folders(name), name, **{keyword: torch.bfloat16})
    assert set(precisions(model).values()) == {torch.bfloat16}
    side = opened(name)[2].side
    for way, images in draw(model, side).items():
        assert images.isfinite().all() and images.std() > 0.03, way


def test_the_precision_that_is_stored(folders: Callable[..., Path], tmp_path: Path) -> None:
    """Each component as it is in its file; without being asked diffusers widens its own networks to float32."""
    name = "FluxPipeline"
    pipe = deepcopy(checkpoint(name))
    pipe.transformer.to(torch.bfloat16)
    pipe.text_encoder_2.to(torch.float16)
    pipe.save_pretrained(tmp_path)
    kept = precisions(load(tmp_path, name, dtype="auto"))
    assert kept == {
        "transformer": torch.bfloat16, "text_encoder_2": torch.float16,
        "text_encoder": torch.float32, "vae": torch.float32,
    }  # fmt: skip
    assert precisions(load(tmp_path, name))["transformer"] == torch.float32
    half = load(folders(name, torch.float16, "fp16"), name, variant="fp16", dtype="auto")
    assert set(precisions(half).values()) == {torch.float16}


def test_a_folder_of_a_variant_alone_names_it(folders: Callable[..., Path]) -> None:
    name = "StableDiffusion3Pipeline"
    half = folders(name, torch.float16, "fp16")
    with pytest.raises(UserError, match=r"holds weights of the variant fp16 only\n.*variant=\"fp16\""):
        load(half, name)
    load(half, name, variant="fp16")
    with pytest.raises(UserError, match=r"variant=fp16.*has none\nIts weights have no variants"):
        load(folders(name), name, variant="fp16")
    with pytest.raises(UserError, match=r"variant=bf16.*has none\nThere are fp16\."):
        load(half, name, variant="bf16")


def test_a_variant_without_a_name_is_refused() -> None:
    with pytest.raises(UserError, match="--variant is empty"):
        check_memory_flags(MemoryConfig(variant=""), "cpu")


def test_components_that_are_placed(folders: Callable[..., Path]) -> None:
    name = "FluxPipeline"
    expected = draw(load(folders(name), name), 16)
    for place in ("cpu", "balanced"):
        for way, images in draw(load(folders(name), name, device_map=place), 16).items():
            assert torch.equal(images, expected[way]), (place, way)


# ---------------------------------------------------------------- quantisation


def torchao_config(kind: str, *parts: str) -> PipelineQuantizationConfig:
    pytest.importorskip("torchao", reason="torchao is not installed")
    import torchao.quantization
    from diffusers import TorchAoConfig

    config = TorchAoConfig(getattr(torchao.quantization, kind)())
    return PipelineQuantizationConfig(quant_mapping=dict.fromkeys(parts, config))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao(name: str, kind: str, folders: Callable[..., Path]) -> None:
    """Eight bits a weight: all but the same images as those of the network in bfloat16."""
    network = "unet" if "XL" in name else "transformer"
    config = torchao_config(kind, network)
    model = load(folders(name), name, quantization_config=config)
    assert any(type(weight.data).__name__ != "Tensor" for weight in model.network.parameters())
    plain = draw(load(folders(name), name, dtype={network: torch.bfloat16, "default": torch.float32}), 16)
    for way, images in draw(model, 16).items():
        assert (images - plain[way]).abs().mean() < 0.06, way


@pytest.mark.skipif(torch.cuda.is_available(), reason="bitsandbytes does not refuse a GPU")
def test_bitsandbytes_without_a_gpu_is_no_damaged_file(folders: Callable[..., Path]) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = PipelineQuantizationConfig("bitsandbytes_4bit", {"load_in_4bit": True}, "transformer")
    with pytest.raises(UserError, match=r"GPU(.|\n)*If the files are whole, change quantization_config"):
        load(folders("FluxPipeline"), "FluxPipeline", quantization_config=config)


@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_that_are_kept_in_eight_bits(name: str, folders: Callable[..., Path]) -> None:
    """Layerwise casting: inputs are of the precision that computes, not of the one that is stored."""
    model = load(folders(name), name)
    expected = draw(model, 16)
    model.network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {weight.dtype for weight in model.network.parameters()}
    assert torch.float8_e4m3fn in stored and model.network.dtype == torch.float32
    for way, images in draw(model, 16).items():
        assert 0.0 < (images - expected[way]).abs().mean() < 0.05, way


# ---------------------------------------------------------------- weights that wait elsewhere


def sequential(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # diffusers makes "cpu" into "cpu:0", on which accelerate's own parameters are no longer parameters.
    monkeypatch.setattr(
        accelerate, "cpu_offload", lambda model, device, **options: cpu_offload(model, CPU, **options)
    )
    pipe.enable_sequential_cpu_offload(device="cpu")
    network = getattr(pipe, "unet", None) or pipe.transformer
    assert {weight.device.type for weight in network.parameters()} == {"meta"}


OFFLOADING: dict[str, Callable[[Any, pytest.MonkeyPatch], None]] = {
    "model": lambda pipe, monkeypatch: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": sequential,
    "leaves": lambda pipe, monkeypatch: pipe.enable_group_offload(CPU, offload_type="leaf_level"),
    "blocks": lambda pipe, monkeypatch: pipe.enable_group_offload(
        CPU, offload_type="block_level", num_blocks_per_group=1
    ),
    "slices": lambda pipe, monkeypatch: pipe.vae.enable_slicing(),
}


@pytest.mark.parametrize(
    "name",
    [  # hooks are diffusers', the same for every transformer
        pytest.param(name, marks=pytest.mark.slow) if name in ("FluxPipeline", "QwenImagePipeline") else name
        for name in LAYOUTS
    ],
)
@pytest.mark.parametrize("how", OFFLOADING)
def test_offloaded_models_draw_the_same(
    name: str, how: str, folders: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights at other places in memory may round otherwise."""
    model = load(folders(name), name)
    expected = draw(model, 16)
    OFFLOADING[how](model.pipeline, monkeypatch)
    for _ in range(2):  # once more, after the hooks have been at work
        for way, images in draw(model, 16).items():
            torch.testing.assert_close(images, expected[way], rtol=0.0, atol=1e-4, msg=way)


def test_the_autoencoder_works_in_tiles(folders: Callable[..., Path]) -> None:
    """Encoding and decoding go through the autoencoder's own methods, which cut images into tiles."""
    name = "FluxPipeline"
    model, used = load(folders(name), name), []

    def spy(method: str) -> None:
        call = getattr(model.vae, method)
        setattr(model.vae, method, lambda *args, **named: used.append(method) or call(*args, **named))

    spy("_tiled_encode")
    spy("tiled_decode")
    image = torch.rand(1, 3, 64, 64, generator=seeded())
    with torch.no_grad():
        whole = model.decode(model.encode(image))
        model.vae.enable_tiling()
        model.vae.tile_sample_min_size, model.vae.tile_latent_min_size = 32, 16
        tiled = model.decode(model.encode(image))
    assert tiled.shape == whole.shape and not torch.equal(tiled, whole)
    assert used == ["_tiled_encode", "tiled_decode"]


def own_model(name: str) -> FlowModel:
    """Return a model of its own, over a copy of the shared pipeline that shares its components."""
    pipe = copy(checkpoint(name))
    return FAMILIES[type(pipe).__name__](pipe, **TINY[name].call)


# ---------------------------------------------------------------- memory that runs out


@pytest.mark.parametrize(
    ("part", "method", "phase", "flag"),
    [
        ("text_encoder_2", "forward", "encode prompts", "--quantize"),
        ("transformer", "forward", "run the network", "--offload"),
        ("vae", "decode", "decode", "--vae-tiling"),
        ("vae", "encode", "encode images", "--vae-tiling"),
    ],
)
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (torch.OutOfMemoryError, CUDA_WORDS),
        (RuntimeError, "[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_the_part_that_has_no_memory_is_named(
    part: str, method: str, phase: str, flag: str, kind: type[Exception], words: str
) -> None:
    model = own_model("StableDiffusion3Pipeline")
    component = copy(getattr(model.pipeline, part))

    def fails(*_: Any, **__: Any) -> Any:
        raise kind(words)

    vars(component)[method] = fails
    setattr(model.pipeline, part, component)
    with (
        pytest.raises(OutOfMemory, match=rf"phase: {phase}\) after a peak(.|\n)*{flag}"),
        memory_phase("draw"),
    ):
        draw(model, 16)


def test_memory_that_runs_out_while_loading(
    folders: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The component is named, and no file is called damaged."""

    def fails(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError(CUDA_WORDS)

    name = "FluxPipeline"
    monkeypatch.setattr(type(checkpoint(name).transformer), "from_pretrained", fails)
    with pytest.raises(
        OutOfMemory, match=r"phase: load the transformer of the pipeline(.|\n)*--quantize nf4"
    ):
        load(folders(name), name)


# ---------------------------------------------------------------- values that are not finite


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("text_encoder_2", "what the text encoder makes of the prompts is not finite"),
        ("transformer", r"the velocity at t = \S+ in step 1 of 2 is not finite(.|\n)*bfloat16"),
        ("vae", "of the autoencoder is not finite, in float32 too: its weight"),
    ],
)
def test_nothing_is_black_in_silence(part: str, said: str) -> None:
    model = own_model("StableDiffusion3Pipeline")
    component = deepcopy(getattr(model.pipeline, part))
    weights = [weight for name, weight in component.named_parameters() if "encoder.conv_in" not in name]
    with torch.no_grad():
        weights[-1].fill_(float("nan"))
    setattr(model.pipeline, part, component)
    with pytest.raises(UserError, match=said):
        draw(model, 16)


# ---------------------------------------------------------------- the flags of the programs


Program = Callable[[str], Any]


def command(name: str, folder: Path, output: Path, *more: str) -> list[str]:
    line = ["red apple", "--checkpoint", str(folder), "-o", str(output), "--height", "16", "--width", "16"]
    options = [f"{key}={value}" for key, value in TINY[name].call.items()]
    return [*line, "--steps", "2", *(["--family-options", *options] if options else []), *more]


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the pipelines that programs open."""
    from latentflow.inference import opening

    opened_pipes: list[Any] = []
    original = opening.place

    def place(pipe: Any, device: str, memory: Any) -> Any:
        opened_pipes.append(original(pipe, device, memory))
        return opened_pipes[-1]

    monkeypatch.setattr(opening, "place", place)
    return opened_pipes


def test_flags_of_precision(
    folders: Callable[..., Path], load_program: Program, tmp_path: Path, spied: list[Any]
) -> None:
    name = "FluxPipeline"
    half = folders(name, torch.bfloat16, "fp16")
    load_program("generate").main(
        command(name, half, tmp_path / "a.png", "--variant", "fp16", "--dtype", "bfloat16", "--vae-tiling")
    )
    model = spied[0].model
    assert set(precisions(model).values()) == {torch.bfloat16}
    assert model.vae.use_tiling and (tmp_path / "a.png").exists()
    with pytest.raises(UserError, match="--variant fp16"):
        load_program("generate").main(command(name, half, tmp_path / "a.png"))


def test_a_pretrained_model_is_as_stored_on_a_gpu(folders: Callable[..., Path]) -> None:
    from latentflow.inference.memory import loading_options

    folder = str(folders("FluxPipeline"))
    assert loading_options(MemoryConfig(), folder, "cuda") == {"dtype": "auto"}
    assert loading_options(MemoryConfig(), folder, "cpu") == {}
    assert loading_options(MemoryConfig(), str(SHIPPED_CHECKPOINTS / "emoji-64"), "cuda") == {}


def test_a_single_file_as_it_is_stored(folders: Callable[..., Path], tmp_path: Path) -> None:
    from latentflow.inference.memory import loading_options

    name, file = "ZImagePipeline", tmp_path / "network.safetensors"
    save_file(deepcopy(checkpoint(name).transformer).bfloat16().state_dict(), file)
    for dtype, precision in (("auto", torch.bfloat16), (torch.float32, torch.float32)):
        model = FlowModel.from_single_file(file, folders(name), dtype=dtype)
        assert model.network.dtype == precision
    assert loading_options(MemoryConfig(), str(file), "cuda") == {"dtype": "auto"}
    assert loading_options(MemoryConfig(), str(file), "cpu") == {}
    with pytest.raises(UserError, match=r"--quantize is given, but .*network.safetensors is a single file"):
        loading_options(MemoryConfig(quantize="int8"), str(file), "cpu")


@pytest.mark.parametrize("how", ["model", "sequential", "group"])
def test_flags_of_offloading(
    how: str,
    folders: Callable[..., Path],
    load_program: Program,
    tmp_path: Path,
    spied: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The CPU stands for a GPU: what waits, and where, is the libraries' own; the images are the same."""
    from latentflow.inference import opening

    name = "FluxPipeline"
    load_program("generate").main(command(name, folders(name), tmp_path / "plain.png"))
    with pytest.raises(UserError, match=f"--offload {how} needs a GPU"):
        load_program("generate").main(command(name, folders(name), tmp_path / "a.png", "--offload", how))
    monkeypatch.setattr(opening, "check_memory_flags", lambda memory, device: None)
    monkeypatch.setattr(
        accelerate, "cpu_offload", lambda model, device, **options: cpu_offload(model, CPU, **options)
    )
    load_program("generate").main(command(name, folders(name), tmp_path / "b.png", "--offload", how))
    transformer = spied[-1].model.pipeline.transformer
    hooked = hasattr(transformer, "_hf_hook") or hasattr(transformer, "_diffusers_hook")
    assert hooked
    first, second = (np.array(Image.open(tmp_path / f"{file}.png")).astype(int) for file in ("plain", "b"))
    assert np.abs(first - second).max() <= 1


def test_quantised_from_the_command_line(
    folders: Callable[..., Path], load_program: Program, tmp_path: Path, spied: list[Any]
) -> None:
    """The network and the language model, and neither CLIP nor the autoencoder."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    name = "FluxPipeline"
    load_program("generate").main(command(name, folders(name), tmp_path / "a.png", "--quantize", "int8"))
    quantised = {
        part
        for part, module in spied[0].model.pipeline.components.items()
        if isinstance(module, nn.Module)
        and any(type(weight.data).__name__ == "Int8Tensor" for weight in module.parameters())
    }
    assert quantised == {"transformer", "text_encoder_2"} and (tmp_path / "a.png").exists()


def test_a_library_that_quantises_is_missing(
    folders: Callable[..., Path], load_program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from importlib.util import find_spec

    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if "torchao" in name else find_spec(name)
    )
    line = command("FluxPipeline", folders("FluxPipeline"), tmp_path / "a.png")
    with pytest.raises(
        UserError, match=r"--quantize int8 needs torchao.*not installed\npip install \"torchao"
    ):
        load_program("generate").main([*line, "--quantize", "int8"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--quantize nf4 needs a GPU"):
            load_program("generate").main([*line, "--quantize", "nf4"])


def test_out_of_memory_on_the_way_to_the_device(
    folders: Callable[..., Path], load_program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError(CUDA_WORDS)

    monkeypatch.setattr(type(checkpoint("FluxPipeline")), "to", fails)
    line = command("FluxPipeline", folders("FluxPipeline"), tmp_path / "a.png")
    with pytest.raises(OutOfMemory, match=r"phase: load\)(.|\n)*--offload model"):
        load_program("generate").main(line)
