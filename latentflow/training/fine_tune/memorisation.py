"""Measure, once a fine-tune on few images is finished, how near its samples come to copying them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from warnings import catch_warnings, simplefilter

import torch

from ...data import Source, cached_pixels, pixels_to_images
from ...errors import UserError
from ...families import FlowModel
from ...metrics import Memorisation, memorisation
from ...models.text import UnknownWords
from ...utils.memory import memory_phase
from ..data import shown_by
from ..report.verdict import MEMORISATION, copies_too_many, memorisation_line

log = logging.getLogger(__name__)

_SAMPLES = 16


def report_memorisation(
    output: Path, training: Source, validation: Source, background: str, device: torch.device
) -> None:
    """Sample with the result in ``output`` under the conditions of ``training``, and report how near the samples come.

    The figures are written to ``memorisation.json``; if that file is newer than the result, nothing is sampled. A
    failure is a warning: the result is there.
    """
    result, file = output / "pipeline", output / MEMORISATION
    if len(training) < 2 or (
        file.is_file() and file.stat().st_mtime > (result / "model_index.json").stat().st_mtime
    ):
        return
    try:
        with memory_phase("draw"), catch_warnings():
            simplefilter("ignore", UnknownWords)  # the captions are the data's own
            found = _measure(result, training, validation, background, device)
        if found is None:
            return
        file.write_text(json.dumps(found._asdict(), indent=2) + "\n", encoding="utf-8")
    except (UserError, OSError) as error:
        log.warning(f"WARNING: it was not measured whether the result copies your images: {error}")
        return
    line = f"memorisation: {memorisation_line(found._asdict())}"
    log.info(f"WARNING: {line}" if copies_too_many(found._asdict()) else line)


def _measure(
    result: Path, training: Source, validation: Source, background: str, device: torch.device
) -> Memorisation | None:
    """Return None if the data do not have the result's condition, or there is one image only, beside which none is
    new."""
    model = FlowModel.from_pretrained(result)
    pipe = model.pipeline.to(device)
    pipe.set_progress_bar_config(disable=True)
    rows = [number * len(training) // _SAMPLES for number in range(_SAMPLES)]  # spread over all classes
    if training.kind == "unconditional" and model.condition_kind != "unconditional":
        return None
    side = model.native_side
    assert side is not None  # the result of a run says it
    samples = (
        pipe(
            **model.call_arguments(shown_by(training, rows, model)),
            height=side,
            width=side,
            generator=[torch.Generator().manual_seed(seed) for seed in range(_SAMPLES)],
            output_type="pt",
        )
        .images.float()
        .cpu()
    )

    def images(source: Source) -> torch.Tensor:
        return pixels_to_images(cached_pixels(source, side, background, progress=False)[:])

    known = images(training)
    if len(known.unique(dim=0)) < 2:
        return None
    samples = pixels_to_images((samples.clamp(0, 1) * 255).round())  # in 256 levels, as real images are
    return memorisation(samples, known, images(validation) if len(validation) else None)
