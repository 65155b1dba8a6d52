"""What is in your images: `latentflow check DATA`. Exit status 1 on what would break a training."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro
from PIL import Image

from latentflow.cli import parse, run
from latentflow.data.checking import contact_sheet, look_through, report_page, suggest
from latentflow.data.sources.assemble import Masks
from latentflow.data.sources.kinds import Condition, MissingCaption
from latentflow.errors import UserError, one_line, printable
from latentflow.utils.html_page import refuse_existing


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Report what is in your images, what a training would make of them, and how to start one."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder of images, or any other data that `latentflow train` takes."""
    condition: Condition = "auto"
    """What to condition on; auto takes the first of captions, classes, nothing."""
    missing_caption: MissingCaption = "error"
    """What becomes of images without a caption."""
    masks: Masks = "auto"
    """Your own masks: of metadata and files, none, or the alpha channels."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of a table that are called otherwise: our name, then theirs."""
    json: bool = False
    """Print the report as JSON."""
    sheet: str | None = None
    """Write a contact sheet, an image of some images, to this file (.png)."""
    report: str | None = None
    """Write the report as one web page to this file (.html)."""
    overwrite: bool = False
    """Replace the files of --sheet and --report if they exist."""


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(CheckConfig, argv, prog="latentflow check")
    for flag, file, suffix in (("--sheet", config.sheet, ".png"), ("--report", config.report, ".html")):
        if file is not None and Path(file).suffix.lower() != suffix:
            raise UserError(f"{flag} {file} does not end in {suffix}", f"Name it {Path(file).stem}{suffix}.")
        if file is not None:
            refuse_existing(file, config.overwrite)
    report, source = look_through(
        config.data,
        condition=config.condition,
        missing_caption=config.missing_caption,
        masks=config.masks,
        columns=config.columns,
        progress=sys.stderr.isatty(),
    )
    suggestion = suggest(report, gpu=torch.cuda.is_available(), flags=training_flags(config))
    if config.json:
        told = report.as_dict() | {
            "suggestion": None if suggestion is None else dataclasses.asdict(suggestion)
        }
        text = json.dumps(told, indent=2, ensure_ascii=False)
        # What cannot be written, or would steer a terminal, stands there in JSON's escapes.
        print("".join(one if one == printable(one) else json.dumps(one)[1:-1] for one in text))
    else:
        print("\n".join(report.lines()))
        if suggestion is not None:
            print(f"\nto start with:\n  {one_line(suggestion.command)}")
            print("\n".join(f"    {choice}: {one_line(why)}" for choice, why in suggestion.reasons.items()))
    if config.sheet is not None and source is not None and len(source):
        save_sheet(contact_sheet(source), Path(config.sheet))
    if config.report is not None:
        report_page(report, source, suggestion).write(config.report, config.overwrite)
    for file in (config.sheet, config.report):
        if file is not None and Path(file).exists():
            print(f"written: {one_line(file)}", file=sys.stderr)
    if report.problems:
        sys.exit(1)


def save_sheet(sheet: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except OSError as error:
        raise UserError(
            f"--sheet {path} cannot be written: {error.strerror}", "Choose another place."
        ) from error


def training_flags(config: CheckConfig) -> tuple[str, ...]:
    """What was said of the data here, for the command line of a training."""
    default = CheckConfig(data="")
    names = ("condition", "missing_caption", "masks")
    flags = [
        word
        for name in names
        if getattr(config, name) != getattr(default, name)
        for word in ("--" + name.replace("_", "-"), getattr(config, name))
    ]
    renamed = [word for pair in config.columns.items() for word in pair]
    return (*flags, *(["--columns", *renamed] if renamed else []))


if __name__ == "__main__":
    run(main)
