"""LoRA files of other trainers: read where their layers fit, else refused by what they are."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from latentflow.errors import UserError
from latentflow.models import UNet
from latentflow.pipeline import LatentFlowPipeline

from .conftest import awake, quiet, tiny_dit, tiny_text, tiny_vae

pytest.importorskip("peft", reason='needs peft: pip install -e ".[lora]"')
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict

# Patterns for the layers of the other network.
pytestmark = pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")
Tensors = dict[str, Tensor]
ALPHA, OTHER_ALPHA = 3.0, 5.0  # the rank is 2, or 3
THEIRS = "lora_adapter_metadata"  # of diffusers
KOHYAS = {"lora_A": "lora_down", "lora_B": "lora_up", "lora_magnitude_vector": "dora_scale"}


def tiny_unet() -> Any:
    return awake(UNet(in_channels=2, channels=[8, 16], head_dim=4, text_dim=16, sample_size=4))


NETWORKS: dict[str, Callable[[], Any]] = {"DiT": lambda: tiny_dit(text_dim=16), "UNet": tiny_unet}


@pytest.fixture(scope="module", params=NETWORKS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline with captions."""
    to: Path = tmp_path_factory.mktemp(request.param) / "pipeline"
    LatentFlowPipeline(tiny_vae(), NETWORKS[request.param](), **tiny_text()).save_pretrained(to)
    return to


def opened(folder: Path) -> Any:
    return quiet(LatentFlowPipeline.from_pretrained(folder))


def image(pipe: Any) -> Any:
    """One image with values in [0, 1], (1, 8, 8, 3)."""
    generator = torch.Generator().manual_seed(0)
    return pipe("a red apple", generator=generator, output_type="np", num_inference_steps=2).images


class Trained:
    """One adapter of a pipeline's networks, as peft itself makes it, with ranks and alphas that differ by layer."""

    def __init__(self, folder: Path, text: bool = False, dora: bool = False) -> None:
        pipe = opened(folder)
        self.before = image(pipe)
        torch.manual_seed(0)
        layers = ["qkv", "fc1", "attn.proj", "to_k", "to_v", "to_out.0", "conv1"]
        self.network = self._adapted(pipe.transformer, layers, dora)
        self.text_encoder = self._adapted(pipe.text_encoder, ["q", "wo"], dora) if text else None
        self.image = image(pipe)
        assert abs(self.image - self.before).max() > 0.01

    @staticmethod
    def _adapted(part: Any, layers: list[str], dora: bool) -> Any:
        config = LoraConfig(
            r=2,
            lora_alpha=ALPHA,  # type: ignore[arg-type]
            target_modules=layers,
            rank_pattern={"attn.proj": 3, "to_k": 3},
            alpha_pattern={"fc1": OTHER_ALPHA, "to_v": OTHER_ALPHA},  # type: ignore[dict-item]
            use_dora=dora,
            init_lora_weights=False,
        )
        adapted = get_peft_model(part, config)
        with torch.no_grad():
            for name, value in adapted.named_parameters():
                if "lora_" in name and "magnitude" not in name:
                    value.copy_(0.3 * torch.randn(value.shape))
        return adapted

    def tensors(self, beginning: str, part: str = "network", kohya: bool = False) -> Tensors:
        """Tensors with this beginning of their names, where it ends with "_" with "_" for dots; and kohya's alphas."""
        found: Tensors = {}
        for name, value in get_peft_model_state_dict(
            getattr(self, part), save_embedding_layers=False
        ).items():
            layer, _, end = name.removeprefix("base_model.model.").rpartition(".lora_")
            place = beginning + (layer.replace(".", "_") if beginning.endswith("_") else layer)
            end = f"lora_{end}"
            if kohya:
                end = re.sub("|".join(KOHYAS), lambda match: KOHYAS[match[0]], end)
                alpha = OTHER_ALPHA if layer.endswith(("fc1", "to_v")) else ALPHA
                found[f"{place}.alpha"] = torch.tensor(alpha)
                if end == "dora_scale":
                    value = value[:, None] if value.ndim == 1 else value.transpose(0, 1)
            found[f"{place}.{end}"] = value.clone().contiguous()
        return found


def scaled(tensors: Tensors) -> Tensors:
    """The same where alpha is the rank: for layouts without alphas."""
    alphas = {
        name.removesuffix(".alpha"): float(value) for name, value in tensors.items() if ".alpha" in name
    }
    return {
        name: value * (alphas[name.partition(".lora_up")[0]] / value.shape[1] if "lora_up" in name else 1)
        for name, value in tensors.items()
        if ".alpha" not in name
    }


def old_names(tensors: Tensors) -> Tensors:
    return {name.replace(".lora_", ".lora."): value for name, value in scaled(tensors).items()}


def ours(trained: Trained, to: Path) -> Path:
    settings = trained.network.peft_config["default"].to_dict()
    LatentFlowPipeline.save_lora_weights(to, trained.tensors(""), transformer_lora_adapter_metadata=settings)
    return to


def peft_folder(trained: Trained, to: Path) -> Path:
    trained.network.save_pretrained(to)
    return to


def peft_file(trained: Trained, to: Path) -> Path:
    return peft_folder(trained, to) / "adapter_model.safetensors"


def file_of(make: Callable[[Trained], Tensors], metadata: dict[str, str] | None = None) -> Any:
    def write(trained: Trained, to: Path) -> Path:
        save_file(make(trained), to / "other.safetensors", metadata=metadata)
        return to / "other.safetensors"

    return write


def whole(trained: Trained) -> Tensors:
    """Products instead of factors; in kohya's files some layers have them."""
    tensors = scaled(trained.tensors("lora_unet_", kohya=True))
    found: Tensors = {}
    for name, up in tensors.items():
        if name.endswith(".lora_up.weight"):
            down = tensors[name.replace("lora_up", "lora_down")]
            product = (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])
            found[name.replace("lora_up.weight", "diff")] = product
    return found


LAYOUTS: dict[str, Callable[[Trained, Path], Any]] = {
    "ours": ours,
    "kohya": file_of(lambda it: it.tensors("lora_unet_", kohya=True), {"ss_network_alpha": "99"}),
    "ComfyUI": file_of(lambda it: it.tensors("diffusion_model.", kohya=True)),
    "peft, a folder": peft_folder,
    "peft, a file": peft_file,
    "LyCORIS": file_of(lambda it: it.tensors("lycoris_", kohya=True)),
    "kohya's ends alone": file_of(lambda it: it.tensors("", kohya=True)),
    "unet.": file_of(lambda it: it.tensors("unet.", kohya=True)),
    "old diffusers": file_of(lambda it: old_names(it.tensors("transformer.", kohya=True))),
    "whole differences": file_of(whole, {"ss_network_alpha": "99"}),
    "peft, tensors": lambda it, _: scaled_peft(it),
    "of a module": file_of(
        lambda it: {
            n.replace("lora_down", "lora_A.default").replace("lora_up", "lora_B.default"): v
            for n, v in scaled(it.tensors("", kohya=True)).items()
        }
    ),
}


def scaled_peft(trained: Trained) -> Tensors:
    tensors = scaled(trained.tensors("base_model.model.", kohya=True))
    return {
        name.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): value
        for name, value in tensors.items()
    }


def test_every_layout_of_one_adapter_gives_one_image(folder: Path, tmp_path: Path) -> None:
    """Its alphas are not its ranks, and both differ by layer. Merged without peft it is the same."""
    trained = Trained(folder)
    for number, (layout, write) in enumerate(LAYOUTS.items()):
        (to := tmp_path / str(number)).mkdir()
        source = write(trained, to)
        pipe = opened(folder)
        pipe.load_lora_weights(source, adapter_name="one")
        assert abs(image(pipe) - trained.image).max() < 1e-5, layout
        assert pipe.get_list_adapters() == {"transformer": ["one"]}, layout
        pipe.unload_lora_weights()
        assert (image(pipe) == trained.before).all(), layout
        if layout in ("kohya", "peft, a folder"):
            pipe.merge_lora_weights(source)
            assert abs(image(pipe) - trained.image).max() < 1e-5, layout


def test_kohyas_file_of_network_and_text_encoder(folder: Path, tmp_path: Path) -> None:
    for dora in (False, True):
        trained = Trained(folder, text=True, dora=dora)
        tensors = trained.tensors("lora_unet_", kohya=True) | trained.tensors(
            "lora_te_", "text_encoder", kohya=True
        )
        save_file(tensors, tmp_path / "it.safetensors")
        pipe = opened(folder)
        pipe.load_lora_weights(tmp_path / "it.safetensors", adapter_name="one")
        assert abs(image(pipe) - trained.image).max() < 1e-5
        assert pipe.get_list_adapters() == {"transformer": ["one"], "text_encoder": ["one"]}


@pytest.mark.parametrize(
    ("name", "settings", "scale"),
    [
        # Of the training; the tensors have it already, or it is the rank:
        ("transformer.x.lora_A.weight", {"ss_network_alpha": "3.0"}, 1.0),
        ("lora_unet_x.lora_down.weight", {"ss_network_alpha": "3.0"}, 1.0),
        ("unet.x.lora.down.weight", {THEIRS: {"unet.r": 2, "unet.lora_alpha": 8}}, 4.0),
        ("x.lora_A.weight", {THEIRS: {"r": 2, "lora_alpha": 1, "alpha_pattern": {"x": 3}}}, 1.5),
        ("unet.x.lora_A.weight", {THEIRS: {"unet.r": 2, "unet.lora_alpha": 2, "unet.use_rslora": True}}, 2**0.5),
        # Applied by peft, from the file's settings:
        ("transformer.x.lora_A.weight", {THEIRS: {"transformer.r": 2, "transformer.lora_alpha": 8}}, 1.0),
    ],
)  # fmt: skip
def test_scales_in_the_metadata_are_multiplied_in(
    name: str, settings: dict[str, Any], scale: float, tmp_path: Path
) -> None:
    up = name.replace("lora_A", "lora_B").replace("down", "up")
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()
    }
    save_file({name: torch.ones(2, 4), up: torch.ones(4, 2)}, tmp_path / "it.safetensors", metadata=metadata)
    state = LatentFlowPipeline.lora_state_dict(tmp_path / "it.safetensors")
    [written] = [value for key, value in state.items() if key.endswith("lora_B.weight")]
    torch.testing.assert_close(written, torch.full((4, 2), scale))


def test_settings_of_a_unet_beside_those_of_a_text_encoder(tmp_path: Path) -> None:
    """The first are multiplied in, the others are peft's to apply."""
    tensors = {
        f"{part}.x.lora_{end}.weight": torch.ones(shape)
        for part in ("unet", "text_encoder")
        for end, shape in (("A", (2, 4)), ("B", (4, 2)))
    }
    settings = {"unet.r": 2, "unet.lora_alpha": 8, "text_encoder.r": 2, "text_encoder.lora_alpha": 6}
    save_file(tensors, tmp_path / "it.safetensors", metadata={THEIRS: json.dumps(settings)})
    state, left = LatentFlowPipeline.lora_state_dict(tmp_path / "it.safetensors", return_lora_metadata=True)
    assert left == {"text_encoder.r": 2, "text_encoder.lora_alpha": 6}
    assert (state["unet.x.lora_B.weight"] == 4.0).all() and (
        state["text_encoder.x.lora_B.weight"] == 1.0
    ).all()


# ---------------------------------------------------------------- refused


def pair(layer: str, inputs: int, outputs: int = 8) -> Tensors:
    return {f"{layer}.lora_A.weight": torch.ones(2, inputs), f"{layer}.lora_B.weight": torch.ones(outputs, 2)}


def kohya_pair(layer: str, inputs: int = 16, outputs: int = 48, **more: Tensor) -> Tensors:
    tensors = {"lora_down.weight": torch.ones(2, inputs), "lora_up.weight": torch.ones(outputs, 2)}
    more = {"alpha": torch.tensor(1.0), **more}
    return {f"{layer}.{end}": value for end, value in {**tensors, **more}.items()}


def stored_as(dtype: torch.dtype) -> Tensors:
    return {name: value.to(dtype) for name, value in pair(PROJ, 16, 16).items()}


QKV = "lora_unet_blocks_0_attn_qkv"
PROJ = "transformer.blocks.0.attn.proj"
ALPHA_OF_1 = {f"{QKV}.alpha": torch.tensor(1.0)}
SD_CROSS = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora"
MADE_FOR: dict[str, list[Tensors]] = {
    "FLUX": [
        kohya_pair("lora_unet_double_blocks_0_img_attn_qkv"),
        pair("transformer.single_transformer_blocks.0.attn.to_q", 3072),
        pair("diffusion_model.double_blocks.0.img_attn.qkv", 3072),
    ],
    "SDXL": [
        kohya_pair("lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k", 2048),
        kohya_pair("lora_te2_text_model_encoder_layers_0_mlp_fc1", 1280),
    ],
    "Stable Diffusion 1": [
        kohya_pair("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 768),
        {f"{SD_CROSS}.down.weight": torch.ones(2, 768), f"{SD_CROSS}.up.weight": torch.ones(320, 2)},
    ],
    "Stable Diffusion": [kohya_pair("lora_te_text_model_encoder_layers_0_mlp_fc1", 768)],
    "SD3": [pair("transformer.joint_blocks.0.x_block.attn.qkv", 1536)],
    "SD3, FLUX or another": [pair("transformer.transformer_blocks.0.attn.add_q_proj", 1536)],
    "Qwen-Image": [pair("transformer.transformer_blocks.0.img_mlp.net.2", 3072)],
    "Z-Image": [pair("diffusion_model.layers.0.attention.to_q", 3840)],
    "Wan": [pair("diffusion_model.blocks.0.self_attn.q", 5120)],
}


def test_a_file_of_another_model_is_refused_by_its_name(folder: Path, tmp_path: Path) -> None:
    pipe = opened(folder)
    for model, files in MADE_FOR.items():
        for tensors in files:
            with pytest.raises(
                UserError, match=rf"made for {model}.* is for another architecture: .* not in this"
            ):
                pipe.load_lora_weights(tensors)
    save_file(
        kohya_pair("lora_unet_x"),
        tmp_path / "it.safetensors",
        metadata={"modelspec.architecture": "flux-1-dev/lora"},
    )
    with pytest.raises(UserError, match=r"\(layout: kohya, made for flux-1-dev\)"):
        pipe.load_lora_weights(tmp_path / "it.safetensors")
    assert not pipe.get_list_adapters()


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        (pair(PROJ, 32, 16), r"another architecture \(width 32, here 16\): .*proj has 32 inputs there, 16 here"),
        (pair(PROJ, 16, 16) | pair("transformer.blocks.1.attn.proj", 16), r"1 of its 2 layers fit, .*blocks.1"),
        ({f"{QKV}.lokr_w1": torch.ones(2, 2), **ALPHA_OF_1}, r"it holds LoKr factors \(LyCORIS\), such"),
        ({f"{QKV}.hada_w1_a": torch.ones(2, 2)}, "holds LoHa factors"),
        (kohya_pair(QKV, **{"lora_mid.weight": torch.ones(2, 2)}), "Tucker core .* beside LoRA layers"),
        ({f"{PROJ}.ia3_l": torch.ones(16)}, "holds an IA3 adapter"),
        ({"oft_unet_blocks_0.oft_blocks": torch.ones(2, 2)}, "holds an OFT adapter"),
        ({"emb_params": torch.ones(2, 768)}, "holds a textual inversion embedding"),
        ({"<cat>": torch.ones(768)}, "holds a textual inversion embedding"),
        ({"blocks.0.attn.qkv.weight": torch.ones(48, 16)}, "no LoRA adapter: it holds the weights of a checkpoint"),
        (pair(PROJ, 16, 16) | {f"{PROJ}.diff_b": torch.ones(16)}, "differences of biases or norms beside LoRA layers"),
        (stored_as(torch.float8_e4m3fn), "quantised: .* float8_e4m3fn"),
        (stored_as(torch.int8), "is quantised: .* is int8"),
        (pair(PROJ, 16, 16) | {f"{PROJ}.lora_A.weight": torch.full((2, 16), torch.nan)}, "not of finite"),
        (pair(PROJ, 16, 16) | {f"{PROJ}.lora_A.weight": torch.ones(3, 16)}, r"differ in the rank: 2 and 3"),
        ({f"{PROJ}.lora_A.weight": torch.ones(2, 16)}, r"lacks a part of a layer: .*lora_B"),
        ({f"{PROJ}.lora_A.weight": torch.ones(0, 16), f"{PROJ}.lora_B.weight": torch.ones(16, 0)}, "has rank 0"),
        ({}, "holds no tensors"),
        (ALPHA_OF_1, "has an alpha alone"),
        (kohya_pair(QKV, alpha=torch.tensor(0.0)), "alpha is no number above 0"),
        (kohya_pair(QKV, alpha=torch.tensor(torch.nan)), "alpha is no number above 0"),
        (kohya_pair(QKV, alpha=torch.ones(2)), "alpha is no number above 0"),
        (kohya_pair(QKV, dora_scale=torch.ones(1, 16)), "DoRA of columns"),
        (kohya_pair(QKV) | pair("transformer.blocks.0.attn.qkv", 16, 48), "twice, in two spellings"),
        (pair("text_embedder.norm", 16, 16), "no layer that is adapted"),
        ({"diffusion_model.text_embedder.norm.diff": torch.ones(16)}, "no layer that is adapted"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_what_it_is(
    tensors: Tensors, what: str, dit_folder: Path, tmp_path: Path
) -> None:
    save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / "it.safetensors")
    pipe = opened(dit_folder)
    for load in (pipe.load_lora_weights, pipe.merge_lora_weights):
        with pytest.raises(UserError, match=what) as error:
            load(tmp_path / "it.safetensors")
        assert "it.safetensors" in error.value.what and "\n" not in error.value.what
    assert not pipe.get_list_adapters()


def test_pickles_are_never_opened(dit_folder: Path, tmp_path: Path) -> None:
    pipe = opened(dit_folder)
    for name in ("it.pt", "it.ckpt", "it.bin", "it.PTH"):
        (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n.")
        with pytest.raises(UserError, match=f"{name} is a pickle, which runs code when it is opened"):
            pipe.load_lora_weights(tmp_path / name)
    with pytest.raises(UserError, match=r"holds no \.safetensors file, only it\.PTH|it\.bin, a pickle"):
        pipe.load_lora_weights(tmp_path)
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(UserError, match=r"folder\.pt holds no \.safetensors file\n"):
        pipe.load_lora_weights(tmp_path / "folder.pt")


def test_layers_of_a_text_encoder_need_one(dit_folder: Path, class_folder: Path) -> None:
    layer = "encoder_block_0_layer_0_SelfAttention_q"
    tensors = kohya_pair(f"lora_te_{layer}", 16, 16)
    with pytest.raises(UserError, match=r"adapts a text encoder .* this pipeline has none"):
        opened(class_folder).load_lora_weights(tensors)
    pipe = opened(dit_folder)
    pipe.load_lora_weights(tensors, adapter_name="text")
    assert pipe.get_list_adapters() == {"text_encoder": ["text"]}


def test_another_kind_of_peft_is_refused_by_its_settings(dit_folder: Path, tmp_path: Path) -> None:
    save_file(pair("base_model.model.blocks.0.attn.proj", 16, 16), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA", "r": 2}))
    with pytest.raises(UserError, match=r"adapter_config\.json has peft_type LOHA"):
        opened(dit_folder).load_lora_weights(tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": "4"})
    )
    with pytest.raises(UserError, match=r"adapter_config.json: lora_alpha is .4."):
        opened(dit_folder).load_lora_weights(tmp_path)
