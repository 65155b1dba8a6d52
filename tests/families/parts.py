"""Tiny parts that the checkpoints of several families share: tokenizers, text encoders, autoencoders."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

WORDS = "a red green blue apple tree hat house sun of over big small the picture image you are assistant user"
CHAT = "{% for message in messages %}user {{ message['content'] }} assistant {% endfor %}"


def tokenizer(length: int = 77) -> Any:
    """Return a tokenizer of 20 words, whose texts begin with <bos> and end with <eos>."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS.split()])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=length, chat_template=CHAT, **names
    )


def clip(kind: Any = transformers.CLIPTextModel) -> Any:
    return kind(
        transformers.CLIPTextConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            projection_dim=16, bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=77,
        )
    )  # fmt: skip


def t5(width: int = 16) -> Any:
    config = transformers.T5Config(vocab_size=32, d_model=width, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    return transformers.T5EncoderModel(config)


LLM = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024,
    "pad_token_id": 0,
}  # fmt: skip
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
MROPE = {"rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"}}


def qwen3_vl(kind: Any, layers: int = 3) -> Any:
    text = {**LLM, **MROPE, "num_hidden_layers": layers}
    vision = {**VISION, "deepstack_visual_indexes": [0]}
    return kind(transformers.Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=24))


def qwen25_vl() -> Any:
    config = transformers.Qwen2_5_VLConfig(text_config={**LLM, **MROPE}, vision_config=VISION)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def gemma() -> Any:
    return transformers.Gemma2Model(transformers.Gemma2Config(**LLM, sliding_window=8))


def processor(kind: Any, video: Any) -> Any:
    """Return the processor of a vision language model, around our tokenizer."""
    words = tokenizer(1024)
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    words.add_special_tokens({"additional_special_tokens": marks})
    return kind(transformers.Qwen2VLImageProcessor(), words, video(), chat_template=CHAT)


def qwen3_processor() -> Any:
    return processor(transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor)


def contrasting(vae: Any, factor: float = 1.5) -> Any:
    """Return the autoencoder, whose images have more contrast now."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.weight.data.mul_(factor)
    return vae


def bright(vae: Any) -> Any:
    """Return a small autoencoder whose images are not black."""
    vae.decoder.layers[-1].bias.data.fill_(0.5)
    return vae


def kl(blocks: int = 2, shift: float | None = 0.1, channels: int = 4) -> Any:
    """Return an autoencoder that halves the sides of images ``blocks`` - 1 times."""
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * blocks, up_block_types=["UpDecoderBlock2D"] * blocks,
        block_out_channels=[8] * blocks, layers_per_block=1, norm_num_groups=4,
        latent_channels=channels, scaling_factor=0.6, shift_factor=shift,
    )  # fmt: skip
    return contrasting(vae)


def certain(vae: Any) -> Any:
    """Return the autoencoder, whose posterior has no variance now: a sample of it is its mean."""
    channels = vae.config.latent_channels
    vae.quant_conv.weight.data[channels:] = 0.0
    vae.quant_conv.bias.data[channels:] = -30.0
    return vae


def qwen_vae() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.8, 1.2, 1.0, 0.9],
    )  # fmt: skip


def flux2_vae() -> Any:
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    vae.bn.running_mean.copy_(torch.linspace(-0.3, 0.3, vae.bn.num_features))
    vae.bn.running_var.copy_(torch.linspace(0.5, 1.5, vae.bn.num_features))
    return vae


def flux2_network(guidance_embeds: bool) -> Any:
    return diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=48, timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance_embeds,
    )  # fmt: skip


def unet(in_channels: int = 4, **config: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=in_channels, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2, **config,
    )  # fmt: skip
