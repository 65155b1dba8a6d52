"""The run of a generator from top to bottom: data, autoencoder, networks, cached latents, training, export."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from logging import Logger
from pathlib import Path
from typing import Any

from ..autoencoder.latents import Autoencoder
from .build import build
from .config import RunConfig
from .data import Examples, LatentCache, as_begun, find_examples
from .estimate import estimate_lines, sample_flops
from .export import Result
from .fine_tune.defaults import FEW
from .fine_tune.memorisation import tell_memorised
from .loop.callbacks import Callbacks
from .loop.distributed import process_state
from .loop.early_stop import refuse_unvalidated
from .loop.fit import fit
from .loop.logging import log_to
from .loop.signals import Stop
from .losses.average_velocity import refuse_unfit
from .losses.flow import validation_loss
from .networks import refuse_renumbered_classes
from .plan import Plan, plan
from .preview import preview_grid, preview_source
from .recipe import Lesson
from .report.hub import check_push, push
from .train_autoencoder import autoencoder_for
from .trained_model import Built


def train(
    config: RunConfig,
    again: str,
    given_keys: Collection[str],
    write_config: Callable[[RunConfig, Path], None],
    lesson: Lesson,
) -> None:
    """The run, from top to bottom.

    Args:
        again: the command that resumes it.
        given_keys: of the settings that no default may change.
        write_config: writes the settings into a file.
        lesson: what is learned from.

    Raises:
        SystemExit: a signal stopped the run before its end, after saving; the status is 128 + its number.
    """
    output = Path(config.output)
    if config.push_to_hub and not config.dry_run:
        check_push(config.push_to_hub)
    if not config.dry_run:
        output.mkdir(parents=True, exist_ok=True)
    log = log_to(None if config.dry_run else output)

    # ---- data, and what follows from them ----
    config = replace(config, data=as_begun(config.data, output, given_keys))
    examples = find_examples(config, given_keys)
    refuse_renumbered_classes(output / "pipeline", examples.source)
    refuse_unvalidated(config.loop, len(examples.validation) > 0)
    lesson.refuse_unfit(examples.source, config.framing.size_conditioning, config.loop)
    planned = plan(config, examples, given_keys, lesson)
    config = planned.config
    refuse_unfit(
        config.flow,
        config.loop,
        routed=config.routing.route_share > 0,
        taught=lesson.taught,
        bare=not config.init_from and examples.source.kind == "unconditional",
    )
    for line in planned.lines:
        log.info(line)
    if not config.dry_run and process_state().is_main_process:
        write_config(config, output / "config.yaml")

    # ---- autoencoder: given, the checkpoint's, or trained now ----
    stop = Stop()
    vae = autoencoder_for(
        examples.autoencoder,
        examples.training,
        examples.validation,
        config.autoencoder,
        config.loop,
        output / "autoencoder",
        data=examples.data,
        resume_line=again,
        untrained=config.dry_run,
        stop=stop,
    )
    if vae is None:
        raise SystemExit(stop.status)  # the line that resumes was printed
    if stop.signal:  # it came in the autoencoder's last step
        log.info(f"stopped, the autoencoder is trained; resume with:\n  {again}")
        raise SystemExit(stop.status)

    # ---- networks ----
    built = build(config, examples.source, examples.data.resolution, vae, lesson)
    if built.adapter is not None:
        for line in built.adapter.lines():
            log.info(line)
    cache = LatentCache(config, examples, vae, built)
    framed = cache.framed(examples.training)
    for line in framed.lines():
        log.info(line)
    if config.dry_run:
        for line in _estimate(config, examples, vae, built):
            log.info(line)
        return

    # ---- latents and conditions, cached ----
    own = cache.latents(framed)
    data = lesson.data(own, examples.training, planned.prior, built, config)
    held_out = None
    if len(examples.validation) > 0 and lesson.validates:
        held_out = cache.latents(cache.framed(examples.validation.once(), crops=1))
    vae.cpu()

    # ---- training ----
    result = Result(config, examples.source, vae, built, lesson.few_steps(config.flow))
    device, stage = process_state().device, built.stage
    flops = sample_flops(built.networks.network, stage.text_encoder, data, built.latent_size)
    if config.loop.compile:
        built.networks.network.compile()
    finished = fit(
        lesson.players(stage),
        data,
        config.loop,
        output,
        callbacks=Callbacks(
            validate=None if held_out is None else lambda: {"loss": validation_loss(stage, held_out, device)},
            preview=lambda: preview_grid(
                result.pipeline(), preview_source(examples.training, examples.validation), device
            ),
            export=result.export,
            export_to=result.folder,
        ),
        description=_description(planned, examples, built, lesson),
        resume_line=again,
        flops=flops,
        partly=bool(config.init_from) and examples.source.kind == "unconditional",
        stop=stop,
    )
    if not finished:
        raise SystemExit(stop.status)
    if process_state().is_main_process:
        for line in lesson.lines_after(result.folder, stage, own):
            log.info(line)
        _finish(config, examples, result, log)


def _estimate(config: RunConfig, examples: Examples, vae: Autoencoder, built: Built) -> list[str]:
    """Sizes, operations, memory and time."""
    views = config.framing.crops * (1 + examples.data.random_flip) * (not examples.source.precomputed)
    return estimate_lines(
        built.stage, built.networks, vae, examples.source, config.loop, built.latent_size, views
    )


def _description(planned: Plan, examples: Examples, built: Built, lesson: Lesson) -> dict[str, Any]:
    """Plain values that a resumed run must have as well."""
    config = planned.config
    optional: dict[str, Any] = {
        "framing": config.framing,
        "routing": config.routing,
        "alignment": config.alignment,
    }
    return {
        **built.describe(),
        **lesson.describe(),
        "flow": config.flow.describe(),
        "data": examples.training.fingerprint(),
        "data_order": examples.training.order(),
        **({"prior": [len(planned.prior), config.fine_tuning.prior_share]} if planned.prior else {}),
        **{name: asdict(one) for name, one in optional.items() if one != type(one)()},
        "batch": built.batch,
        "seed": config.loop.seed,
    }


def _finish(config: RunConfig, examples: Examples, result: Result, log: Logger) -> None:
    """Measure how much of few images is learnt by heart, say how to draw, and put the result on the hub if asked."""
    if config.init_from and len(examples.training) <= FEW:
        device = process_state().device
        background = examples.data.background
        tell_memorised(Path(config.output), examples.training, examples.validation, background, device)
    try_it = shlex.join(["latentflow", "generate", "--checkpoint", str(result.folder)])
    log.info(f"done: {result.folder}; try it with\n  {try_it}")
    if config.push_to_hub:
        log.info(f"pushed: {push(result.folder, config.push_to_hub)}")
