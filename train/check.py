"""Check your images before training: `latentflow check DATA`. Exits with 1 if something would break a training."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from latentflow.cli import parse, run
from latentflow.config import ControlConfig
from latentflow.errors import UserError, one_line, printable
from latentflow.utils.flags import flag_of
from latentflow.utils.html_page import refuse_existing

if TYPE_CHECKING:
    from PIL import Image

    from latentflow.data import Source
    from latentflow.evaluation.classification import Doubt
    from latentflow.utils.html_page import Page


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Report what is in your images and what would break a training, and suggest commands to start one."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder of images, tar shards, a zip file, a table, a saved data set, hub:owner/name, a .yaml that mixes
    several, or `shapes` (docs/reference/data.md)."""
    condition: Literal["auto", "none", "class", "text"] = "auto"
    """Condition of the model. auto: captions if there are any, else classes, else none."""
    missing_caption: Literal["error", "empty", "skip"] = "error"
    """Handling of images without a caption, or without a class among others that have one: report them as a problem,
    train on them without (empty), or skip them."""
    masks: Literal["auto", "none", "alpha"] = "auto"
    """Your own inpainting masks. auto: the metadata's mask column, else cat-mask.png beside cat.png. alpha: repaint
    what is transparent."""
    control: tuple[Literal["none", "image", "labels"], ...] = ()
    """Kinds of control images to check, as for `latentflow train`: image (edges, depth, sketches), labels (label maps),
    or both."""
    control_folder: str | None = None
    """Folder of the control images, named like their images."""
    control_labels: str | None = None
    """Text file of the labels of label maps, as for `latentflow train`."""
    columns: dict[str, str] = field(default_factory=dict)
    """Rename table columns: pairs of our name and yours, such as `image photo text caption`."""
    audit: Annotated[str | None, tyro.conf.arg(metavar="CHECKPOINT")] = None
    """Also list the labels or captions that this checkpoint, which was trained on such images, doubts, and outliers.
    --sheet shows the most doubtful then, each with its label and the one that fits better; --report both lists."""
    json: bool = False
    """Print the report as JSON."""
    sheet: str | None = None
    """Write a contact sheet, one image that shows up to 80 of yours, to this file (.png); with --control each beside
    its control images."""
    report: str | None = None
    """Write the report and the contact sheet as one web page to this file (.html)."""
    overwrite: bool = False
    """Replace the files of --sheet and --report if they exist."""


def main(argv: Sequence[str] | None = None) -> None:
    """Check the images, print the report and write the files that are asked for."""
    config = parse(CheckConfig, argv, prog="latentflow check")
    for flag, file, suffix in (("--sheet", config.sheet, ".png"), ("--report", config.report, ".html")):
        if file is not None and Path(file).suffix.lower() != suffix:
            raise UserError(f"{flag} {file} does not end in {suffix}", f"Name it {Path(file).stem}{suffix}.")
        if file is not None:
            refuse_existing(file, config.overwrite)

    if config.audit is not None:
        from latentflow.inference.opening import check_checkpoint

        check_checkpoint(config.audit)
    controls = ControlConfig(
        control=config.control, control_folder=config.control_folder, control_labels=config.control_labels
    )

    from latentflow.data.checking.page import contact_sheet, report_page
    from latentflow.data.checking.report import check_data
    from latentflow.data.labels import read_label_file
    from latentflow.training.suggest import Machine, suggest

    report, source = check_data(
        config.data,
        condition=config.condition,
        missing_caption=config.missing_caption,
        masks=config.masks,
        columns=config.columns,
        **controls.wanted(),
        labels=read_label_file(config.control_labels) if config.control_labels else (),
    )
    captions = (
        [text for example in source.examples for text in example.captions] if source is not None else []
    )
    suggestions = suggest(report, Machine.this(), training_flags(config), captions)
    if config.audit is not None and source is None and not report.problems:
        raise UserError(
            f"--audit: {config.data} holds latents, and no images", "Give the images that they were made of."
        )
    doubts = audited(config.audit, source) if config.audit is not None and source is not None else []
    if config.json:
        contents = report.as_dict()
        contents["suggestions"] = [dataclasses.asdict(suggestion) for suggestion in suggestions]
        contents["suggestion"] = next(iter(contents["suggestions"]), None)  # what scripts have read so far
        if config.audit is not None:
            contents["audit"] = [doubt._asdict() for doubt in doubts]
        text = json.dumps(contents, indent=2, ensure_ascii=False)
        # Characters that cannot be written, or would steer a terminal, are written in JSON's escapes.
        print("".join(char if char == printable(char) else json.dumps(char)[1:-1] for char in text))
    else:
        print("\n".join(report.lines()))
        for suggestion in suggestions:
            print(f"\n{suggestion.title}:\n  {one_line(suggestion.command)}")
            print("\n".join(f"    {choice}: {one_line(why)}" for choice, why in suggestion.reasons.items()))
        if doubts:
            print("\n".join(doubt_lines(doubts)))
    if config.sheet is not None and source is not None and len(source):
        save_sheet(doubt_sheet(doubts, source) if doubts else contact_sheet(source), Path(config.sheet))
    if config.report is not None:
        page = report_page(report, source, suggestions)
        if doubts and source is not None:
            add_doubts(page, doubts, source)
        page.write(config.report, config.overwrite)
    for file in (config.sheet, config.report):
        if file is not None and Path(file).exists():
            print(f"written: {one_line(file)}", file=sys.stderr)
    if report.problems:
        sys.exit(1)


def audited(checkpoint: str, source: Source) -> list[Doubt]:
    """Return what a checkpoint makes of each label, the most doubtful first."""
    from latentflow.evaluation.classification import Classifier, audit
    from latentflow.evaluation.data import run_settings
    from latentflow.inference.opening import open_pipeline
    from latentflow.pipeline import LatentFlowPipeline

    pipe = open_pipeline(LatentFlowPipeline, checkpoint, "auto")
    return audit(Classifier(model=pipe.model), source, run_settings(checkpoint, source.name)["background"])


def doubt_lines(doubts: Sequence[Doubt], most: int = 10) -> list[str]:
    """Return lines on the most doubtful labels, and on the images that are least like the others."""
    wrong, far = likely_wrong(doubts), least_like(doubts)[:most]
    lines = [
        f"\n{len(wrong)} of {len(doubts):,} images are likelier with another label (whose loss is lower by so much):"
    ]
    lines += [
        f"  {doubt.image}: {doubt.label}; rather {doubt.rather} (by {-doubt.log_ratio:.3g})"
        for doubt in wrong[:most]
    ]
    lines.append("least like the others (standard deviations of the loss above the mean):")
    lines += [f"  {doubt.image}: {doubt.label} ({doubt.surprise:.1f})" for doubt in far]
    return [printable(line) if line.startswith("  ") else line for line in lines]


def likely_wrong(doubts: Sequence[Doubt]) -> list[Doubt]:
    """Return the images that are likelier with another label than with their own."""
    return [doubt for doubt in doubts if doubt.log_ratio < 0]


def least_like(doubts: Sequence[Doubt]) -> list[Doubt]:
    """Return the images, those first that are least like the others."""
    return sorted(doubts, key=lambda doubt: -doubt.surprise)


def add_doubts(page: Page, doubts: Sequence[Doubt], source: Source) -> None:
    """Add what `doubt_lines` and `doubt_sheet` say to the report's page, in up to 80 images and rows."""
    wrong = likely_wrong(doubts)
    page.heading("Labels that the model doubts")
    page.text(f"{len(wrong)} of {len(doubts):,} images are likelier with another label.")
    page.image(
        doubt_sheet(doubts, source), "The most doubtful first: label > the one that fits better", "webp"
    )
    page.details(f"Likelier with another label: {len(wrong)}").table(
        ["image", "label", "rather", "difference of the losses"],
        [[*map(one_line, doubt[:3]), f"{-doubt.log_ratio:.3g}"] for doubt in wrong[:80]],
    )
    page.details("Least like the others").table(
        ["image", "label", "standard deviations of the loss above the mean"],
        [[*map(one_line, doubt[:2]), f"{doubt.surprise:.1f}"] for doubt in least_like(doubts)[:80]],
    )


def doubt_sheet(doubts: Sequence[Doubt], source: Source, most: int = 80) -> Image.Image:
    """Draw the most doubtful images, each with its label and the one that fits better."""
    from latentflow.data.checking.page import labelled_sheet

    found = {example.name: example for example in source.examples}
    shown = doubts[:most]
    texts = [f"{doubt.label} > {doubt.rather}" if doubt.log_ratio < 0 else doubt.label for doubt in shown]
    return labelled_sheet([found[doubt.image] for doubt in shown], texts)


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Write the contact sheet.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except OSError as error:
        raise UserError(
            f"--sheet {path} cannot be written: {error.strerror}", "Choose another place."
        ) from error


def training_flags(config: CheckConfig) -> tuple[str, ...]:
    """Return the flags of a training that describe the data as they are described here."""
    default = CheckConfig(data="")
    names = ("condition", "missing_caption", "masks", "control", "control_folder", "control_labels")
    changed = {name: value for name in names if (value := getattr(config, name)) != getattr(default, name)}
    flags = [
        word
        for name, value in changed.items()
        for word in (flag_of(name), *([value] if isinstance(value, str) else value))
    ]
    renamed = [word for pair in config.columns.items() for word in pair]
    return (*flags, *(["--columns", *renamed] if renamed else []))


if __name__ == "__main__":
    run(main)
