"""Prior preservation for pretrained models: images of the model's own, drawn before it changes, see `prior.py`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...config import FineTuningConfig
from ...data import Source
from ...errors import UserError
from ...families.pretrained import PretrainedModel
from ...pipeline.generate import LatentFlowPipeline
from ...pipeline.over_model import over_model
from ...utils.files import read_prompts
from ...utils.memory import memory_phase
from ..loop.distributed import process_state
from ..losses.latent_data import Conditions, LatentData
from .pretrained_base import PretrainedBase, drawing_precision
from .prior import in_turn
from .prompts import Prompts
from .teacher_samples import SampleSettings, Teacher, sample_data, sample_source, samples

_COUNT = 100  # samples, by default: as diffusers' DreamBooth scripts draw


def pretrained_prior(base: PretrainedBase, config: FineTuningConfig) -> tuple[list[str], str]:
    """Choose the prompts or classes of the prior samples, each as often as the others.

    Returns:
        The prompts (none: no prior samples), and the plan's line about them.

    Raises:
        UserError: the file cannot be read or holds no prompt, or the model takes none; a number of samples without
            prompts; a share of no samples.
    """
    shape, count = base.shape, config.prior_samples
    if config.prior_prompts and not shape.takes_text:
        raise UserError(
            f"--prior-prompts, but {base.name} draws classes", "Leave it out: it draws all its classes."
        )
    if count and shape.takes_text and not config.prior_prompts:
        raise UserError(
            "--prior-samples without --prior-prompts: a pretrained model draws from prompts, and none are given",
            'Write some into a text file, one per line, such as "a photo of a dog" if you train on a dog of your '
            "own, and name it: --prior-prompts FILE.",
        )
    if count is None:
        count = _COUNT if config.prior_prompts else 0
    if not count:
        if config.prior_share != FineTuningConfig.prior_share and config.prior_samples is None:
            raise UserError(
                f"--prior-share {config.prior_share:g} without prior samples",
                f"Add {'--prior-prompts FILE' if shape.takes_text else '--prior-samples 100'}, or leave it out.",
            )
        flag = "--prior-prompts FILE" if shape.takes_text else "--prior-samples 100"
        return [], (
            f"prior samples: none, so the model may forget what your images do not show ({flag} prevents it)"
        )
    names = (
        read_prompts(config.prior_prompts, "--prior-prompts") if config.prior_prompts else [*shape.classes]
    )
    origin = f"the prompts in {config.prior_prompts}" if config.prior_prompts else f"its {len(names)} classes"
    return in_turn(names, count), (
        f"prior samples: so that the model does not forget what it knew, {config.prior_share:.0%} of each step are "
        f"images that it draws itself before training, {count} in all, for {origin}"
    )


def prior_data(
    base: PretrainedBase,
    model: PretrainedModel,
    prompts: Prompts,
    asked: list[str],
    side: int,
    folder: Path,
    seed: int,
    conditions: Callable[[Source], Conditions],
    *,
    pixels: bool,
) -> LatentData:
    """Return the model's own samples as training data, drawn into ``folder`` where they are not there yet.

    They are drawn as users draw: with the usual guidance and number of steps of the family. Each is drawn alone, so
    that it depends on its seed and prompt only. The main process draws, the others wait.

    Args:
        model: of the base, with nothing trained in it yet.
        prompts: with those of ``asked``.
        asked: a prompt or class for each sample.
        side: of the images in pixels.
        conditions: turns samples into what the network is given with them.
        pixels: the images are kept as well, to be masked.

    Raises:
        UserError: ``folder`` holds samples of another model, or drawn otherwise.
    """
    settings = SampleSettings(
        seed=seed, pixels=pixels, guidance=model.usual_guidance, steps=model.usual_steps
    )
    pipeline = over_model(LatentFlowPipeline, model)
    pipeline.set_progress_bar_config(disable=True)

    def call_arguments(texts: list[str]) -> dict[str, Any]:
        if model.takes_classes:
            return model.call_arguments(texts)
        return {"prompt_embeds": prompts.rows(texts, model)}

    state = process_state()
    with (
        memory_phase(settings.phase),
        state.main_process_first(),
        drawing_precision(model, state.device),
    ):
        teacher = Teacher(model, pipeline, call_arguments, _network_hash(base), together=1)
        tensors = samples(teacher, asked, side, folder, settings)
    model.pipeline.to("cpu")
    source = sample_source(
        f"samples of {base.name}", model.condition_kind, asked, model.classes, settings, tensors
    )
    return sample_data(source, tensors, side, conditions(source), settings)


def _network_hash(base: PretrainedBase) -> str:
    """Return the hash of the network's files, which quantised weights in memory do not have."""
    digest = hashlib.sha256()
    for file in sorted((Path(base.folder) / base.network_name).glob("*.safetensors")):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
