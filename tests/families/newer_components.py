"""Components of tiny checkpoints of the families that came after."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

from .components import qwen_image, z_image
from .parts import (
    LLM,
    MROPE,
    VISION,
    WORDS,
    bright,
    clip,
    contrasting,
    flux2_network,
    flux2_vae,
    kl,
    processor,
    qwen3_processor,
    qwen3_vl,
    qwen25_vl,
    qwen_vae,
    t5,
    tokenizer,
    unet,
)


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


def seeing_qwen() -> Any:
    """Return a text encoder that sees images, where the tokenizer of `processor` marks them."""
    marks = {
        "image_token_id": 24, "video_token_id": 25, "vision_start_token_id": 26, "vision_end_token_id": 27,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(text_config={**LLM, **MROPE}, vision_config=VISION, **marks)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen_image_edit() -> dict[str, Any]:
    words = processor(transformers.Qwen2_5_VLProcessor, transformers.Qwen2VLVideoProcessor)
    return {**qwen_image(), "text_encoder": seeing_qwen(), "processor": words}


def longcat_image_edit() -> dict[str, Any]:
    words = processor(transformers.Qwen2_5_VLProcessor, transformers.Qwen2VLVideoProcessor)
    parts = {"text_encoder": seeing_qwen(), "tokenizer": words.tokenizer, "text_processor": words}
    return {**longcat_image(), **parts}


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


def kolors() -> dict[str, Any]:
    """Return Kolors, with a tokenizer that is trained on our words; skip the test where its package is missing."""
    pytest.importorskip("sentencepiece", reason="Kolors needs sentencepiece")
    from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
    from sentencepiece import SentencePieceTrainer

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    file = folder / "tokenizer.model"
    with file.open("wb") as written:
        SentencePieceTrainer.train(
            sentence_iterator=iter([WORDS]), model_writer=written, vocab_size=60, hard_vocab_limit=False,
            character_coverage=1.0, minloglevel=2,
        )  # fmt: skip
    words = ChatGLMTokenizer(str(file), model_max_length=256)
    encoder = ChatGLMConfig(
        num_layers=2, padded_vocab_size=words.vocab_size, hidden_size=16, ffn_hidden_size=16, kv_channels=8,
        num_attention_heads=2, seq_length=256, multi_query_attention=True, multi_query_group_num=1,
        add_qkv_bias=True, rmsnorm=True, original_rope=True, add_bias_linear=False, bias_dropout_fusion=False,
    )  # fmt: skip
    language = ChatGLMModel(encoder, empty_init=False)
    for name, parameter in language.named_parameters():
        if "norm" in name:  # which it leaves as they are in memory
            parameter.data.fill_(1.0)
    network = unet(
        cross_attention_dim=16, encoder_hid_dim=16, encoder_hid_dim_type="text_proj",
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=24 + 16,
    )  # fmt: skip
    return {
        "unet": network, "vae": kl(shift=None), "text_encoder": language, "tokenizer": words,
    }  # fmt: skip
