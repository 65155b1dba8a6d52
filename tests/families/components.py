"""Components of tiny checkpoints of the first families, diffusion models among them."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers

from .parts import LLM, clip, flux2_network, flux2_vae, gemma, kl, qwen_vae, t5, tokenizer, unet


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


def flux(guidance_embeds: bool = False, in_channels: int = 16) -> dict[str, Any]:
    return {
        "transformer": diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=in_channels, out_channels=16, num_layers=1, num_single_layers=1,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds,
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


def autoencoder_dc() -> Any:
    """Return the autoencoder of Sana: a factor of 2, 4 channels."""
    return diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=4, scaling_factor=0.5,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu",
    )  # fmt: skip


def sana() -> dict[str, Any]:
    return {
        "transformer": diffusers.SanaTransformer2DModel(
            patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
            attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8,
            cross_attention_dim=16, caption_channels=16, sample_size=8,
        ),
        "vae": autoencoder_dc(),
        "text_encoder": gemma(), "tokenizer": tokenizer(512),
    }  # fmt: skip


def sana_sprint() -> dict[str, Any]:
    built = sana()
    config = {name: value for name, value in built["transformer"].config.items() if not name.startswith("_")}
    settings = {**config, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    return {**built, "transformer": diffusers.SanaTransformer2DModel(**settings)}


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


def cogview4(in_channels: int = 4) -> dict[str, Any]:
    return {
        "transformer": diffusers.CogView4Transformer2DModel(
            patch_size=2, in_channels=in_channels, num_layers=2, attention_head_dim=8, num_attention_heads=2,
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


def stable_diffusion(in_channels: int = 4) -> dict[str, Any]:
    return {
        "unet": unet(in_channels, cross_attention_dim=16), "vae": kl(shift=None), "text_encoder": clip(),
        "tokenizer": tokenizer(), "safety_checker": None, "feature_extractor": None,
    }  # fmt: skip


def latent_consistency() -> dict[str, Any]:
    network = unet(cross_attention_dim=16, time_cond_proj_dim=8)
    return {**stable_diffusion(), "unet": network}


def stable_diffusion_xl(in_channels: int = 4) -> dict[str, Any]:
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    return {
        "unet": unet(in_channels, cross_attention_dim=32, projection_class_embeddings_input_dim=24 + 16, **added),
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
