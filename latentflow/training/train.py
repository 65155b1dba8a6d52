"""The run of a generator from top to bottom: data, plan, autoencoder, networks, cached latents, training, export."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from ..autoencoder import Autoencoder, build_autoencoder, has_statistics
from ..config import RunConfig
from ..errors import UserError
from ..pipeline.adapter_files import weights_hash
from .data import (
    DataSplits,
    LatentCache,
    as_begun,
    generator_as_begun,
    given_autoencoder,
    load_data,
    refuse_renumbered_classes,
)
from .estimate import estimate_lines, sample_flops
from .export import card_facts, export_pipeline, preview_grid, preview_source
from .fine_tune.base import refuse_own_result, refuse_pretrained_settings
from .fine_tune.defaults import FEW, usual
from .fine_tune.learning import LearningMeter, is_plain
from .fine_tune.memorisation import report_memorisation_of
from .loop.checkpoint import list_checkpoints, step_of
from .loop.compiling import compile_network
from .loop.fit import Callbacks
from .losses.average_velocity import refuse_unfit
from .losses.flow import validation_loss
from .recipe import Recipe, data_recipe
from .report.card import generate_command, write_adapter_card, write_card
from .report.folder import first_stage, read_run
from .report.verdict import judge
from .train_autoencoder import train_autoencoder
from .trained_model import TrainedModel, build
from .training_run import TrainingRun, WriteConfig
from .unfinished import forget_initial, keep_initial, starting_checkpoint


def train(
    config: RunConfig,
    resume_command: str,
    given_keys: Collection[str],
    write_config: WriteConfig,
    make_recipe: Callable[[RunConfig, DataSplits, Collection[str]], Recipe] = data_recipe,
) -> None:
    """Train a generator, or go on with a run that was stopped.

    Args:
        given_keys: keys of the settings that no default may change.
        write_config: writes the settings into a file.
        make_recipe: makes the recipe from the settings, the data and ``given_keys``.

    Raises:
        UserError: the settings contradict each other, the data or the checkpoint.
        SystemExit: a signal stopped the run before its end, after saving; the status is 128 + its number.
    """
    run = TrainingRun(config, resume_command, write_config)
    output, state, log, dry_run = run.output, run.state, run.log, config.dry_run

    # ---- data ----
    config = replace(
        config,
        data=as_begun(config.data, output, given_keys),
        loop=generator_as_begun(config.loop, output, given_keys).with_validation_time(given_keys),
    )
    refuse_pretrained_settings(config.fine_tuning)
    named = config.init_from  # as the user wrote it
    if named:
        refuse_own_result(named, output)
        config = replace(config, init_from=starting_checkpoint(named, None if dry_run else output))
    splits = load_data(
        config.data,
        given_keys,
        seed=config.loop.seed,
        vae=config.vae,
        checkpoint=config.init_from,
        control=config.control,
    )
    source, training, validation = splits.source, splits.training, splits.validation
    refuse_renumbered_classes(output / "pipeline", source)
    of_codes = config.flow.predicts_codes
    if (config.tokens.tokens or of_codes) and source.precomputed:
        flag = "--prediction codes" if of_codes else "--tokens"
        raise UserError(
            f"{flag} with {source.name}, whose latents are cached without their tokens",
            "Give the images themselves: their tokens are cached on the way.",
        )
    config.loop.check_validated(len(validation) > 0)

    if config.tokens.tokens and source.has_masks:
        log.info("the masks of the data are not used: a model of tokens fills any hole")

    # ---- plan ----
    recipe = make_recipe(config, splits, given_keys)
    config = replace(config, flow=recipe.flow, loop=recipe.loop)
    if config.init_from:  # it decided these two, where they were not given
        validation_share, resolution = splits.data.validation, splits.data.resolution
        config = replace(
            config, data=replace(config.data, validation=validation_share, resolution=resolution)
        )
    if recipe.sampling.average:
        refuse_unfit(
            config.flow,
            config.loop,
            routed=config.routing.route_share > 0,
            taught=recipe.student,
            bare=not config.init_from and source.kind == "unconditional",
        )
    run.plan(recipe.plan, "; --dry-run estimates it.")
    run.keep(replace(config, init_from=named))

    # ---- autoencoder: given, the checkpoint's, or trained now ----
    stop = run.stop
    has_autoencoder = (output / "autoencoder" / "autoencoder" / "config.json").is_file()
    vae: Autoencoder | None
    if splits.autoencoder is not None:
        measured = not (dry_run or config.latents_as_is)
        vae = given_autoencoder(splits.autoencoder, training, splits.data, measured=measured)
    elif dry_run and has_autoencoder:
        vae = given_autoencoder(str(output / "autoencoder" / "autoencoder"), training, splits.data)
    elif dry_run:
        vae = build_autoencoder(config.autoencoder, splits.data.resolution)
    else:
        folder = output / "autoencoder"
        if not has_autoencoder:
            log.info("autoencoder: none is given (--vae), so one is trained first")
        vae = train_autoencoder(
            training,
            validation,
            config.autoencoder,
            config.loop,
            folder,
            splits.data,
            resume_command=resume_command,
            stop=stop,
        )
        if vae is None:
            raise SystemExit(stop.status)  # the line that resumes was printed
        vae.requires_grad_(False)
        if not has_autoencoder and state.is_main_process and (judged := judge(first_stage(read_run(output)))):
            log.info(f"autoencoder: {judged.remark}")
        if stop.signal:  # it came in the autoencoder's last step
            log.info(f"stopped, the autoencoder is trained; resume with:\n  {resume_command}")
            raise SystemExit(stop.status)

    # ---- networks and loss ----
    model = build(config, source, splits.data.resolution, vae, recipe)
    flow_model, loss = model.flow_model, model.loss
    cache = LatentCache(
        data=splits.data,
        framing=config.framing,
        model=flow_model,
        trains_text=loss.trains_text,
        has_masks=source.has_masks and not flow_model.draws_tokens,
        needs_pixels=loss.needs_pixels,
        seed=config.loop.seed,
    )
    framed = cache.framed(training)
    for line in [*(model.adapter.lines() if model.adapter else []), *framed.lines()]:
        log.info(line)
    if dry_run:
        held_out_images = validation.once() if recipe.validates else validation.subset([])
        framings = [framed, *([cache.framed(held_out_images, crops=1)] if len(held_out_images) else [])]
        saved = list_checkpoints(output / "checkpoints")
        trained = splits.autoencoder is not None or has_autoencoder
        scaled = trained and (config.latents_as_is or has_statistics(vae))
        for line in estimate_lines(
            model,
            vae,
            source,
            config.loop,
            encoded=0 if source.precomputed else sum(cache.missing(part, scaled=scaled) for part in framings),
            step=step_of(saved[-1]) if saved else 0,
            drawn=None if saved else recipe.teacher_samples,
            besides=[
                *["validations"] * bool(len(framings) > 1 and config.loop.validation_steps),
                *["previews"] * bool(config.loop.preview_steps),
                "checkpoints",
                *["the samples of the checkpoint"] * bool(recipe.teacher_samples and not saved),
                *["the autoencoder's own training"] * (not trained),
            ],
        ):
            log.info(line)
        return

    # ---- cached latents ----
    own = cache.latents(framed)
    data = recipe.training_data(own, flow_model, loss)
    held_out = None
    if len(validation) > 0 and recipe.validates:
        held_out = cache.latents(cache.framed(validation.once(), crops=1))
    vae.cpu()

    # ---- training ----
    result, meter = output / "pipeline", None
    if state.is_main_process:
        keep_initial(output, model.pipeline())
        if config.init_from and not recipe.student and not config.loop.shard and is_plain(loss):
            own_share = 1 - getattr(data, "mixin_share", 0.0)
            by_default = usual(config.loop, len(training), own_share, bool(config.adapter.lora_rank))
            meter = LearningMeter(loss, own, training, state.device, by_default)
    export = partial(
        export_pipeline,
        model=model,
        source=source,
        output=output,
        dtype=getattr(torch, config.export_dtype),
        repository=config.push_to_hub,
        measure=partial(meter.write, output) if meter else lambda: None,
    )
    flops = sample_flops(flow_model.network, loss.text_encoder, data, model.latent_size)
    compile_network(flow_model.network, config.loop, state.device)
    if not run.fit(
        {"flow": loss, **recipe.extra_modules(loss)},
        data,
        config.loop,
        Callbacks(
            validate=None
            if held_out is None
            else lambda: {"loss": validation_loss(loss, held_out, state.device)},
            preview=lambda: preview_grid(flow_model, preview_source(training, validation), state.device),
            export=export,
            export_to=result,
        ),
        description=describe(config, splits, model, recipe),
        flops=flops,
        find_unused_parameters=bool(config.init_from) and source.kind == "unconditional",
    ):
        return
    forget_initial(output)

    # ---- the result ----
    for line in recipe.summary(result, loss, own):
        log.info(line)
    if config.init_from and len(training) <= FEW:
        report_memorisation_of(output, training, validation, splits.data.background, state.device)
    facts = card_facts(model, source, output, config.push_to_hub)
    write_card(result, output, facts)  # once more: what was measured of the result is there now
    if model.adapter is not None:
        write_adapter_card(output / "adapter", output, replace(facts, where=str(output / "adapter")))
    run.end(result, generate_command(facts.kind, facts.example, str(result)))


def describe(config: RunConfig, splits: DataSplits, model: TrainedModel, recipe: Recipe) -> dict[str, Any]:
    """Return plain values that a resumed run must have as well."""
    optional: dict[str, Any] = {
        "framing": config.framing,
        "tokens": config.tokens,
        "latent_variable": config.latent_variable,
        "routing": config.routing,
        "alignment": config.alignment,
    }
    network = model.flow_model.network
    return {
        **model.describe(),
        **recipe.identity,
        "flow": config.flow.describe(),
        "architecture": {name: value for name, value in network.config.items() if not name.startswith("_")},
        "autoencoder": weights_hash(model.flow_model.vae),
        "images": {name: getattr(splits.data, name) for name in ("resolution", "background", "random_flip")},
        "optimizer": {
            name: getattr(config.loop, name) for name in ("optimizer", "lr_layer_decay", "lr_embeddings")
        },
        "data": splits.training.fingerprint(),
        "data_order": splits.training.order(),
        **{name: asdict(section) for name, section in optional.items() if section != type(section)()},
        **config.control.describe(),
        **({"balance_classes": True} if splits.training.balanced else {}),
        **({"latents_as_is": True} if config.latents_as_is else {}),
        "batch": model.batch,
        "seed": config.loop.seed,
    }
