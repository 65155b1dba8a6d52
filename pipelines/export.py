"""Merge adapters into a pipeline, or write a run's adapter alone: `latentflow export runs/hats --adapter -o hats`.

latentflow export checkpoints/emoji-64 --lora runs/hats:0.8 -o emoji-with-hats
latentflow export runs/hats --adapter -o hats
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from latentflow.cli import parse, run
from latentflow.config import AdapterChoice
from latentflow.errors import UserError
from latentflow.inference.sample import open_pipeline


@dataclass(frozen=True, kw_only=True)
class ExportConfig(AdapterChoice):
    """Merge adapters (--lora) into a pipeline folder of their own, or write the adapter of a run (--adapter)."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_PIPELINE")]
    """The pipeline folder, run folder or hub id to merge into; with --adapter the run that made the adapter."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """The folder to write. It must be empty or new."""
    adapter: bool = False
    """Write the adapter alone."""
    export_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the merged weights."""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the merged pipeline, or the adapter."""
    config = parse(ExportConfig, argv, prog="latentflow export", description=__doc__ or "")
    output = Path(config.output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"-o {output} exists", "Nothing is overwritten: choose another folder.")
    if config.adapter == bool(config.lora or config.fast):
        raise UserError(
            "give either --lora or --fast (merge these) or --adapter (write the run's adapter alone)",
            "latentflow export --help shows both.",
        )

    if config.adapter and config.export_dtype != "float32":
        raise UserError(
            "--export-dtype has no effect with --adapter, which copies the adapter",
            "Leave --export-dtype out.",
        )

    from latentflow.training.loop.run_folder import write_folder

    # ---- the adapter alone ----
    if config.adapter:
        made = Path(config.source) / "adapter"
        if not made.is_dir():
            raise UserError(
                f"{config.source} holds no adapter",
                "Give the folder of a finished run with --lora-rank; the line that started it finishes it.",
            )
        write_folder(output, partial(shutil.copytree, made, dirs_exist_ok=True))
        print(output)
        return

    # ---- merged ----
    import torch

    from latentflow.pipeline import LatentFlowPipeline

    pipe = open_pipeline(LatentFlowPipeline, config.source, "cpu", config)
    write_folder(output, pipe.to(dtype=getattr(torch, config.export_dtype)).save_pretrained)
    print(output)


if __name__ == "__main__":
    run(main)
