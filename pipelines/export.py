"""Write a pipeline folder to share, or an adapter alone: `latentflow export runs/cats -o cats`.

latentflow export runs/cats -o cats
latentflow export checkpoints/emoji-64 --lora runs/hats=0.8 -o emoji-with-hats
latentflow export runs/hats --adapter -o hats
latentflow export runs/hats --adapter --layout comfyui -o hats-comfyui
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from latentflow.cli import parse, run
from latentflow.config import AdapterChoice
from latentflow.errors import UserError, one_line
from latentflow.inference.opening import check_checkpoint, open_pipeline, split_adapter, with_run_adapter
from latentflow.utils.files import result_of, unfinished_run


@dataclass(frozen=True, kw_only=True)
class ExportConfig(AdapterChoice):
    """Write a pipeline folder from a run, finished or not, or from a checkpoint with adapters merged into it (--lora,
    --fast). With --adapter, write the adapter of a run alone."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_PIPELINE")]
    """Run folder, pipeline folder or hub id; with --adapter the run that trained the adapter."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """Folder to write. It must be new or empty."""
    adapter: bool = False
    """Write the run's adapter alone: a small file."""
    layout: Literal["diffusers", "comfyui", "kohya"] = "diffusers"
    """With --adapter: the names of the file's tensors, for the program that is going to read it. Stock diffusers reads
    them all."""
    export_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the pipeline's weights."""


def main(argv: Sequence[str] | None = None) -> None:
    """Write the pipeline, or the adapter."""
    config = parse(ExportConfig, argv, prog="latentflow export", description=__doc__ or "")
    output = Path(config.output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"-o {output} exists", "Choose another folder: nothing is overwritten.")
    if config.adapter and (config.lora or config.fast):
        raise UserError(
            "--adapter writes the run's adapter alone, and --lora or --fast merge adapters into a pipeline",
            "Give one of them.",
        )
    if config.adapter and config.export_dtype != "float32":
        raise UserError(
            "--export-dtype has no effect with --adapter, which copies the adapter",
            "Leave --export-dtype out.",
        )
    if config.layout != "diffusers" and not config.adapter:
        raise UserError(
            f"--layout {config.layout} is for adapters alone", "Add --adapter, or leave --layout out."
        )

    if not config.adapter:
        check_checkpoint(config.source, config.checkpoint_config)

    from latentflow.pipeline.adapter_conversion import write_in_layout
    from latentflow.pipeline.tuned import FILE as TUNED_SOLVERS
    from latentflow.training.loop.run_folder import write_folder

    # ---- the adapter alone ----
    if config.adapter:
        made = Path(config.source) / "adapter"
        if not made.is_dir():
            raise UserError(
                f"{config.source} holds no adapter",
                "Give the folder of a finished run that was trained with --lora-rank. The line that started a run "
                "finishes it.",
            )

        def copy_adapter(folder: Path) -> None:
            shutil.copytree(made, folder, dirs_exist_ok=True)
            has_pipeline = (Path(config.source) / "pipeline").is_dir()
            if has_pipeline and not (folder / "README.md").exists():  # from before adapters had cards
                add_adapter_card(folder, Path(config.source), config.output)
            move_card(folder, config.output)
            if config.layout != "diffusers":
                kind = stock_class(Path(config.source))
                for file in made.glob("*.safetensors"):
                    write_in_layout(file, folder / file.name, config.layout, kind)

        write_folder(output, copy_adapter)
        print(output)
        return

    # ---- the pipeline, with adapters merged ----
    import torch

    from latentflow.pipeline import LatentFlowPipeline
    from latentflow.training.export import pipeline_facts
    from latentflow.training.report.card import write_card, write_export_card

    source, choice = with_run_adapter(config.source, config)
    pipe = open_pipeline(LatentFlowPipeline, source, "cpu", choice)
    if choice.lora and not hasattr(
        pipe, "merge_lora_weights"
    ):  # a pretrained model, beside whose weights they are
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    pipe = pipe.to(dtype=getattr(torch, config.export_dtype))
    adapters = [*["fast"] * choice.fast, *map(adapter_name, choice.lora)]
    origin = Path(result_of(source))

    def write(folder: Path) -> None:
        pipe.save_pretrained(folder)
        if not adapters and (origin / TUNED_SOLVERS).is_file():
            shutil.copyfile(origin / TUNED_SOLVERS, folder / TUNED_SOLVERS)
        facts = pipeline_facts(pipe, where=one_line(config.output))
        if unfinished_run(source) and not adapters:
            write_card(folder, Path(source), facts)
        elif adapters or not (origin / "README.md").is_file():
            write_export_card(folder, facts, source, adapters)
        else:
            for name in ("README.md", "sample.png"):
                if (origin / name).is_file():
                    shutil.copyfile(origin / name, folder / name)
            move_card(folder, config.output)

    write_folder(output, write)
    print(output)


def stock_class(run_folder: Path) -> Any:
    """Return diffusers' class of the pipeline that a run has adapted; None: one of ours.

    Raises:
        UserError: the run folder holds neither its pipeline nor its settings, or names a base that is gone or that
            diffusers does not know.
    """
    import diffusers

    from latentflow.families.index import pipeline_class
    from latentflow.training.report.folder import read_run

    base = result_of(str(run_folder))
    if not (Path(base) / "model_index.json").is_file():  # the run did not keep its pipeline
        base = read_run(run_folder).config.get("init_from", base)
    name = str(pipeline_class(base))
    if name.startswith("LatentFlow"):
        return None
    if not hasattr(diffusers, name):
        raise UserError(
            f"--layout: diffusers knows no {name}, which is what {base} is", "Leave --layout out."
        )
    return getattr(diffusers, name)


def move_card(folder: Path, place: str) -> None:
    """Let the card in a folder load from ``place``, where the folder is going to be, if nobody has changed it."""
    from latentflow.training.report.export import moved

    if (card := folder / "README.md").is_file():
        text = moved(card.read_text(encoding="utf-8", errors="surrogateescape"), one_line(place))
        card.write_text(text, encoding="utf-8", errors="surrogateescape")


def add_adapter_card(folder: Path, run_folder: Path, place: str) -> None:
    """Write the card of a run's adapter into a folder that is going to be at ``place``."""
    from latentflow.pipeline import LatentFlowPipeline
    from latentflow.training.export import pipeline_facts
    from latentflow.training.report.card import write_adapter_card
    from latentflow.utils.components import quiet_libraries

    quiet_libraries()
    pipe = LatentFlowPipeline.from_pretrained(run_folder / "pipeline")
    write_adapter_card(folder, run_folder, pipeline_facts(pipe, where=one_line(place)))


def adapter_name(text: str) -> str:
    """Return the name of an adapter as --lora takes it, with its weight and licence, for the card."""
    from latentflow.training.report.origins import checkpoint_origin

    source, weight = split_adapter(text)
    origin = checkpoint_origin(source)
    facts = [f"weight {weight:g}"] * (weight != 1)
    facts += [f"licence: {origin.license}, as its card states"] * bool(origin.license)
    return origin.name + (f" ({'; '.join(facts)})" if facts else "")


if __name__ == "__main__":
    run(main)
