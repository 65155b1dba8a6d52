"""Measure, once a fine-tune on few images is finished, how near its samples come to copying them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor

from ...data import Source, cached_pixels, pixels_to_images
from ...errors import RunError, UserError
from ...families import FlowModel
from ...metrics import Memorisation, memorisation
from ...models.text import UnknownWords
from ...utils.memory import memory_phase
from ..data import shown_by
from ..report.verdict import MEMORISATION, copies_too_many, memorisation_line

log = logging.getLogger(__name__)

_SAMPLES = 16
#: numbers of training images -> images (B, 3, side, side) in [0, 1] drawn of what they show, on the CPU
Draw: TypeAlias = Callable[[list[int]], Tensor]


def report_memorisation(
    output: Path, training: Source, validation: Source, background: str, side: int, draw: Draw
) -> None:
    """Draw under the conditions of ``training``, and report how near the drawn images come.

    The figures are written to ``memorisation.json`` of the run ``output``. A failure is a warning: the result is there.

    Args:
        side: of the images that are drawn, in pixels.
        draw: draws them.
    """
    if len(training) < 2:
        return
    try:
        with memory_phase("draw"), catch_warnings():
            simplefilter("ignore", UnknownWords)  # the captions are the data's own
            found = _measure(training, validation, background, side, draw)
        if found is None:
            return
        text = json.dumps(found._asdict(), indent=2) + "\n"
        (output / MEMORISATION).write_text(text, encoding="utf-8")
    except (UserError, RunError, OSError) as error:  # also where memory runs out
        log.warning(f"WARNING: it was not measured whether the result copies your images: {error}")
        return
    line = f"memorisation: {memorisation_line(found._asdict())}"
    log.info(f"WARNING: {line}" if copies_too_many(found._asdict()) else line)


def report_memorisation_of(
    output: Path, training: Source, validation: Source, background: str, device: torch.device
) -> None:
    """Report how near the images come that the pipeline in the run ``output`` draws; see `report_memorisation`.

    If its figures are newer than the pipeline, nothing is drawn.
    """
    result, file = output / "pipeline", output / MEMORISATION
    if file.is_file() and file.stat().st_mtime > (result / "model_index.json").stat().st_mtime:
        return
    model = FlowModel.from_pretrained(result)
    pipe = model.pipeline.to(device)
    pipe.set_progress_bar_config(disable=True)
    if training.kind == "unconditional" and model.condition_kind != "unconditional":
        return
    side = model.native_side
    assert side is not None  # the result of a run says it

    def draw(rows: list[int]) -> Tensor:
        images: Tensor = pipe(
            **model.call_arguments(shown_by(training, rows, model)),
            height=side,
            width=side,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(rows))],
            output_type="pt",
        ).images
        return images.float().cpu()

    report_memorisation(output, training, validation, background, side, draw)


def _measure(
    training: Source, validation: Source, background: str, side: int, draw: Draw
) -> Memorisation | None:
    """Return None if there is one image only, beside which none is new."""

    def images(source: Source) -> Tensor:
        return pixels_to_images(cached_pixels(source, side, background, progress=False)[:])

    known = images(training)
    if len(known.unique(dim=0)) < 2:
        return None
    samples = draw([number * len(training) // _SAMPLES for number in range(_SAMPLES)])  # spread over all
    samples = pixels_to_images((samples.clamp(0, 1) * 255).round())  # in 256 levels, as real images are
    return memorisation(samples, known, images(validation) if len(validation) else None)
