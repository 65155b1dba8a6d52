"""Has a fine-tune on few images learnt them, or learnt them by heart? Measured once, when it is finished."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import torch

from ...data import Source, cached_pixels, pixels_to_images
from ...errors import UserError
from ...metrics import Memorisation, memorisation
from ...models.text import UnknownWords
from ...pipeline.generate import LatentFlowPipeline
from ...utils.memory import memory_phase

log = logging.getLogger(__name__)

_DRAWN = 16
_COPIES = 0.5  # share of the drawn images that are nearer to one of the data than those are to one another


def tell_memorised(
    output: Path, training: Source, validation: Source, background: str, device: torch.device
) -> None:
    """Draw images of what ``training`` shows with the result in ``output``, and say how near to it they come.

    Written to ``memorisation.json`` as well; where that is of this result, nothing is drawn. A failure is a warning:
    the result is there.
    """
    result, file = output / "pipeline", output / "memorisation.json"
    if len(training) < 2 or (
        file.is_file() and file.stat().st_mtime > (result / "model_index.json").stat().st_mtime
    ):
        return
    try:
        with memory_phase("draw"), catch_warnings():
            simplefilter("ignore", UnknownWords)  # the captions are the data's own
            found = _measured(result, training, validation, background, device)
        if found is None:
            return
        told = json.dumps(found._asdict(), indent=2)
        file.write_text(told + "\n", encoding="utf-8")
    except (UserError, OSError) as error:
        log.warning(f"WARNING: how near the result comes to your images was not measured: {error}")
        return
    line = (
        f"memorisation: drawn images are {found.ratio:.2f} times as far from the nearest training image as other "
        f"images of yours are (near 0: copies); {found.copied} of {found.drawn} are nearer than nearly all of those "
        f"(0 to {round(found.usual[1] * found.drawn)} without memorising)"
    )
    if found.copies >= _COPIES and found.copies > found.usual[1]:  # of very few images half may be chance
        line = f"WARNING: {line}. It redraws your images: use more of them, fewer --max-train-steps, or --random-flip"
    log.info(line)


def _measured(
    result: Path, training: Source, validation: Source, background: str, device: torch.device
) -> Memorisation | None:
    """None: there is nothing to ask the result for, or one image only, beside which none is new."""
    pipe = LatentFlowPipeline.from_pretrained(result).to(device)
    pipe.set_progress_bar_config(disable=True)
    rows = [number * len(training) // _DRAWN for number in range(_DRAWN)]  # spread over all classes
    asked: dict[str, Any] = {"num_images_per_prompt": _DRAWN}
    if training.kind == "text":
        asked = {"prompt": [training.captions()[row] for row in rows]}
    elif training.kind == "class":
        asked = {"class_labels": [int(training.class_ids()[row]) for row in rows]}
    elif pipe.takes_text or pipe.takes_classes:
        return None
    side = pipe.vae_scale_factor * pipe.transformer.config.sample_size
    generators = [torch.Generator().manual_seed(seed) for seed in range(_DRAWN)]
    drawn = (
        pipe(**asked, height=side, width=side, generator=generators, output_type="pt").images.float().cpu()
    )

    def images(source: Source) -> torch.Tensor:
        return pixels_to_images(cached_pixels(source, side, background, progress=False)[:])

    known = images(training)
    if len(known.unique(dim=0)) < 2:
        return None
    drawn = pixels_to_images((drawn.clamp(0, 1) * 255).round())  # in 256 levels, as real images are
    return memorisation(drawn, known, images(validation) if len(validation) else None)
