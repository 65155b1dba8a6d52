"""Settings of every program that samples images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True, kw_only=True)
class AdapterChoice:
    """Adapters to add to the checkpoint, another decoder, options of its family, and the pipeline that a single file
    belongs to."""

    fast: bool = False
    """Generate in a few evaluations, with the few-step adapter that comes with the checkpoint (its folder
    `fast`)."""
    lora: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="FILE[=WEIGHT]")] = ()
    """Adapter (LoRA) to add: a file, folder, run folder or hub id, with an optional weight, such as runs/hats=0.8.
    Repeat the flag for several."""
    lora_any_base: bool = False
    """Accept adapters that were made for another base checkpoint of the same architecture."""
    vae: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Decode with this autoencoder (folder or hub id) in place of the checkpoint's own: a tiny one, such as TAESD, is
    many times faster, and takes little memory."""
    family_options: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE ...")] = ()
    """Options of a pretrained model's family: arguments of its own pipeline in diffusers, such as
    max_sequence_length=256 or true_cfg_scale=4."""
    checkpoint_config: Annotated[str | None, tyro.conf.arg(metavar="FOLDER_OR_HUB_ID")] = None
    """Pipeline that a checkpoint in one file belongs to, which has what the file lacks. Default: the hub repository by
    which diffusers recognises the file, whose files are downloaded."""


@dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """Less memory for large checkpoints (docs/guide/pretrained.md)."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights. auto: as they are stored, for a pretrained model on a GPU; else float32 (on a CPU a
    pretrained model's text encoders stay as they are stored)."""
    quantize: Literal["nf4", "int8", "float8"] | None = None
    """Keep the weights of networks and language models in 4 bits (nf4: needs a GPU and bitsandbytes) or 8 bits (int8,
    float8: need torchao)."""
    offload: Literal["model", "group", "sequential"] | None = None
    """Let weights wait in main memory, and bring them to the GPU when they are needed: a whole component (model), a
    layer while the one before computes (group), or one layer after the other (sequential, slow; it needs least)."""
    vae_tiling: bool = False
    """Encode and decode large images in tiles, which blend into one another."""
    variant: str | None = None
    """Variant of the files of weights, such as fp16."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(AdapterChoice):
    """Sampling of images, and the files they are written to."""

    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = "out.png"
    """Image file to write; several images become FILE-1, FILE-2, ... Existing files are kept and the next free
    number is used, unless --overwrite is given."""
    checkpoint: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Pipeline folder, run folder, hub id, or a pretrained model in one .safetensors or .gguf file. Default: the
    checkpoint that comes with latentflow."""
    class_labels: Annotated[tuple[str, ...], tyro.conf.arg(name="class", metavar="NAME ...")] = ()
    """Classes to generate, by name or number, for checkpoints that were trained on classes."""
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """Number of images per prompt or class."""
    seed: int = 0
    """Image i is generated from seed + i."""
    steps: int | None = None
    """Number of steps from noise to image. Default: 16, of one evaluation each (two of the network with guidance); for
    a few-step checkpoint the number it was made for; with --solver, and in methods that fill or edit, 20 (of tokens
    always 16)."""
    guidance: float | None = None
    """Guidance scale: how strongly the prompt or class is followed. 1 is off, and twice as fast. Default: the
    checkpoint's own, else 4, of tokens 2; 1 for checkpoints that have learned their guidance."""
    solver: str | None = None
    """tuned (what `latentflow tune-sampler` has fitted), euler, midpoint, heun, ralston, rk4, adams-bashforth-2,
    adams-bashforth-3, dpm-solver++2m, exponential-adams, dopri5; or, adding fresh noise, euler-maruyama,
    stochastic-heun, ddpm, churn, langevin; or scheduler, the one of a pretrained model. Default: the checkpoint's
    scheduler if it has one, else what was tuned for these steps, else exponential-adams (a pretrained model: euler).
    Checkpoints of tokens: exact (the default), euler, tau-leaping, random, halton or confidence."""
    negative: str | None = None
    """Negative prompt: what the image should not show."""
    scale: int = 1
    """Enlarge the finished image this many times."""
    overwrite: bool = False
    """Replace existing files."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ..."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)


@dataclass(frozen=True, kw_only=True)
class TokenSamplingConfig(SamplingConfig):
    """Sampling of images, also from checkpoints of tokens."""

    temperature: float = 1.0
    """Checkpoints of tokens, or that predict codes: below 1 likely tokens are drawn more often, above 1 less often."""
    corrector: float = 0.0
    """Checkpoints of tokens: how many times each token is drawn again on the way; 1 to 5 can mend what few steps got
    wrong."""
