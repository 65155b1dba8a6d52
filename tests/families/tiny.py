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


def kl(blocks: int = 2, shift: float | None = 0.1) -> Any:
    """Return an autoencoder that halves the sides of images ``blocks`` - 1 times."""
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * blocks, up_block_types=["UpDecoderBlock2D"] * blocks,
        block_out_channels=[8] * blocks, layers_per_block=1, norm_num_groups=4,
        latent_channels=4, scaling_factor=0.6, shift_factor=shift,
    )  # fmt: skip
    for module in vae.modules():  # so that its images have contrast
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(1.5)
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
    "PRXPipeline": Tiny(
        prx,
        {"tokenizer_max_length": 32, "use_resolution_binning": False, "skip_text_cleaning": True},
        {"shift": 3.0},
    ),
    "HiDreamImagePipeline": Tiny(hidream, SHORT, {"use_dynamic_shifting": True}),
    "Krea2Pipeline": Tiny(krea2, SHORT, DYNAMIC, {"text_encoder_select_layers": (1, 3)}),
    "StableDiffusionPipeline": Tiny(stable_diffusion, {}, SCALED_LINEAR),
    "StableDiffusionPipeline-v": Tiny(
        stable_diffusion, {}, {**SCALED_LINEAR, "prediction_type": "v_prediction"}
    ),
    "StableDiffusionXLPipeline": Tiny(stable_diffusion_xl, {}, SCALED_LINEAR),
    "PixArtAlphaPipeline": Tiny(
        pixart, {**SHORT, "use_resolution_binning": False, "clean_caption": False}, LINEAR
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
    if name == "PRXPipeline":  # whose cleaning of texts needs ftfy
        pipe.text_preprocessor.clean_text = pipe.text_preprocessor.basic_clean = str
    return pipe
