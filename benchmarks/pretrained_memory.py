"""Memory that the weights of pretrained models take, by how they are stored: counted, nothing is downloaded.

    python benchmarks/pretrained_memory.py

Networks and text encoders are built on the meta device with the settings that their authors publish, and their
parameters counted. Quantised are the weights of linear layers: to int8 (1 byte, and 5 for each row), or to nf4 (half a
byte, a byte for each block of 64, and 4 for each 256 blocks: double quantisation, as --quantize nf4 has it); the rest
stays in bfloat16. Prints the table of docs/guide/pretrained.md in GB (10^9 bytes). Activations, some 1 to 4 GB at
1024 x 1024 pixels, come on top.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    MistralConfig,
    MistralForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from latentflow.families.stored_weights import parameter_count, stored_bytes

Make = Callable[[], nn.Module]


def decoder(
    model: Any,
    config: Any,
    vocabulary: int,
    width: int,
    inner: int,
    layers: int,
    heads: tuple[int, int],
    side: int,
    tied: bool = False,
) -> nn.Module:
    """A language model; ``heads`` are those of queries and of keys, ``side`` the width of each."""
    settings = config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=side,
        tie_word_embeddings=tied,
    )
    return model(settings)  # type: ignore[no-any-return]


def qwen3_4b() -> nn.Module:
    return decoder(Qwen3ForCausalLM, Qwen3Config, 151936, 2560, 9728, 36, (32, 8), 128, tied=True)


def qwen3_8b() -> nn.Module:
    return decoder(Qwen3ForCausalLM, Qwen3Config, 151936, 4096, 12288, 36, (32, 8), 128)


def gemma2_2b() -> nn.Module:
    return decoder(Gemma2Model, Gemma2Config, 256000, 2304, 9216, 26, (8, 4), 256)


def mistral_small_3() -> nn.Module:
    return decoder(MistralForCausalLM, MistralConfig, 131072, 5120, 32768, 40, (32, 8), 128)


def t5_xxl() -> nn.Module:
    return T5EncoderModel(
        T5Config(
            vocab_size=32128,
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            feed_forward_proj="gated-gelu",
        )
    )


def clip(width: int, layers: int, heads: int) -> nn.Module:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            projection_dim=width,
        )
    )


def clip_l() -> nn.Module:
    return clip(768, 12, 12)


def clip_g() -> nn.Module:
    return clip(1280, 32, 20)


def qwen2_5_vl_7b() -> nn.Module:
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def sd3(layers: int, dual: int, positions: int) -> nn.Module:
    network: Any = diffusers.SD3Transformer2DModel
    return network(  # type: ignore[no-any-return]
        num_layers=layers,
        num_attention_heads=layers,
        joint_attention_dim=4096,
        caption_projection_dim=64 * layers,
        pooled_projection_dim=2048,
        pos_embed_max_size=positions,
        dual_attention_layers=tuple(range(dual)),
        qk_norm="rms_norm",
    )


def flux2(layers: int, single: int, heads: int, text: int, guidance: bool = False) -> nn.Module:
    network: Any = diffusers.Flux2Transformer2DModel
    return network(  # type: ignore[no-any-return]
        num_layers=layers,
        num_single_layers=single,
        num_attention_heads=heads,
        joint_attention_dim=text,
        guidance_embeds=guidance,
    )


@dataclass(frozen=True)
class Model:
    """A pretrained model: how its network and its text encoders are built."""

    network: Make
    encoders: tuple[Make, ...]


MODELS = {
    "Sana 1.6B": Model(diffusers.SanaTransformer2DModel, (gemma2_2b,)),
    "SD 3.5 medium": Model(lambda: sd3(24, 13, 384), (clip_l, clip_g, t5_xxl)),
    "SD 3.5 large": Model(lambda: sd3(38, 0, 192), (clip_l, clip_g, t5_xxl)),
    "Lumina2": Model(diffusers.Lumina2Transformer2DModel, (gemma2_2b,)),
    "FLUX.2 klein 4B": Model(lambda: flux2(5, 20, 24, 7680), (qwen3_4b,)),
    "FLUX.2 klein 9B": Model(lambda: flux2(8, 24, 32, 12288), (qwen3_8b,)),
    "FLUX.2 dev": Model(lambda: flux2(8, 48, 48, 15360, True), (mistral_small_3,)),
    "FLUX.1 dev": Model(lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True), (clip_l, t5_xxl)),
    "Chroma": Model(diffusers.ChromaTransformer2DModel, (t5_xxl,)),
    "Z-Image": Model(diffusers.ZImageTransformer2DModel, (qwen3_4b,)),
    "Qwen-Image": Model(diffusers.QwenImageTransformer2DModel, (qwen2_5_vl_7b,)),
}


def without_memory(make: Make) -> nn.Module:
    """Return what ``make`` builds, on the meta device."""
    with torch.device("meta"):
        return make()


def table() -> list[str]:
    """Return the lines of the table in Markdown."""
    lines = [
        "| Model | Network, parameters | bf16 | int8 | nf4 | Text encoders, parameters | bf16 | int8 | nf4 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, model in MODELS.items():
        cells = []
        for makes in ((model.network,), model.encoders):
            parts = [without_memory(make) for make in makes]
            sizes = [
                f"{sum(stored_bytes(part, stored, double=True) for part in parts) / 1e9:.1f}"
                for stored in ("bfloat16", "int8", "nf4")
            ]
            cells += [f"{sum(map(parameter_count, parts)) / 1e9:.1f} B", *sizes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    transformers.logging.set_verbosity_error()
    print("\n".join(table()))


if __name__ == "__main__":
    main()
