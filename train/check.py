"""Check the images of a data set: `latentflow check DATA`. Exit status 1 on what would break a training."""

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
from latentflow.data.checking.check import check_data
from latentflow.data.checking.page import contact_sheet, report_page
from latentflow.data.checking.suggest import suggest
from latentflow.data.sources.kinds import Condition, Masks, MissingCaption
from latentflow.errors import UserError, one_line, printable
from latentflow.utils.html_page import refuse_existing


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Report what your images are, how a training would use them, and how to start one."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder of images, or any other data that `latentflow train` takes."""
    condition: Condition = "auto"
    """What the model is conditioned on; auto: captions if there are any, else classes, else nothing."""
    missing_caption: MissingCaption = "error"
    """What to do with images that have no caption."""
    masks: Masks = "auto"
    """Your own masks; auto: from the metadata and from files such as cat-mask.png; alpha: from the alpha channels."""
    columns: dict[str, str] = field(default_factory=dict)
    """Rename table columns: pairs of our name and yours, e.g. `image picture text caption`."""
    json: bool = False
    """Print the report as JSON."""
    sheet: str | None = None
    """Write a contact sheet, one image that shows up to 80 of them, to this file (.png)."""
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
    report, source = check_data(
        config.data,
        condition=config.condition,
        missing_caption=config.missing_caption,
        masks=config.masks,
        columns=config.columns,
        progress=sys.stderr.isatty(),
    )
    suggestion = suggest(report, gpu=torch.cuda.is_available(), flags=training_flags(config))
    if config.json:
        values = report.as_dict() | {
            "suggestion": None if suggestion is None else dataclasses.asdict(suggestion)
        }
        text = json.dumps(values, indent=2, ensure_ascii=False)
        # Characters that cannot be written, or would steer a terminal, become JSON's escapes.
        print("".join(c if c == printable(c) else json.dumps(c)[1:-1] for c in text))
    else:
        print("\n".join(report.lines()))
        if suggestion is not None:
            print(f"\nto start a training:\n  {one_line(suggestion.command)}")
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
    """Return the flags on the data that a training needs as well."""
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
