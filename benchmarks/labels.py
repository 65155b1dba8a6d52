"""Labels that are wrong or missing, for `latentflow check --audit` and `train --missing-caption empty`.

    python benchmarks/labels.py shapes -o data/shapes         # or a folder with a subfolder for each class
    latentflow train data/shapes/wrong.csv --resolution 32 --preset tiny -o runs/wrong
    latentflow check data/shapes/some.csv --audit runs/wrong --json > audit.json
    python benchmarks/labels.py data/shapes/wrong.csv --audit audit.json

Writes tables of the same images: `all.csv` with all labels, `wrong.csv` with 5 % of them replaced by another class,
`some.csv` with 600 rows of that (all wrong ones and others at random), `partly.csv` with a tenth of the labels of each
class, and `tenth.csv` with these images alone. Of `shapes`, whose classes are "red circle" and the like, the images are
written as well, and `test.csv`: 480 others, two of every caption of one object, also of those that are held out.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from pathlib import Path

from latentflow.data import find_source
from latentflow.data.sources.shapes import Single, all_specs, is_held_out, render, train_source
from latentflow.evaluation.probing import auroc

WRONG, KEPT, SOME = 0.05, 0.1, 600
Row = tuple[str, str]


def write_shapes(folder: Path) -> list[Row]:
    """Write the images of `shapes` by class and of its test set; return the former."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    test: list[Row] = []
    for number, example in enumerate(train_source("class").examples):
        file = folder / "images" / f"{number:04d}.png"
        example.open().save(file)
        rows.append((f"images/{file.name}", example.label or ""))
    for spec in all_specs():
        if not isinstance(spec, Single):
            continue
        for seed in (1000, 1001):  # jitters that training has not
            file = folder / "images" / f"test-{len(test):04d}{'-new' if is_held_out(spec) else ''}.png"
            render(spec, 64, seed)[0].save(file)
            test.append((f"images/{file.name}", f"{spec.colour} {spec.shape}"))
    write(folder / "test.csv", test)
    return rows


def find_rows(data: str) -> list[Row]:
    """Return the images of a folder of classes by absolute paths."""
    root = Path(data).resolve()
    return [
        (str(root / example.name), example.label or "")
        for example in find_source(data, condition="class").examples
    ]


def write(table: Path, rows: list[Row], true: list[str] | None = None) -> None:
    """Write a table, with the true labels in a column of their own where others are given."""
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", *(["true_label"] if true else [])])
        writer.writerows([[*row, *([true[i]] if true else [])] for i, row in enumerate(rows)])


def damage(rows: list[Row], seed: int) -> list[Row]:
    """Return the rows with 5 % of the labels replaced by another class, all other classes equally often."""
    draw, names = random.Random(seed), sorted({label for _, label in rows})
    chosen = {*draw.sample(range(len(rows)), round(WRONG * len(rows)))}
    return [
        (image, draw.choice([name for name in names if name != label]) if i in chosen else label)
        for i, (image, label) in enumerate(rows)
    ]


def keep_some(rows: list[Row], seed: int) -> list[Row]:
    """Return the rows with the labels of a tenth of each class, at least one, and without the others."""
    draw, kept = random.Random(seed), set()
    for name in sorted({label for _, label in rows}):
        own = [i for i, (_, label) in enumerate(rows) if label == name]
        kept |= {*draw.sample(own, max(1, round(KEPT * len(own))))}
    return [(image, label if i in kept else "") for i, (image, label) in enumerate(rows)]


def score(table: Path, report: Path) -> None:
    """Print how well an audit finds the wrong labels of a table."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    doubts = json.loads(report.read_text(encoding="utf-8"))["audit"]
    wrong = [rows[doubt["image"]]["label"] != rows[doubt["image"]]["true_label"] for doubt in doubts]
    found = [-doubt["log_ratio"] for doubt in doubts]
    split = {flag: [x for x, bad in zip(found, wrong, strict=True) if bad == flag] for flag in (True, False)}
    named = [
        doubt["rather"] == rows[doubt["image"]]["true_label"]
        for doubt, bad in zip(doubts, wrong, strict=True)
        if bad and doubt["log_ratio"] < 0
    ]
    print(
        f"{sum(wrong)} of {len(wrong):,} labels are wrong: AUROC {auroc(split[True], split[False]):.3f}; "
        f"{len(named)} of the wrong ones are likelier with another label, {sum(named)} with the true one"
    )


def main() -> None:
    """Write tables, or score an audit of one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="`shapes`, a folder of classes; with --audit a table")
    parser.add_argument("-o", "--output", type=Path, help="folder of the tables")
    parser.add_argument("--seed", type=int, default=0, help="of the labels that change")
    parser.add_argument(
        "--audit", type=Path, metavar="FILE", help="output of `latentflow check --audit --json`"
    )
    given = parser.parse_args()
    if given.audit is not None:
        score(Path(given.data), given.audit)
        return
    if given.output is None:
        parser.error("give a folder: -o FOLDER")
    given.output.mkdir(parents=True, exist_ok=True)
    rows = write_shapes(given.output) if given.data == "shapes" else find_rows(given.data)
    labels, partly = [label for _, label in rows], keep_some(rows, given.seed)
    write(given.output / "all.csv", rows)
    damaged = damage(rows, given.seed)
    write(given.output / "wrong.csv", damaged, labels)
    draw = random.Random(f"{given.seed} some")
    wrong = [i for i, (_, label) in enumerate(damaged) if label != labels[i]]
    right = draw.sample(sorted({*range(len(rows))} - {*wrong}), max(0, min(SOME, len(rows)) - len(wrong)))
    some = sorted([*wrong, *right])
    write(given.output / "some.csv", [damaged[i] for i in some], [labels[i] for i in some])
    write(given.output / "partly.csv", partly)
    write(given.output / "tenth.csv", [row for row in partly if row[1]])


if __name__ == "__main__":
    main()
