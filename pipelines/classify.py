"""Say what images show, by a generator: `latentflow classify runs/cats photos`.

    latentflow classify runs/cats photos
    latentflow classify checkpoints/emoji-64 photos --classes "red apple" "green apple" pear --calibrate labelled

The class under which the flow's errors are smallest is the most likely one (diffusion classifiers, arXiv:2303.16203);
all classes are compared with the same noises. Writes the probabilities of each image (JSON) and, beside them, a sheet
of images with their classes (.png). Of IMAGES that have one of the classes themselves it prints how many are right.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from latentflow.cli import parse, run
from latentflow.config import MemoryConfig
from latentflow.errors import UserError, few, finite, printable, whole
from latentflow.utils.html_page import refuse_existing

LARGEST_SEED = 2**62
MOST_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """Classify images by a generator."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Pipeline folder, run folder, such as runs/cats, or hub id."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """A folder of images, or any other data set, as for `latentflow train`."""
    condition: Literal["auto", "none", "class", "text"] = "auto"
    """Condition that IMAGES are read with, as for `latentflow train`; class: some of them may have none."""
    classes: tuple[str, ...] = ()
    """Classes to choose from; for a checkpoint of captions these are captions. Default: the checkpoint's classes; of a
    checkpoint of captions the classes of IMAGES."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "classes.json"
    """File of the result (.json). The sheet of images has the same name (.png)."""
    overwrite: bool = False
    """Replace an existing result and its sheet."""
    method: Literal["flow-matching", "likelihood"] = "flow-matching"
    """flow-matching: compare errors of the velocity. likelihood: compare densities of the flow, which costs some ten
    times as much."""
    evaluations: int = 32
    """Evaluations of the network for each class that remains to the end, an even number."""
    halving: bool = True
    """Drop the worse half of the classes in each round, so that many classes cost little more than few; not of the
    method likelihood."""
    weighting: str = "flow-matching"
    """Weighting of the noise levels, as of `latentflow train --weighting`. likelihood: that of densities."""
    calibrate: Annotated[str | None, tyro.conf.arg(metavar="DATA")] = None
    """Folder of labelled images that the checkpoint was not trained on: the probabilities are adjusted to be right on
    them (temperature scaling). Without it they tend to be too sure."""
    temperature: float | None = None
    """Temperature of the probabilities, as an earlier --calibrate has found it. Default: 1."""
    background: str | None = None
    """Colour behind transparent images. Default: that of the checkpoint's run, else white."""
    seed: int = 0
    """Image i has the noises of seed + i."""
    batch_size: int = 64
    """Images that the network sees at once."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ..."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    def __post_init__(self) -> None:
        whole("--evaluations", self.evaluations, 2, None, fix="Give an even number, such as 32.")
        if self.evaluations % 2:
            raise UserError(
                f"--evaluations is {self.evaluations}", "Give an even number: noises come in pairs."
            )
        if self.method == "likelihood" and self.weighting not in (ClassifyConfig.weighting, "likelihood"):
            raise UserError(
                f"--weighting {self.weighting} with --method likelihood, whose densities have none",
                "Leave it out, or compare errors: --method flow-matching.",
            )
        whole("--seed", self.seed, 0, LARGEST_SEED)
        whole("--batch-size", self.batch_size, 1, None)
        if self.temperature is not None and not finite("--temperature", self.temperature) > 0:
            raise UserError(f"--temperature is {self.temperature}", "Give a positive number.")
        if self.temperature is not None and self.calibrate is not None:
            raise UserError("--temperature and --calibrate", "Give one of the two.")


def main(argv: Sequence[str] | None = None) -> None:
    """Classify images, print what was found and write the result."""
    config = parse(ClassifyConfig, argv, prog="latentflow classify", description=__doc__ or "")
    output = Path(config.output)
    if output.suffix != ".json":
        raise UserError(
            f"the result is JSON, '{output}' is not", f"Did you mean -o {output.with_suffix('.json')}?"
        )
    sheet = output.with_suffix(".png")
    for file in (output, sheet):
        refuse_existing(str(file), config.overwrite)

    from latentflow.inference.opening import check_checkpoint, open_pipeline

    check_checkpoint(config.checkpoint)

    import torch

    from latentflow.data import caption_of_class, find_source, readable
    from latentflow.data.checking.page import labelled_sheet
    from latentflow.evaluation.classification import Classifier, calibrate
    from latentflow.evaluation.data import run_settings
    from latentflow.evaluation.figures import share
    from latentflow.evaluation.report import strict_json
    from latentflow.flow import WEIGHTINGS, make
    from latentflow.pipeline import LatentFlowPipeline

    make(WEIGHTINGS, config.weighting, "weighting")
    source = readable(find_source(config.data, condition=config.condition, missing_caption="empty"))
    pipe = open_pipeline(LatentFlowPipeline, config.checkpoint, config.device, memory=config.memory)
    classifier = Classifier(
        model=pipe.model,
        evaluations=config.evaluations,
        method=config.method,
        weighting=config.weighting,
        halving=config.halving,
        batch_size=config.batch_size,
        seed=config.seed,
    )
    names = class_names(config, pipe.model, source)
    model: Any = pipe.model
    spoken = [*map(caption_of_class, names)] if not config.classes else names
    rows = model.encode_prompt(spoken) if model.takes_text else model.encode_class(names)
    background = config.background or run_settings(config.checkpoint, config.data)["background"]
    numbers = {name: number for number, name in enumerate(names)}

    temperature, calibrated = config.temperature or 1.0, None
    if config.calibrate is not None:
        known = readable(find_source(config.calibrate))
        refuse_unlabelled(known, names, "--calibrate")
        ratios, _ = classifier.compare(classifier.images(known, background), rows)
        calibrated = calibrate(ratios, [numbers[example.label] for example in known.examples])
        temperature = calibrated.temperature
        print(
            f"calibrated on {len(known)} images: temperature {temperature:.4g}, expected calibration error "
            f"{calibrated.before:.1%} before, {calibrated.after:.1%} after"
        )
    ratios, _ = classifier.compare(classifier.images(source, background), rows)
    probabilities = torch.softmax(ratios / temperature, 1)
    order = probabilities.argsort(1, descending=True)
    weighting = "likelihood" if config.method == "likelihood" else config.weighting
    result: dict[str, Any] = {
        "checkpoint": config.checkpoint, "data": source.name, "classes": names, "method": config.method,
        "evaluations": config.evaluations, "weighting": weighting, "seed": config.seed,
        "temperature": temperature,
    }  # fmt: skip
    if calibrated is not None:
        result["calibration"] = calibrated._asdict() | {"data": config.calibrate}
    chosen = order[:, 0].tolist()
    right = [
        names[choice] == example.label
        for example, choice in zip(source.examples, chosen, strict=True)
        if example.label in numbers
    ]
    if source.kind == "class" and right:
        result["right"] = share(sum(right), len(right))
        low, high = result["right"]["interval_95"]
        print(
            f"right: {sum(right) / len(right):.1%} ({sum(right)} of {len(right)}; 95 %: {low:.1%} to {high:.1%})"
        )
    result["images"] = [
        {
            "image": example.name,
            "class": names[int(places[0])],
            "probabilities": {names[int(place)]: float(found[place]) for place in places[:5]},
        }
        for example, places, found in zip(source.examples, order, probabilities, strict=True)
    ]
    for entry in result["images"][:20]:
        best = ", ".join(f"{name} {value:.1%}" for name, value in list(entry["probabilities"].items())[:3])
        print(printable(f"  {entry['image']}: {best}"))
    if len(source) > 20:
        print(f"  ... {len(source) - 20:,} more")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(strict_json(result), indent=2, ensure_ascii=False), encoding="utf-8")
    texts = [
        f"{names[place]} {float(row[place]):.0%}" for place, row in zip(chosen, probabilities, strict=True)
    ]
    labelled_sheet(source.examples[:200], texts[:200]).save(sheet)
    print(f"Wrote {output}, {sheet}")


def class_names(config: ClassifyConfig, model: Any, source: Any) -> list[str]:
    """Return the classes to choose from.

    Raises:
        UserError: there are none, one, or too many; the checkpoint takes no condition; names are given twice.
    """
    if not model.takes_text and not model.takes_classes:
        raise UserError(
            "this checkpoint takes neither classes nor captions",
            "Nothing tells it one kind of image from another.",
        )
    names = list(config.classes or (model.classes if model.takes_classes else source.classes))
    if not names:
        raise UserError(
            f"the checkpoint draws from captions, and {source.name} has no classes",
            'Give captions to choose from: --classes "red apple" "green apple".',
        )
    if len({*names}) < len(names):
        raise UserError(f"--classes names some twice: {few(names)}", "Give each once.")
    if len(names) < 2:
        raise UserError(f"there is one class to choose from: {names[0]}", "Give at least two: --classes.")
    if len(names) > MOST_CLASSES:
        raise UserError(f"{len(names):,} classes", f"Give at most {MOST_CLASSES:,}: --classes.")
    return names


def refuse_unlabelled(source: Any, names: Sequence[str], flag: str) -> None:
    """Refuse data without classes, or with others than these."""
    if source.kind != "class":
        raise UserError(
            f"{flag} {source.name} has no classes", "Put its images into a folder for each class."
        )
    present = {example.label for example in source.examples}
    if unknown := sorted(present - {*names}):
        raise UserError(
            f"{flag} {source.name} has classes that are not among those to choose from: {few(unknown)}",
            f"These are {few(names)}.",
        )


if __name__ == "__main__":
    run(main)
