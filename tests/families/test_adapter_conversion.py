"""Adapters of pretrained models, written in each layout and opened by the stock pipeline's own loader."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from latentflow.errors import UserError
from latentflow.pipeline.adapter_conversion import in_layout, layouts_of, write_in_layout

from .test_pretrained import seeded
from .tiny import TINY, checkpoint

peft = pytest.importorskip("peft", reason="peft is not installed")
# Patterns for the layers of other parts.
pytestmark = [
    pytest.mark.usefixtures("no_grad"),
    pytest.mark.filterwarnings("ignore:The following:RuntimeWarning"),
]
FILE = "pytorch_lora_weights.safetensors"
#: of most layers, and of some
RANKS, ALPHAS = (3, 2), (5.0, 1.0)
#: layout -> pipeline -> layers that are not read back: refused, and left out here
NOT_READ = {
    "diffusers": {},
    "comfyui": {
        "ChromaPipeline": "distilled_guidance_layer",
        "Flux2Pipeline": r"time_guidance_embed|_modulation|norm_out",
        "Flux2KleinPipeline": r"time_guidance_embed|_modulation|norm_out",
        "Ideogram4Pipeline": r"^(?!layers\.)",
        "ZImageOmniPipeline": "siglip",
        "StableDiffusionXLPipeline": "add_embedding",
        "KolorsPipeline": "add_embedding|encoder_hid_proj",
    },
    "kohya": {
        # single blocks are read at their published width alone: see below
        "FluxPipeline": "embed|norm_out|^proj_out|^single",
        "FluxKontextPipeline": "embed|norm_out|^proj_out|^single",
        "ChromaPipeline": "embed|distilled_guidance_layer|norm_out|^proj_out|^single",
        "Flux2Pipeline": r"guidance_embedder|_modulation|norm_out",
        "Flux2KleinPipeline": r"guidance_embedder|_modulation|norm_out",
        "ZImageOmniPipeline": "siglip",
        "StableDiffusionXLPipeline": "add_embedding",
        "KolorsPipeline": "add_embedding|encoder_hid_proj",
    },
}  # fmt: skip
BY_DEFAULT = ("FluxPipeline", "Flux2KleinPipeline", "ZImagePipeline", "StableDiffusionXLPipeline")


def class_of(name: str) -> Any:
    return getattr(diffusers, name.partition("-")[0])


#: all families with more layouts than diffusers'; Lumina2's is read at its published width alone
WRITTEN = [name for name in TINY if len(layouts_of(class_of(name))) > 1 and name != "Lumina2Pipeline"]


def image(name: str, adapter: Path | None = None) -> Tensor:
    """Return what the stock pipeline draws, (1, 3, H, W) in [0, 1]."""
    pipe, tiny = deepcopy(checkpoint(name)), TINY[name]
    if adapter is not None:
        pipe.load_lora_weights(adapter)
    size = {"height": tiny.side, "width": tiny.side}
    call = {**tiny.call, **size, "num_inference_steps": 4, "output_type": "pt"}
    drawn = pipe(prompt=["red apple"], generator=seeded(), **call)
    images: Tensor = drawn.image if "Kandinsky5" in name else drawn.images
    return images


def saved(name: str, folder: Path, but: str, **settings: Any) -> Path:
    """Write a random adapter of all layers but those of a pattern, also of CLIP text encoders, as the pipeline's own
    class saves it; ranks and alphas differ from one another and by layer."""
    pipe = deepcopy(checkpoint(name))
    given: dict[str, Any] = {}
    for part in type(pipe)._lora_loadable_modules:
        module = getattr(pipe, part)
        if part.startswith("text_encoder"):
            if not isinstance(module, CLIPTextModel | CLIPTextModelWithProjection):
                continue
            layers = ["q_proj", "v_proj", "out_proj", "fc1"]
        else:
            kinds = (nn.Linear, nn.Conv2d)
            layers = [layer for layer, module in module.named_modules() if isinstance(module, kinds)]
            layers = [layer for layer in layers if not (but and re.search(but, layer))]
        config = peft.LoraConfig(
            r=RANKS[0], lora_alpha=ALPHAS[0], target_modules=layers, init_lora_weights=False,
            rank_pattern=dict.fromkeys(("to_k", "q_proj"), RANKS[1]),
            alpha_pattern=dict.fromkeys(("to_v", "q_proj"), ALPHAS[1]), **settings,
        )  # fmt: skip
        peft.inject_adapter_in_model(config, module, "default")
        for number, (key, weight) in enumerate(module.named_parameters()):
            if "lora_" in key and "magnitude" not in key:
                weight.copy_(0.15 * torch.randn(weight.shape, generator=seeded(number)))
        given[f"{part}_lora_layers"] = peft.get_peft_model_state_dict(module)
        given[f"{part}_lora_adapter_metadata"] = config.to_dict()
    type(pipe).save_lora_weights(folder, **given)
    return folder / FILE


@pytest.mark.parametrize(
    "name", [n if n in BY_DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in WRITTEN]
)
def test_every_layout_gives_the_same_image(name: str, tmp_path: Path) -> None:
    kind, plain = class_of(name), image(name)
    for layout in layouts_of(kind):
        file = saved(name, tmp_path / layout, NOT_READ[layout].get(kind.__name__, ""))
        write_in_layout(file, other := tmp_path / f"{layout}.safetensors", layout, kind)
        drawn, expected = image(name, other), image(name, file)
        assert (drawn - expected).abs().max() < 1e-5, layout
        assert (expected - plain).abs().max() > 0.01


def test_export_of_a_run_that_adapted_a_pretrained_model(
    folders: Callable[[str], Path], load_program: Callable[[str], Any], tmp_path: Path
) -> None:
    """Its settings name the base, whose pipeline says how the layers are called."""
    name = "Flux2KleinPipeline"
    file = saved(name, tmp_path / "run" / "adapter", NOT_READ["kohya"][name])
    (tmp_path / "run" / "config.yaml").write_text(f"init_from: {folders(name)}\n")
    line = [str(tmp_path / "run"), "--adapter", "--layout", "kohya", "-o", str(tmp_path / "out")]
    load_program("export").main(line)
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight" in load_file(tmp_path / "out" / FILE)
    assert (image(name, tmp_path / "out") - image(name, file)).abs().max() < 1e-5


def factors(shapes: dict[str, tuple[int, int]], rank: int) -> dict[str, Tensor]:
    """Return random factors of layers, whose (outputs, inputs) are given."""
    found = {}
    for number, (layer, (outputs, inputs)) in enumerate(shapes.items()):
        found[f"transformer.{layer}.lora_A.weight"] = torch.randn(rank, inputs, generator=seeded(number))
        found[f"transformer.{layer}.lora_B.weight"] = torch.randn(outputs, rank, generator=seeded(-number))
    return found


def shapes_of(network: Callable[[], nn.Module], pattern: str) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of a network's linear layers whose names begin with a pattern."""
    with torch.device("meta"):
        layers = network().named_modules()
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in layers
        if isinstance(layer, nn.Linear) and re.match(pattern, name)
    }


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)


def lumina2() -> nn.Module:
    return diffusers.Lumina2Transformer2DModel(num_layers=1, num_refiner_layers=1)


@pytest.mark.parametrize(
    ("kind", "layout", "network", "pattern"),
    [
        (diffusers.FluxPipeline, "kohya", flux, r"(single_)?transformer_blocks"),
        (diffusers.FluxPipeline, "kohya", flux, r".*\.(to_q|to_v|add_k_proj)$"),
        (diffusers.FluxPipeline, "kohya", flux, r".*\.proj_mlp$"),
        (diffusers.Lumina2Pipeline, "comfyui", lumina2, "layers|(noise|context)_refiner"),
    ],
)
def test_stacked_layers_at_their_published_width(
    kind: Any, layout: str, network: Callable[[], nn.Module], pattern: str
) -> None:
    """The stock loader takes q, k, v (and FLUX's MLP) apart again, also where some of them have no adapter."""
    shapes = shapes_of(network, pattern)
    state = factors(shapes, rank=3)
    settings = {"transformer.r": 3, "transformer.lora_alpha": 5.0}
    written = in_layout(state, settings, layout, kind)
    assert any("qkv" in key or "linear1" in key for key in written)
    read = kind.lora_state_dict({**written})
    for layer, (_, inputs) in shapes.items():
        x = torch.randn(inputs, generator=seeded())
        down, up = (f"transformer.{layer}.lora_{side}.weight" for side in "AB")
        expected = 5 / 3 * state[up] @ (state[down] @ x)
        torch.testing.assert_close(read.pop(up) @ (read.pop(down) @ x), expected, rtol=1e-4, atol=1e-3)
    assert not any(value.any() for key, value in read.items() if ".lora_B." in key)


@pytest.mark.parametrize(
    ("kind", "layout", "layer", "message"),
    [
        ("SanaPipeline", "comfyui", "x", "SanaPipeline reads no adapter in ComfyUI's layout\nIts layouts: diffusers."),
        ("SanaPipeline", "kohya", "x", "SanaPipeline reads no adapter in kohya's layout"),
        ("StableDiffusion3Pipeline", "kohya", "x", "in kohya's layout\nIts layouts: diffusers, comfyui."),
        ("OvisImagePipeline", "comfyui", "x", "OvisImagePipeline reads no adapter in ComfyUI's layout"),
        ("FluxPipeline", "kohya", "x_embedder", "kohya's layout has no name for .*: transformer.x_embedder"),
        ("FluxPipeline", "kohya", "single_transformer_blocks.0.attn.to_q", "the adapter written in kohya's layout"),
        ("Flux2Pipeline", "comfyui", "norm_out.linear", "ComfyUI has no name for .*: transformer.norm_out.linear"),
        ("Lumina2Pipeline", "comfyui", "layers.0.attn.to_q", "the adapter written in ComfyUI's layout"),
        ("QwenImagePipeline", "kohya", "norm_out.other", "written in kohya's layout cannot be read: `state_dict`"),
        ("ZImagePipeline", "kohya", "siglip_embedder.1", "does not read transformer.siglip_embedder.1 from kohya's"),
    ],
)  # fmt: skip
def test_what_is_not_read_back_is_refused(kind: str, layout: str, layer: str, message: str) -> None:
    """By the layers and the layouts that there are; nothing is left out silently."""
    with pytest.raises(UserError, match=message):
        in_layout(factors({layer: (8, 8)}, 2), None, layout, getattr(diffusers, kind))


def test_dora_of_pretrained_models_stays_in_diffusers_layout(tmp_path: Path) -> None:
    """Diffusers' loaders pass over its lengths in other layouts."""
    name = "ZImagePipeline"
    file = saved(name, tmp_path, "", use_dora=True)
    assert any("magnitude" in key for key in load_file(file))
    with pytest.raises(UserError, match="has DoRA, which is not read back from kohya's layout"):
        write_in_layout(file, tmp_path / "other.safetensors", "kohya", class_of(name))
    assert not (tmp_path / "other.safetensors").exists()
