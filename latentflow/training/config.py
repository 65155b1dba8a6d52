"""The settings of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from ..autoencoder import AutoencoderConfig
from ..data.config import DataConfig, FramingConfig
from ..errors import UserError
from ..models.config import NetworkConfig, TextConfig
from .fine_tune.adapters import AdapterConfig
from .fine_tune.defaults import FineTuningConfig, refuse_without_base
from .loop.config import LoopConfig
from .losses.alignment import AlignmentConfig
from .losses.flow import FlowConfig
from .losses.routing import RoutingConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Turn a folder of images into a diffusers pipeline; the same line again resumes."""

    data: DataConfig
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """Run folder; the result is its subfolder `pipeline`."""
    init_from: str | None = None
    """Fine-tune: start from the weights of this pipeline folder."""
    vae: str | None = None
    """A pretrained diffusers autoencoder (folder or hub id). Empty: one is trained on the data first."""
    export_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the weights in `pipeline`; the run's checkpoints keep float32."""
    push_to_hub: str | None = None
    """Put the result on the Hugging Face hub under this name, owner/name. A new repository is private."""
    dry_run: bool = False
    """Print the plan, the sizes and an estimate of memory and time, and stop."""
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
            refuse_without_base(self.fine_tuning)
        if self.adapter.lora_rank and not self.init_from:
            raise UserError("--lora-rank without --init-from", "Name the checkpoint that it adapts.")
        if self.adapter.lora_rank and self.loop.ema_lengths:
            raise UserError(
                "--ema-lengths with --lora-rank: averages of another length are not made for adapters",
                "Leave out one of the two.",
            )
