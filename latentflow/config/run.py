"""Settings of a training run: its data, and all others together; its presets by size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from ..errors import UserError
from ..utils.flags import Essential
from .fine_tune import AdapterConfig, FineTuningConfig
from .flow import AlignmentConfig, FlowConfig, RoutingConfig
from .loop import LoopConfig
from .model import AutoencoderConfig, NetworkConfig, TextConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images, with their captions, classes and masks."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder of images, tar shards, a zip file, a table, a saved data set, hub:owner/name, a .yaml that mixes
    several, or `shapes` (docs/data.md)."""
    resolution: Annotated[int, Essential("data")] = 64
    """Side in pixels to which images are resized and centre-cropped (with --buckets: of a square of as many
    pixels)."""
    background: str = "white"
    """Colour behind transparent images: a name or #rrggbb."""
    condition: Annotated[Literal["auto", "none", "class", "text"], Essential("data")] = "auto"
    """Condition of the model. auto: captions if there are any, else classes (subfolders), else none."""
    missing_caption: Literal["error", "empty", "skip"] = "error"
    """What to do with images that have no caption: stop with an error, train on an empty caption, or skip them."""
    masks: Annotated[Literal["auto", "none", "alpha"], Essential("data")] = "auto"
    """Your own inpainting masks. auto: the metadata's mask column, else cat-mask.png beside cat.png. alpha: repaint
    what is transparent."""
    columns: dict[str, str] = field(default_factory=dict)
    """Rename table columns: pairs of our name and yours, such as `image photo text caption`."""
    colours: Literal["srgb", "stored"] = "srgb"
    """srgb converts images that have another colour profile to sRGB; stored takes all pixel values as they are."""
    shuffle_tags: int = 0
    """For captions that are lists of tags separated by commas: train on this many random orders of each list. 0
    keeps the order as it is."""
    keep_tags: int = 0
    """With --shuffle-tags: this many tags keep their place at the front."""
    validation: float = 0.02
    """Share of the images that is held out for validation."""
    random_flip: Annotated[bool, Essential("data")] = False
    """Mirror images at random."""

    def wanted(self) -> dict[str, Any]:
        """Return the keyword arguments of `find_source`."""
        names = ("condition", "missing_caption", "masks", "columns", "colours", "shuffle_tags", "keep_tags")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class FramingConfig:
    """Cropping of the images."""

    buckets: Annotated[bool, Essential("data")] = False
    """Train on several aspect ratios, each image on the one nearest to its own, so that little is cropped away."""
    crops: int = 1
    """Number of crops of each image, at random places along its longer side. 1: only the centre."""
    mirror_captions: bool = False
    """With --random-flip: swap the words left and right in the captions of mirrored images."""
    size_conditioning: bool = False
    """Condition the network on the original size of each image and on what was cropped away (SDXL,
    arXiv:2307.01952)."""

    def __post_init__(self) -> None:
        if not 1 <= self.crops <= 64:
            raise UserError(f"--crops is {self.crops}", "Use 1 (the centre) to 64; each is encoded once.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Turn a folder of images into a diffusers pipeline; the same line again resumes."""

    data: DataConfig
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """Run folder. The result is its subfolder `pipeline`."""
    init_from: Annotated[str | None, Essential()] = None
    """Fine-tune: start from the weights of this pipeline."""
    vae: Annotated[str | None, Essential()] = None
    """Pretrained autoencoder of diffusers (folder or hub id). Default: train one on your images first."""
    export_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the weights in `pipeline`; the run's checkpoints keep float32."""
    push_to_hub: str | None = None
    """Upload the result to the Hugging Face hub under this name (owner/name). A new repository is private."""
    dry_run: Annotated[bool, Essential()] = False
    """Print the plan, sizes and an estimate of memory and time, then stop."""
    fine_tuning: FineTuningConfig = FineTuningConfig()
    framing: FramingConfig = FramingConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    network: NetworkConfig = NetworkConfig()
    text: TextConfig = TextConfig()
    adapter: AdapterConfig = AdapterConfig()
    flow: FlowConfig = FlowConfig()
    routing: RoutingConfig = RoutingConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    loop: LoopConfig = LoopConfig()

    def __post_init__(self) -> None:
        if self.framing.mirror_captions and not self.data.random_flip:
            raise UserError(
                "--mirror-captions without --random-flip", "Add --random-flip: nothing is mirrored."
            )
        if not self.init_from:
            for name in ("prior_samples", "prior_prompts"):
                if getattr(self.fine_tuning, name):
                    raise UserError(
                        f"--{name.replace('_', '-')} without --init-from",
                        "Name the checkpoint that should be kept.",
                    )
        if self.adapter.lora_rank and not self.init_from:
            raise UserError("--lora-rank without --init-from", "Name the checkpoint that it adapts.")
        if self.adapter.lora_rank and self.loop.ema_lengths:
            raise UserError(
                "--ema-lengths with --lora-rank: averages of another length are not made for adapters",
                "Leave out one of the two.",
            )


#: Values for `latentflow train --preset`: data, autoencoder, network and loop together.
PRESETS: dict[str, dict[str, Any]] = {
    # Minutes on two CPU cores; what the tutorials and benchmarks use.
    "tiny": {
        "resolution": 32,
        "latent_channels": 16,
        "autoencoder_widths": (24, 48, 96, 128),
        "encoder_layers": (0, 1, 1, 1),
        "decoder_layers": (1, 1, 1, 1),
        "autoencoder_steps": 600,
        "network_preset": "tiny",
        "text_width": 192,
        "text_heads": 3,
        "max_train_steps": 800,
        "train_batch_size": 128,
        "learning_rate": 2e-3,
        "optimizer": "muon",
        "validation_steps": 200,
        "preview_steps": 200,
        "checkpointing_steps": 200,
    },
    # An hour or two on a few CPU cores, minutes on a GPU.
    "small": {
        "resolution": 64,
        "latent_channels": 16,
        "network_preset": "small",
        "max_train_steps": 20_000,
        "train_batch_size": 64,
        "learning_rate": 2e-3,
        "optimizer": "muon",
    },
    # A GPU for a day.
    "base": {
        "resolution": 256,
        "latent_channels": 16,
        "autoencoder_widths": (64, 128, 256, 512),
        "encoder_layers": (0, 2, 2, 3),
        "decoder_layers": (1, 2, 2, 3),
        "autoencoder_steps": 50_000,
        "network_preset": "small",
        "width": 768,
        "depth": 12,
        "heads": 12,
        "patch_size": 2,
        "max_train_steps": 200_000,
        "train_batch_size": 128,
        "learning_rate": 3e-4,
        "optimizer": "adamw",
    },
}
