"""Tiny random checkpoints of every family, built with the real classes in about a second each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
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


def kl(blocks: int = 2, shift: float | None = 0.1, channels: int = 4) -> Any:
    """Return an autoencoder that halves the sides of images ``blocks`` - 1 times."""
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * blocks, up_block_types=["UpDecoderBlock2D"] * blocks,
        block_out_channels=[8] * blocks, layers_per_block=1, norm_num_groups=4,
        latent_channels=channels, scaling_factor=0.6, shift_factor=shift,
    )  # fmt: skip
    return contrasting(vae)


def contrasting(vae: Any, factor: float = 1.5) -> Any:
    """Return the autoencoder, whose images have more contrast now."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.weight.data.mul_(factor)
    return vae


def qwen_vae() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.8, 1.2, 1.0, 0.9],
    )  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """How a tiny checkpoint is built and called.

    Attributes:
        components: makes the pipeline's components; a scheduler of flows is added.
        call: options that its size needs.
        scheduler: settings of the scheduler.
        settings: other arguments of the pipeline.
    """

    components: Callable[[], dict[str, Any]]
    call: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    side: int = 16


def sd3() -> dict[str, Any]:
    joint = {"caption_projection_dim": 16, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    clips = transformers.CLIPTextModelWithProjection
    return {
        "transformer": diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, pos_embed_max_size=16, **joint,
        ),
        "vae": kl(),
        "text_encoder": clip(clips), "text_encoder_2": clip(clips), "text_encoder_3": t5(32),
        "tokenizer": tokenizer(), "tokenizer_2": tokenizer(), "tokenizer_3": tokenizer(),
    }  # fmt: skip


def flux(guidance_embeds: bool = False) -> dict[str, Any]:
    return {
        "transformer": diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance_embeds,
        ),
        "vae": kl(), "text_encoder": clip(), "text_encoder_2": t5(),
        "tokenizer": tokenizer(), "tokenizer_2": tokenizer(),
    }  # fmt: skip


def chroma() -> dict[str, Any]:
    return {
        "transformer": diffusers.ChromaTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=16,
            approximator_layers=1, approximator_num_channels=16,
        ),
        "vae": kl(), "text_encoder": t5(), "tokenizer": tokenizer(),
    }  # fmt: skip


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


def flux2_klein() -> dict[str, Any]:
    return {
        "transformer": flux2_network(False),
        "vae": flux2_vae(),
        "text_encoder": transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLM)),
        "tokenizer": tokenizer(512),
    }


def qwen_image() -> dict[str, Any]:
    text = {**LLM, "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return {
        "transformer": diffusers.QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
        ),
        "vae": qwen_vae(),
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(config),
        "tokenizer": tokenizer(512),
    }  # fmt: skip


def z_image() -> dict[str, Any]:
    network = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1,
        n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    with torch.no_grad():  # they are made without values
        network.x_pad_token.normal_(std=0.5)
        network.cap_pad_token.normal_(std=0.5)
    return {
        "transformer": network,
        "vae": kl(),
        "text_encoder": transformers.Qwen3Model(transformers.Qwen3Config(**LLM)),
        "tokenizer": tokenizer(512),
    }


def gemma() -> Any:
    return transformers.Gemma2Model(transformers.Gemma2Config(**LLM, sliding_window=8))


def sana() -> dict[str, Any]:
    return {
        "transformer": diffusers.SanaTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
            attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8,
            cross_attention_dim=16, caption_channels=16, sample_size=8,
        ),
        "vae": diffusers.AutoencoderDC(
            latent_channels=4, attention_head_dim=4, scaling_factor=0.5,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            downsample_block_type="conv", upsample_block_type="interpolate",
            decoder_norm_types="rms_norm", decoder_act_fns="silu",
        ),
        "text_encoder": gemma(), "tokenizer": tokenizer(512),
    }  # fmt: skip


def lumina2() -> dict[str, Any]:
    return {
        "transformer": diffusers.Lumina2Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
            num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 4),
            axes_lens=(300, 64, 64), cap_feat_dim=16,
        ),
        "vae": kl(4), "text_encoder": gemma(), "tokenizer": tokenizer(512),
    }  # fmt: skip


def aura_flow() -> dict[str, Any]:
    umt5 = transformers.UMT5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    return {
        "transformer": diffusers.AuraFlowTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
            attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=16,
            out_channels=4, pos_embed_max_size=256,
        ),
        "vae": kl(shift=None), "text_encoder": transformers.UMT5EncoderModel(umt5), "tokenizer": tokenizer(),
    }  # fmt: skip


def cogview4() -> dict[str, Any]:
    return {
        "transformer": diffusers.CogView4Transformer2DModel(
            patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            out_channels=4, text_embed_dim=16, time_embed_dim=8, condition_dim=4,
        ),
        "vae": kl(shift=None), "text_encoder": transformers.GlmModel(transformers.GlmConfig(**LLM)),
        "tokenizer": tokenizer(512),
    }  # fmt: skip


def prx() -> dict[str, Any]:
    module = {
        name: LLM[name] for name in
        ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    }  # fmt: skip
    module |= {"num_hidden_layers": 2, "sliding_window": 8}
    config = transformers.T5GemmaConfig(encoder=module, decoder=module, vocab_size=32)
    text = transformers.T5GemmaModel(config).encoder
    return {
        "transformer": diffusers.PRXTransformer2DModel(
            patch_size=2, in_channels=4, context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2,
            axes_dim=[4, 4],
        ),
        "vae": kl(), "text_encoder": text, "tokenizer": tokenizer(),
    }  # fmt: skip


def hidream() -> dict[str, Any]:
    clips = transformers.CLIPTextModelWithProjection
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLM, "num_hidden_layers": 4}))
    llama.generation_config.pad_token_id = 0
    llama.config.output_hidden_states = True
    return {
        "transformer": diffusers.HiDreamImageTransformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, caption_channels=[16, 16], text_emb_dim=32, num_routed_experts=2,
            num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(16, 16), llama_layers=(0, 1),
        ),
        "vae": kl(),
        "text_encoder": clip(clips), "text_encoder_2": clip(clips), "text_encoder_3": t5(),
        "text_encoder_4": llama,
        "tokenizer": tokenizer(), "tokenizer_2": tokenizer(), "tokenizer_3": tokenizer(),
        "tokenizer_4": tokenizer(512),
    }  # fmt: skip


def krea2() -> dict[str, Any]:
    text = {**LLM, "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"}}
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision)
    return {
        "transformer": diffusers.Krea2Transformer2DModel(
            in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=2,
            intermediate_size=16, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=2,
            text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=16,
            axes_dims_rope=(4, 2, 2),
        ),
        "vae": qwen_vae(), "text_encoder": transformers.Qwen3VLModel(config), "tokenizer": tokenizer(512),
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


def processor(kind: Any, video: Any) -> Any:
    """Return the processor of a vision language model, around our tokenizer."""
    words = tokenizer(1024)
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    words.add_special_tokens({"additional_special_tokens": marks})
    return kind(transformers.Qwen2VLImageProcessor(), words, video(), chat_template=CHAT)


def qwen3_processor() -> Any:
    return processor(transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor)


def flux2_dev() -> dict[str, Any]:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **LLM}, vision_config={"model_type": "pixtral", **vision}
    )
    return {
        "transformer": flux2_network(True),
        "vae": flux2_vae(),
        "text_encoder": transformers.Mistral3ForConditionalGeneration(config),
        "tokenizer": tokenizer(512),
    }


def ideogram4() -> dict[str, Any]:
    def network() -> Any:
        return diffusers.Ideogram4Transformer2DModel(
            in_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2, intermediate_size=16,
            adaln_dim=16, llm_features_dim=13 * 16, mrope_section=(4, 2, 2),
        )  # fmt: skip

    return {
        "transformer": network(), "unconditional_transformer": network(), "vae": flux2_vae(),
        "text_encoder": qwen3_vl(transformers.Qwen3VLModel, 36), "tokenizer": tokenizer(512),
    }  # fmt: skip


def ovis_image() -> dict[str, Any]:
    return {
        "transformer": diffusers.OvisImageTransformer2DModel(
            in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
        ),
        "vae": kl(), "text_encoder": transformers.Qwen3Model(transformers.Qwen3Config(**LLM)),
        "tokenizer": tokenizer(512),
    }  # fmt: skip


def longcat_image() -> dict[str, Any]:
    return {
        "transformer": diffusers.LongCatImageTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[4, 4, 8],
        ),
        "vae": kl(channels=16), "text_encoder": qwen25_vl(), "tokenizer": tokenizer(512), "text_processor": None,
    }  # fmt: skip


def hunyuan_image(distilled: bool = False) -> dict[str, Any]:
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        spatial_compression_ratio=2, sample_size=16, scaling_factor=0.75,
    )  # fmt: skip
    return {
        "transformer": diffusers.HunyuanImageTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
            num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=16, rope_axes_dim=(4, 4),
            guidance_embeds=distilled, use_meanflow=distilled,
        ),
        "vae": vae, "text_encoder": qwen25_vl(), "tokenizer": tokenizer(128), "text_encoder_2": t5(),
        "tokenizer_2": tokenizer(128),
        "guider": None if distilled else diffusers.AdaptiveProjectedMixGuidance(guidance_scale=3.5),
    }  # fmt: skip


def qwen_image_21() -> dict[str, Any]:
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.8, 1.2, 1.0, 0.9], in_channels=3, out_channels=3,
        is_residual=False,
    )  # fmt: skip
    return {
        "transformer": diffusers.QwenImage21Transformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            context_in_dim=16, axes_dims_rope=(8, 4, 4),
        ),
        "vae": vae, "text_encoder": qwen3_vl(transformers.Qwen3VLForConditionalGeneration),
        "processor": qwen3_processor(),
    }  # fmt: skip


def bria() -> dict[str, Any]:
    return {
        "transformer": diffusers.BriaTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=[4, 4, 8],
        ),
        "vae": kl(), "text_encoder": t5(), "tokenizer": tokenizer(128),
    }  # fmt: skip


def bria_fibo() -> dict[str, Any]:
    words = {**LLM, "vocab_size": 128001}  # the pipeline stands token 128000 for an empty prompt
    return {
        "transformer": diffusers.BriaFiboTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, axes_dims_rope=[4, 4, 8], text_encoder_dim=16,
        ),
        "vae": contrasting(diffusers.AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.8, 1.2, 1.0, 0.9],
        ), 1.3),
        "text_encoder": transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**words)),
        "tokenizer": tokenizer(128),
    }  # fmt: skip


def nucleus_image() -> dict[str, Any]:
    return {
        "transformer": diffusers.NucleusMoEImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, axes_dims_rope=(8, 4, 4), moe_intermediate_dim=16,
            dense_moe_strategy="all_moe", num_experts=2, capacity_factors=2.0,  # every expert takes every token
        ),
        "vae": qwen_vae(), "text_encoder": qwen3_vl(transformers.Qwen3VLForConditionalGeneration, 8),
        "processor": qwen3_processor(),
    }  # fmt: skip


def ernie_image() -> dict[str, Any]:
    vae = flux2_vae()
    vae.register_to_config(batch_norm_eps=1e-5)  # as the pipeline has it, whatever its autoencoder says
    return {
        "transformer": diffusers.ErnieImageTransformer2DModel(
            hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=16, in_channels=16, out_channels=16,
            text_in_dim=16, rope_axes_dim=(4, 4, 8),
        ),
        "vae": vae, "tokenizer": tokenizer(),
        "text_encoder": transformers.MistralModel(transformers.MistralConfig(**LLM)),
    }  # fmt: skip


def kandinsky5() -> dict[str, Any]:
    return {
        "transformer": diffusers.Kandinsky5Transformer3DModel(
            in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=16, time_dim=16, model_dim=32,
            ff_dim=16, num_text_blocks=1, num_visual_blocks=1, axes_dims=(4, 6, 6),
        ),
        "vae": kl(4, shift=None), "text_encoder": qwen25_vl(), "text_encoder_2": clip(), "tokenizer_2": tokenizer(),
        "tokenizer": processor(transformers.Qwen2_5_VLProcessor, transformers.Qwen2VLVideoProcessor),
    }  # fmt: skip


def lumina() -> dict[str, Any]:
    return {
        "transformer": diffusers.LuminaNextDiT2DModel(
            sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=1, num_attention_heads=2,
            num_kv_heads=1, multiple_of=16, cross_attention_dim=16,
        ),
        "vae": kl(4, shift=None), "tokenizer": tokenizer(256),
        "text_encoder": transformers.GemmaModel(transformers.GemmaConfig(**LLM)),
    }  # fmt: skip


def omnigen() -> dict[str, Any]:
    return {
        "transformer": diffusers.OmniGenTransformer2DModel(
            in_channels=4, patch_size=2, hidden_size=16, num_attention_heads=2, num_key_value_heads=2,
            intermediate_size=16, num_layers=1, pad_token_id=0, vocab_size=32, max_position_embeddings=1024,
            rope_scaling={"short_factor": [1.0] * 4, "long_factor": [1.0] * 4}, pos_embed_max_size=16, time_step_dim=16,
        ),
        "vae": kl(4, shift=None), "tokenizer": tokenizer(256),
    }  # fmt: skip


def bria_fibo2() -> dict[str, Any]:
    return {
        "transformer": diffusers.BriaFibo2Transformer2DModel(
            in_channels=4, patch_size=2, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=48,
            injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=2, max_num_gist_tokens=8, gist_step=2,
            gist_min_text_len=16, gist_max_text_len=64, axes_dims=(8, 4, 4), axes_lens=(64, 16, 16),
        ),
        "vae": flux2_vae(), "processor": qwen3_processor(),
        "text_encoder": qwen3_vl(transformers.Qwen3VLForConditionalGeneration),
    }  # fmt: skip


def z_image_omni() -> dict[str, Any]:
    return {**z_image(), "siglip": None, "siglip_processor": None}


def glm_image() -> dict[str, Any]:
    vae = kl(shift=None)
    vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.8, 1.2, 1.0, 0.9])
    return {
        "transformer": diffusers.GlmImageTransformer2DModel(
            patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            text_embed_dim=16, time_embed_dim=8, condition_dim=4, prior_vq_quantizer_codebook_size=32,
        ),
        "vae": vae, "text_encoder": t5(), "tokenizer": tokenizer(), "processor": None, "vision_language_encoder": None,
    }  # fmt: skip


def plan(prompt: Any, height: int, width: int, **unused: Any) -> tuple[Any, None, None]:
    """Stand in for GLM-Image's language model: tokens that depend on the prompt."""
    seed = sum(map(ord, prompt if isinstance(prompt, str) else prompt[0]))
    shape = (1, height // 4 * (width // 4))
    return torch.randint(0, 32, shape, generator=torch.Generator().manual_seed(seed)), None, None


def bright(vae: Any) -> Any:
    """Return a small autoencoder whose images are not black."""
    vae.decoder.layers[-1].bias.data.fill_(0.5)
    return vae


def dreamlite() -> dict[str, Any]:
    return {
        "unet": diffusers.DreamLiteUNetModel(
            in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"), cross_attention_dim=16,
            attention_head_dim=(2, 4), addition_embed_type="time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16,
        ),
        "vae": bright(contrasting(diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1), latent_channels=4,
        ))),
        "text_encoder": qwen3_vl(transformers.Qwen3VLForConditionalGeneration), "tokenizer": tokenizer(512),
        "processor": qwen3_processor(),
    }  # fmt: skip


def hunyuan_dit() -> dict[str, Any]:
    bert = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return {
        "transformer": diffusers.HunyuanDiT2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16,
            num_layers=2, cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=16,
        ),
        "vae": kl(4, shift=None), "text_encoder": transformers.BertModel(bert), "tokenizer": tokenizer(77),
        "text_encoder_2": t5(), "tokenizer_2": tokenizer(256), "safety_checker": None, "feature_extractor": None,
    }  # fmt: skip


def cogview3() -> dict[str, Any]:
    return {
        "transformer": diffusers.CogView3PlusTransformer2DModel(
            patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, out_channels=4,
            text_embed_dim=16, time_embed_dim=8, condition_dim=4, pos_embed_max_size=8, sample_size=8,
        ),
        "vae": kl(shift=None), "text_encoder": t5(), "tokenizer": tokenizer(224),
    }  # fmt: skip


def unet(**config: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2, **config,
    )  # fmt: skip


def stable_diffusion() -> dict[str, Any]:
    return {
        "unet": unet(cross_attention_dim=16), "vae": kl(shift=None), "text_encoder": clip(), "tokenizer": tokenizer(),
        "safety_checker": None, "feature_extractor": None,
    }  # fmt: skip


def stable_diffusion_xl() -> dict[str, Any]:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    return {
        "unet": unet(cross_attention_dim=32, projection_class_embeddings_input_dim=24 + 16, **added),
        "vae": kl(shift=None), "text_encoder": clip(), "tokenizer": tokenizer(), "tokenizer_2": tokenizer(),
        "text_encoder_2": clip(transformers.CLIPTextModelWithProjection),
    }  # fmt: skip


def pixart(sample_size: int = 8) -> dict[str, Any]:
    return {
        "transformer": diffusers.PixArtTransformer2DModel(
            sample_size=sample_size, patch_size=2, in_channels=4, out_channels=8, num_layers=1,
            attention_head_dim=8, num_attention_heads=2, cross_attention_dim=16, caption_channels=16,
        ),
        "vae": kl(shift=None), "text_encoder": t5(), "tokenizer": tokenizer(),
    }  # fmt: skip


def dit() -> dict[str, Any]:
    return {
        "transformer": diffusers.DiTTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=8,
            num_attention_heads=2, num_embeds_ada_norm=1000,
        ),
        "vae": kl(shift=None),
    }  # fmt: skip


SCALED_LINEAR = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "clip_sample": False}
DYNAMIC = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 256}
SHORT = {"max_sequence_length": 32}
TINY: dict[str, Tiny] = {
    "StableDiffusion3Pipeline": Tiny(sd3, {}, {"shift": 3.0}),
    "FluxPipeline": Tiny(flux, SHORT, DYNAMIC),
    "FluxPipeline-dev": Tiny(lambda: flux(True), SHORT, DYNAMIC),
    "ChromaPipeline": Tiny(chroma, SHORT, DYNAMIC),
    "Flux2KleinPipeline": Tiny(flux2_klein, {**SHORT, "text_encoder_out_layers": (0, 1, 2)}, DYNAMIC),
    "QwenImagePipeline": Tiny(qwen_image, SHORT, {**DYNAMIC, "shift_terminal": 0.02}),
    "ZImagePipeline": Tiny(z_image, SHORT, DYNAMIC),
    "SanaPipeline": Tiny(
        sana,
        {**SHORT, "complex_human_instruction": None, "use_resolution_binning": False},
        {"shift": 3.0},
        side=32,
    ),
    "Lumina2Pipeline": Tiny(lumina2, {"max_sequence_length": 64}, DYNAMIC, side=64),
    "AuraFlowPipeline": Tiny(aura_flow, {"max_sequence_length": 12}, {"shift": 1.73}),
    "CogView4Pipeline": Tiny(
        cogview4,
        SHORT,
        {**DYNAMIC, "base_shift": 0.25, "max_shift": 0.75, "time_shift_type": "linear"},
    ),
    "GlmImagePipeline": Tiny(glm_image, SHORT, DYNAMIC),
    "PRXPipeline": Tiny(
        prx,
        {"tokenizer_max_length": 32, "use_resolution_binning": False, "skip_text_cleaning": True},
        {"shift": 3.0},
    ),
    "HiDreamImagePipeline": Tiny(hidream, SHORT, {"use_dynamic_shifting": True}),
    "Krea2Pipeline": Tiny(krea2, SHORT, DYNAMIC, {"text_encoder_select_layers": (1, 3)}),
    "Flux2Pipeline": Tiny(
        flux2_dev, {"max_sequence_length": 128, "text_encoder_out_layers": (0, 1, 2)}, DYNAMIC
    ),
    "Ideogram4Pipeline": Tiny(ideogram4, {**SHORT, "guidance_schedule": (7.0, 7.0, 7.0, 3.0)}),
    "OvisImagePipeline": Tiny(ovis_image, SHORT, DYNAMIC),
    "LongCatImagePipeline": Tiny(longcat_image, {"enable_prompt_rewrite": False}, DYNAMIC),
    "HunyuanImagePipeline": Tiny(hunyuan_image, {}, {"shift": 5.0}),
    "HunyuanImagePipeline-distilled": Tiny(lambda: hunyuan_image(True), {}, {"shift": 4.0}),
    "QwenImage21Pipeline": Tiny(qwen_image_21, {"true_cfg_scale": 4.0}, DYNAMIC),
    "BriaPipeline": Tiny(bria, SHORT, DYNAMIC),
    "BriaPipeline-fixed": Tiny(bria, SHORT, {"shift": 3.0}),
    "BriaFiboPipeline": Tiny(bria_fibo, SHORT, DYNAMIC),
    "BriaFibo2Pipeline": Tiny(bria_fibo2, {}, DYNAMIC),
    "NucleusMoEImagePipeline": Tiny(nucleus_image, {"max_sequence_length": 128}, DYNAMIC),
    "ErnieImagePipeline": Tiny(ernie_image, {}, {"shift": 3.0}),
    "Kandinsky5T2IPipeline": Tiny(kandinsky5, SHORT, {"shift": 5.0}, side=64),
    "LuminaPipeline": Tiny(lumina, {"clean_caption": False}, {"shift": 1.0}, side=64),
    "OmniGenPipeline": Tiny(omnigen, {}, {"invert_sigmas": True, "num_train_timesteps": 1}, side=64),
    "ZImageOmniPipeline": Tiny(z_image_omni, SHORT, DYNAMIC),
    "DreamLitePipeline": Tiny(dreamlite, {}, DYNAMIC),
    "DreamLiteMobilePipeline": Tiny(dreamlite, {}, DYNAMIC),
    "StableDiffusionPipeline": Tiny(stable_diffusion, {}, SCALED_LINEAR),
    "StableDiffusionPipeline-v": Tiny(
        stable_diffusion, {}, {**SCALED_LINEAR, "prediction_type": "v_prediction"}
    ),
    "StableDiffusionXLPipeline": Tiny(stable_diffusion_xl, {}, SCALED_LINEAR),
    "PixArtAlphaPipeline": Tiny(
        pixart, {**SHORT, "use_resolution_binning": False, "clean_caption": False}, LINEAR
    ),
    "PixArtSigmaPipeline": Tiny(
        pixart, {**SHORT, "use_resolution_binning": False, "clean_caption": False}, LINEAR
    ),
    "HunyuanDiTPipeline": Tiny(
        hunyuan_dit,
        {"use_resolution_binning": False},
        {**SCALED_LINEAR, "prediction_type": "v_prediction"},
        {"requires_safety_checker": False},
        side=64,
    ),
    "CogView3PlusPipeline": Tiny(
        cogview3, SHORT, {**SCALED_LINEAR, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    ),
    "DiTPipeline": Tiny(dit, {}, LINEAR, {"id2label": {"0": "tench, fish", "1": "hat"}}),
}


@cache
def checkpoint(name: str) -> Any:
    """Return the tiny stock pipeline of a row of `TINY`; do not change it."""
    tiny = TINY[name]
    torch.manual_seed(0)
    diffusion = "beta_start" in tiny.scheduler
    kind = diffusers.DDIMScheduler if diffusion else diffusers.FlowMatchEulerDiscreteScheduler
    components = {**tiny.components(), "scheduler": kind(**tiny.scheduler)}
    for part in components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    for part, module in components.items():
        if isinstance(module, nn.Module) and part != "vae":
            for parameter in module.parameters():  # large enough that each input has a visible effect
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=0.6 / parameter[0].numel() ** 0.5)
    pipe = getattr(diffusers, name.partition("-")[0])(**components, **tiny.settings)
    pipe.set_progress_bar_config(disable=True)
    if name == "HiDreamImagePipeline":  # which scales every size to one area
        pipe.default_sample_size = 8
    if name == "LongCatImagePipeline":
        pipe.tokenizer_max_length = 32
    if name in ("BriaFiboPipeline", "QwenImage21Pipeline"):  # which take their autoencoder for another
        pipe.vae_scale_factor = 2
    if name == "BriaFibo2Pipeline":
        pipe.text_encoder_out_layers = ((0, 1, 2), (1, 2, 3))
    if "HunyuanImage" in name:
        pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 32, 16
    if name == "GlmImagePipeline":
        pipe.default_sample_size, pipe.generate_prior_tokens = 8, plan
    if name == "Kandinsky5T2IPipeline":
        pipe.resolutions = [(tiny.side, tiny.side)]
    if name == "PRXPipeline":  # whose cleaning of texts needs ftfy
        pipe.text_preprocessor.clean_text = pipe.text_preprocessor.basic_clean = str
    return pipe
