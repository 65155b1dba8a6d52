"""Editing methods at equal numbers of network evaluations, on pairs of real images that differ by one word.

    python benchmarks/editing.py TEST TRAIN --checkpoint CHECKPOINT -o docs/measurements/editing [--evaluations 40]

TEST and TRAIN are folders of images with captions, as `latentflow train` takes them. A pair is two captions that differ
by one word or skin tone (`WORDS`), with the image of each. The first image is edited into the second, by their
captions; images of TEST, which were not trained on, come first.

The pair says what an edit should change: of the pixels in which the two images are equal, what the edit keeps (PSNR
against the source); of the others, how near it comes to the second image (PSNR against the target). In the feature
space --space: the share of the edited images that are nearer to the target than to the source, and the share whose
nearest real image, of all, has the target's caption.

A row is a method, a strength and a guidance scale; its steps are as many as the evaluations pay for. "Same words": the
root mean square change of the latents where source and target are one prompt at one guidance scale. Results go to
FILE.json as they come, and what is there is not computed again; the table to FILE.md, images to FILE.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm.auto import tqdm

from latentflow import LatentFlowEditPipeline
from latentflow.data import cached_pixels, find_source, to_pil
from latentflow.metrics.features import distances, features
from latentflow.metrics.retrieval import retrieve_rows

BATCH = 20
#: pixels that differ by more levels of 255, in any channel, are what the edit should change
EQUAL = 8
SKIN = ("light", "medium-light", "medium", "medium-dark", "dark")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white")
#: kind of pair -> the words that are exchanged, and the number of pairs
WORDS: dict[str, tuple[tuple[str, ...], int]] = {
    "skin tone": (tuple(f"{tone} skin tone" for tone in SKIN), 30),
    "colour": (COLOURS, 30),
    "woman or man": (("woman", "man"), 20),
}
#: row of the table: method, solver, and the evaluations of a step
METHODS = {
    "flowedit": ("flowedit", "euler", 2),
    "inversion": ("inversion", "euler", 2),
    "inversion, heun": ("inversion", "heun", 4),
    "direct": ("direct", "euler", 2),
}
#: (strength, guidance scale); the pipeline's own are (0.9, 2)
SETTINGS = [(0.8, 2.0), (0.9, 2.0), (0.9, 4.0)]
Figures = dict[str, list[float]]


@dataclass(frozen=True)
class Pairs:
    """Images (N, 3, H, W) in [0, 1] and captions of N pairs, and all real images' features and captions.

    Attributes:
        changed: (N, 1, H, W), True where source and target differ.
    """

    kinds: list[str]
    sources: Tensor
    targets: Tensor
    source_captions: list[str]
    target_captions: list[str]
    real: Tensor
    real_captions: list[str]

    @property
    def changed(self) -> Tensor:
        return ((self.sources - self.targets).abs() > EQUAL / 255.0).any(1, keepdim=True)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    pipe = LatentFlowEditPipeline.from_pretrained(options.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    pairs = read(options.data, pipe.vae_scale_factor * pipe.transformer.config.sample_size, options.space)
    file = Path(f"{options.output}.json")
    results: dict[str, Figures] = json.loads(file.read_text()) if file.is_file() else {}

    def add(row: str, figures: Figures) -> None:
        results[row] = figures
        file.write_text(json.dumps(results) + "\n")
        print(row, {name: round(float(np.mean(values)), 3) for name, values in figures.items()}, flush=True)

    unedited = pipe.to_images(pipe.encode_images(2 * pairs.sources - 1), "pt")
    if "the source, unedited" not in results:
        add("the source, unedited", measured(pairs, unedited, options.space))
        goal = pipe.to_images(pipe.encode_images(2 * pairs.targets - 1), "pt")
        add("the target itself", measured(pairs, goal, options.space))
    shown = {"source": pairs.sources, "target": pairs.targets}
    for (strength, guidance), name in itertools.product(SETTINGS, METHODS):
        row = f"{name} / {strength:g} / {guidance:g} / {options.evaluations}"
        on_sheet = (strength, guidance) == (0.9, options.shown_guidance)
        if row in results and not (options.grid and on_sheet):
            continue
        images = edited(pipe, pairs, name, strength, guidance, options.evaluations, options.seed)
        add(row, measured(pairs, images, options.space))
        if on_sheet:
            shown[name] = images
    for name in METHODS:
        row = f"same words / {name} / {options.evaluations}"
        if row not in results:
            add(row, same_words(pipe, pairs, name, options.evaluations, options.seed))
    Path(f"{options.output}-table.md").write_text(table(results, options.evaluations))
    if options.grid:
        sheet(pairs, shown).save(f"{options.output}.png")


def read(folders: list[str], side: int, space: str) -> Pairs:
    """Read the images, and choose the pairs: spread over all there are, those of the first folder first."""
    sources = [find_source(folder) for folder in folders]
    images = torch.cat([cached_pixels(source, side)[:] for source in sources]).float() / 255.0
    captions = [caption for source in sources for caption in source.captions()]
    first = len(sources[0])
    where = {caption: row for row, caption in reversed(list(enumerate(captions)))}
    chosen: list[tuple[str, int, int]] = []
    for kind, (words, count) in WORDS.items():
        found = [
            (row, where[other])
            for row, caption in enumerate(captions)
            for other in exchanged(caption, words)
            if other in where and where[caption] == row
        ]
        held_out = [pair for pair in found if pair[0] < first]
        for candidates in (held_out, [pair for pair in found if pair[0] >= first]):
            missing = count - sum(one[0] == kind for one in chosen)
            rows = np.linspace(0, len(candidates) - 1, min(missing, len(candidates))).astype(int)
            chosen += [(kind, *candidates[row]) for row in rows]
    kinds, before, after = (list(part) for part in zip(*chosen, strict=True))
    return Pairs(
        kinds,
        images[before],
        images[after],
        [captions[row] for row in before],
        [captions[row] for row in after],
        features(2 * images - 1, space),
        captions,
    )


def exchanged(caption: str, words: tuple[str, ...]) -> list[str]:
    """Return the caption with the one of ``words`` that is in it exchanged for each of the others."""
    found = [word for word in words if re.search(rf"(?<![\w-]){word}(?!\w)", caption)]
    return [
        re.sub(rf"(?<![\w-]){found[0]}(?!\w)", other, caption)
        for other in words
        if found and other != found[0]
    ]


def arguments_of(name: str, evaluations: int, strength: float) -> dict[str, Any]:
    """Return method, solver and grid: as many even steps from ``strength`` on as the evaluations pay for."""
    method, solver, each = METHODS[name]
    steps = evaluations // each
    return {
        "method": method,
        "solver": solver,
        "sigmas": (strength * torch.linspace(1.0, 1.0 / steps, steps)).tolist(),
        "strength": 1.0,
    }


def edited(
    pipe: Any, pairs: Pairs, name: str, strength: float, guidance: float, evaluations: int, seed: int
) -> Tensor:
    """Edit the source of every pair into its target; evaluations of the network are counted."""
    calls: list[int] = []
    hook = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    drawn = []
    for start in tqdm(range(0, len(pairs.kinds), BATCH), desc=f"{name} {strength:g} {guidance:g}"):
        part = slice(start, start + BATCH)
        prompts = pairs.target_captions[part]
        calls.clear()
        drawn.append(
            pipe(
                prompts,
                pairs.sources[part],
                source_prompt=pairs.source_captions[part],
                guidance_scale=guidance,
                source_guidance_scale=1.0,
                generator=generators(seed, start, len(prompts)),
                output_type="pt",
                **arguments_of(name, evaluations, strength),
            ).images
        )
        if len(calls) > evaluations + (name == "direct"):
            raise AssertionError(f"{name} took {len(calls)} evaluations, not {evaluations}")
    hook.remove()
    return torch.cat(drawn)


def generators(seed: int, start: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + start + i) for i in range(count)]


def measured(pairs: Pairs, images: Tensor, space: str) -> Figures:
    """Return the figures of every pair."""
    changed = pairs.changed.float()
    rows = features(2 * images - 1, space)
    to_source, to_target = (
        distances(rows, features(2 * one - 1, space)).diagonal() for one in (pairs.sources, pairs.targets)
    )
    found = [
        retrieve_rows(row[None], [caption], pairs.real, pairs.real_captions, tops=(1,)).shares[1]
        for row, caption in zip(rows, pairs.target_captions, strict=True)
    ]
    return {
        "kept": psnr(images, pairs.sources, 1.0 - changed),
        "reached": psnr(images, pairs.targets, changed),
        "nearer": (to_target < to_source).float().tolist(),
        "distance": to_target.tolist(),
        "retrieved": found,
    }


def psnr(images: Tensor, real: Tensor, where: Tensor) -> list[float]:
    """Return the PSNR of each image where ``where`` (N, 1, H, W) is 1."""
    error = ((images - real).square() * where).sum((1, 2, 3)) / (3 * where.sum((1, 2, 3))).clamp_min(1.0)
    values: list[float] = (-10 * error.clamp_min(1e-6).log10()).tolist()
    return values


def same_words(pipe: Any, pairs: Pairs, name: str, evaluations: int, seed: int) -> Figures:
    """Return the root mean square change of the latents in an edit from a prompt to itself."""
    changes: Figures = {"at guidance 1": [], "at guidance 2": []}
    for guidance, start in itertools.product((1.0, 2.0), range(0, len(pairs.kinds), BATCH)):
        part = slice(start, start + BATCH)
        prompts = pairs.source_captions[part]
        x1 = pipe.encode_images(2 * pairs.sources[part] - 1)
        again = pipe(
            prompts,
            latents=x1,
            source_prompt=prompts,
            guidance_scale=guidance,
            source_guidance_scale=guidance,
            generator=generators(seed, start, len(prompts)),
            output_type="latent",
            **arguments_of(name, evaluations, 0.9),
        ).images
        changes[f"at guidance {guidance:g}"] += (again - x1).square().mean((1, 2, 3)).sqrt().tolist()
    return changes


def table(results: dict[str, Figures], evaluations: int) -> str:
    """Markdown: a row for each method and setting, the mean over the pairs and its standard error."""
    names = {
        "kept": "kept: PSNR",
        "reached": "changed: PSNR",
        "nearer": "nearer to the target",
        "retrieved": "target retrieved",
    }
    lines = [
        f"| method | strength | guidance | {' | '.join(names.values())} |",
        "|---|---|---|" + "---|" * len(names),
    ]
    for row, figures in results.items():
        name, *settings = row.split(" / ")
        if name == "same words" or (settings and settings[-1] != str(evaluations)):
            continue
        cells = [spread(figures[key], 100 if key in ("nearer", "retrieved") else 1) for key in names]
        lines.append(f"| {name} | {' | '.join(settings[:2] or ['', ''])} | {' | '.join(cells)} |")
    lines += ["", "| same words | at guidance 1 | at guidance 2 |", "|---|---|---|"]
    for name in METHODS:
        figures = results[f"same words / {name} / {evaluations}"]
        lines.append(
            f"| {name} | " + " | ".join(f"{np.mean(values):.2g}" for values in figures.values()) + " |"
        )
    lines += ["", "| direct - flowedit | kept | changed | nearer | retrieved |", "|---|---|---|---|---|"]
    for strength, guidance in SETTINGS:
        one, other = (
            results[f"{name} / {strength:g} / {guidance:g} / {evaluations}"]
            for name in ("direct", "flowedit")
        )
        cells = [
            spread(
                [a - b for a, b in zip(one[key], other[key], strict=True)],
                100 if key in ("nearer", "retrieved") else 1,
                "+",
            )
            for key in names
        ]
        lines.append(f"| strength {strength:g}, guidance {guidance:g} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def spread(values: list[float], scale: int, sign: str = "") -> str:
    """Return the mean and its standard error; shares in percent."""
    digits = 0 if scale == 100 else 1
    mean, error = scale * np.mean(values), scale * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean:{sign}.{digits}f} ± {error:.{digits}f}" + (" %" if scale == 100 else "")


def sheet(pairs: Pairs, shown: dict[str, Tensor], each: int = 4) -> Image.Image:
    """Some pairs of every kind: source, target, and what each method made."""
    rows = [
        place
        for kind in WORDS
        for place in np.array([row for row, one in enumerate(pairs.kinds) if one == kind])[
            np.linspace(0, pairs.kinds.count(kind) - 1, each).astype(int)
        ]
    ]
    cell, head = 96, 18
    image = Image.new("RGB", (cell * len(shown), head + cell * len(rows)), "white")
    draw = ImageDraw.Draw(image)
    for x, (name, images) in enumerate(shown.items()):
        draw.text((x * cell + 2, 2), name, fill="black")
        for y, row in enumerate(rows):
            one = to_pil(2 * images[row] - 1).resize((cell - 2, cell - 2), Image.Resampling.NEAREST)
            image.paste(one, (x * cell, head + y * cell))
    return image


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+", help="folders; edited images come from the first where it has any")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("-o", "--output", required=True, help="FILE without its ending")
    parser.add_argument("--evaluations", type=int, default=40)
    parser.add_argument("--space", default="efficientnet-lite0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", action="store_true", help="also FILE.png")
    parser.add_argument("--shown-guidance", type=float, default=2.0, help="of the images in it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


if __name__ == "__main__":
    main()
