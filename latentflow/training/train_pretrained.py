"""The run that fine-tunes a pretrained model of diffusers, from top to bottom: configs, data, plan, prompts, latents,
network, training, result.

Text encoders, autoencoder and network are read one after the other, and each is gone before the next one comes; text
encoders that learn stay.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, replace
from typing import Any

import torch

from ..config import RunConfig
from ..data import Source
from ..data.dataset import NO_CLASS
from ..errors import UserError
from ..families.added_inputs import CONTROL_INPUTS, ExtendableModel
from ..families.distilled import training_warning
from ..families.extra_channels import MaskedModel
from ..families.pretrained import PretrainedModel
from ..families.quantization import check_quantization, quantization
from ..models import ControlInputs
from ..pipeline.adapter_files import weights_hash
from ..utils.memory import memory_phase
from .data import Captions, DataSplits, LatentCache, generator_as_begun
from .fine_tune.base import refuse_own_result
from .fine_tune.learning import LearningMeter
from .fine_tune.memory_plan import MemoryPlanner, plan_of, refuse_too_large
from .fine_tune.pretrained_adapter import PretrainedAdapter
from .fine_tune.pretrained_base import PretrainedBase, drop, load_pretrained_data
from .fine_tune.pretrained_prior import pretrained_prior, prior_data
from .fine_tune.pretrained_settings import KEPT, base_dtype, setting_lines, with_base_settings
from .fine_tune.prior import MixedData
from .fine_tune.prompts import LivePrompts, Prompts
from .loop.compiling import compile_network
from .loop.distributed import check_precision, process_state, samples_per_step
from .loop.fit import Callbacks
from .losses.control import ControlImages
from .losses.flow import Masking, validation_loss
from .losses.latent_data import Conditions, LatentData
from .losses.pretrained import PretrainedLoss, in_batch
from .pretrained_result import PretrainedResult
from .recipe import plan_lines
from .training_run import TrainingRun, WriteConfig


def train_pretrained(
    config: RunConfig,
    resume_command: str,
    given_keys: Collection[str],
    write_config: WriteConfig,
) -> None:
    """Fine-tune a pretrained model, or go on with a run that was stopped.

    Args:
        config: with ``init_from``.
        given_keys, write_config: see `train`.

    Raises:
        UserError: the settings contradict each other, the data or the model.
        SystemExit: a signal stopped the run before its end, after saving; the status is 128 + its number.
    """
    run = TrainingRun(config, resume_command, write_config)
    output, state, log = run.output, run.state, run.log

    # ---- configs, data, plan ----
    assert config.init_from is not None
    refuse_own_result(config.init_from, output)
    base = PretrainedBase.of(config.init_from, config.fine_tuning.family_options)
    loop = generator_as_begun(config.loop, output, given_keys)
    config = replace(config, loop=loop.with_validation_time(given_keys))
    splits = load_pretrained_data(config, base, given_keys)
    training, validation = splits.training, splits.validation
    prior, prior_line = pretrained_prior(base, config.fine_tuning)
    own_share = 1 - config.fine_tuning.prior_share if prior else 1.0
    config = with_base_settings(config, base, len(training), given_keys, own_share)
    config = replace(config, data=splits.data)
    config.loop.check_validated(len(validation) > 0)
    dtype = base_dtype(config.loop, config.adapter, state.device)
    run.plan(
        [
            *plan_lines(splits, config.loop, own_share),
            *setting_lines(base, config, len(training), own_share),
            prior_line,
            *([f"WARNING: {warning}"] if (warning := training_warning(base.shape)) else []),
        ]
    )
    if config.dry_run:
        for line in MemoryPlanner(base.shape).lines(plan_of(config, dtype)):
            log.info(line)
        return
    quantize = config.fine_tuning.quantize
    check_precision(config.loop.mixed_precision)
    if quantize:
        check_quantization(quantize, state.device.type)
    refuse_too_large(base.shape, config, dtype, state.device)
    run.keep(config)
    base = base.fetched()
    options = {"quantization_config": quantization(quantize, base.folder)} if quantize else {}

    # ---- prompts: encoded, then the text encoders are gone; those that learn encode in each step ----
    with memory_phase("encode prompts"), state.main_process_first():
        prompts = open_prompts(base, splits.source, config, dtype, options, also=prior)

    # ---- latents: encoded, then the autoencoder waits for previews ----
    vae = base.open_autoencoder()
    base.shape.pipeline.vae = vae
    cache = LatentCache(
        data=splits.data,
        framing=config.framing,
        model=base.shape,
        trains_text=False,
        has_masks=splits.source.has_masks,
        needs_pixels=config.flow.inpainting,
        seed=config.loop.seed,
        encode_batch=1,
    )
    framed = cache.framed(training)
    for line in framed.lines():
        log.info(line)
    mirror = config.framing.mirror_captions
    sampled = base.shape.training_defaults.posterior == "sample"

    def latents(images: Source, crops: int | None = None) -> LatentData:
        found = conditions(prompts, images, base.shape, config.loop.seed, mirror=mirror)
        return cache.latents(cache.framed(images, crops=crops), found, sampled=sampled)

    own = latents(training)
    held_out = latents(validation.once(), crops=1) if len(validation) else None
    vae.cpu()

    # ---- network and loss ----
    with memory_phase("load"):
        model = base.open_network(vae, dtype, **options)
    prompts.complete(model)
    data: LatentData | MixedData = own
    if prior:  # drawn before anything in the network changes
        drawn = prior_data(
            base, model, prompts, prior, splits.data.resolution, output / "prior", config.loop.seed,
            lambda images: conditions(prompts, images, base.shape, config.loop.seed, mirror=False),
            pixels=config.flow.inpainting,
        )  # fmt: skip
        data = MixedData(own, drawn, config.fine_tuning.prior_share)
    torch.manual_seed(config.loop.seed)  # the adapter's first weights
    adapter = PretrainedAdapter(model, config.adapter) if config.adapter.lora_rank else None
    masking = control = None
    if config.flow.inpainting:
        assert isinstance(model, ExtendableModel | MaskedModel)
        if base.draws_from != "mask":
            assert isinstance(model, ExtendableModel)
            model.add_inputs({"masks": None}, coupling=config.flow.coupling)
        shapes = config.flow.shapes(splits.source.has_masks)
        masking = Masking(vae, shapes, config.loop.seed, model.mask_condition)
    if splits.source.control:
        channels = model.latent_shape(model.size_multiple, model.size_multiple)[0]
        # A base that draws under them draws nothing without.
        inputs, dropout = ControlInputs(image=channels), 0.0
        if base.draws_from != "control":
            assert isinstance(model, ExtendableModel)
            kinds = {CONTROL_INPUTS[kind]: None for kind in splits.source.control}
            model.add_inputs(kinds, labels=splits.source.labels)
            inputs, dropout = model.control_inputs, config.control.control_dropout
        control = ControlImages(inputs, dropout, config.loop.seed)
    if adapter is None:
        model.network.requires_grad_(True)
    for line in adapter.lines() if adapter else [f"all {base.size / 1e6:.0f} M parameters are trained"]:
        log.info(line)
    if config.network.gradient_checkpointing:
        model.network.enable_gradient_checkpointing()
    batch = samples_per_step(config.loop)
    loss = PretrainedLoss(
        model,
        config.flow,
        config.loop.seed,
        masking=masking,
        control=control,
        outside=config.fine_tuning.outside_mask,
        samples=config.loop.max_train_steps * batch,
        samples_per_step=batch,
        random_numbers=config.loop.random_numbers,
    )

    # ---- training ----
    result = PretrainedResult(model, adapter, prompts, splits, config, base)
    meter = None
    if state.is_main_process and not config.loop.shard:
        usual = with_base_settings(config, base, len(training), KEPT, own_share).loop
        by_default = (usual.max_train_steps, usual.learning_rate)
        fills = base.draws_from == "mask"
        meter = LearningMeter(loss, own, training, state.device, by_default, 16, batch_size=1, fills=fills)
    compile_network(model.network, config.loop, state.device)
    if not run.fit(
        {"flow": loss},
        data,
        config.loop,
        Callbacks(
            validate=None
            if held_out is None
            else lambda: {
                "loss": validation_loss(loss, held_out, state.device, config.loop.train_batch_size)
            },
            preview=lambda: result.preview(state.device),
            export=lambda folder: result.export(folder, meter, state.device),
            export_to=result.folder,
        ),
        description=_description(config, splits, base, vae, adapter, batch)
        | ({"prior": [len(prior), config.fine_tuning.prior_share]} if prior else {}),
        # SDXL's first text encoder ends before its last layer, and its null is no prompt
        find_unused_parameters=config.adapter.lora_text_encoder,
    ):
        return

    # ---- the result ----
    result.write_card()
    run.end(result.folder, result.command())


def open_prompts(
    base: PretrainedBase,
    source: Source,
    config: RunConfig,
    dtype: torch.dtype,
    options: dict[str, Any],
    also: list[str],
) -> Prompts:
    """Return the prompts of a run, encoded unless text encoders learn.

    All captions of the data that are not in the cache are encoded, other prompts, and what guidance leads away from.

    Raises:
        UserError: the text encoders cannot be read, or the cache not written.
    """
    state = process_state()
    encoders = torch.float32 if dtype == torch.float16 else dtype  # T5 overflows in float16
    if config.adapter.lora_text_encoder:
        return LivePrompts(base.open_encoders(state.device, encoders, **options))
    prompts = base.encoded_prompts(config.fine_tuning.quantize, dtype)
    texts = [*Captions(source, mirror=config.framing.mirror_captions)] if source.kind == "text" else []
    texts += also if base.shape.takes_text else []
    if prompts.has_null and not prompts.missing(texts):
        return prompts
    model = base.open_encoders(state.device, encoders, **options)
    prompts.encode(model, texts, progress=state.is_main_process)
    drop(model)
    return prompts


def conditions(
    prompts: Prompts, images: Source, shape: PretrainedModel, seed: int, *, mirror: bool
) -> Conditions:
    """Return what the network is given with images: the rows of their captions or classes, or the null."""
    if images.kind == "text":
        captions = Captions(images, seed, mirror)
        return lambda rows, sample_ids: prompts.entries(
            captions[place] for place in captions.choose(rows, sample_ids)
        )
    if images.kind == "class":
        class_ids = images.class_ids()
        if NO_CLASS in class_ids:
            raise UserError(
                f"{images.name} has images without a class, and a pretrained model of classes learns those alone",
                "Leave them out: --missing-caption skip.",
            )
        return lambda rows, sample_ids: in_batch(
            shape.encode_class([images.classes[class_ids[row]] for row in rows])
        )
    return lambda rows, sample_ids: in_batch(prompts.null(shape).repeat(len(rows)))


def _description(
    config: RunConfig,
    splits: DataSplits,
    base: PretrainedBase,
    vae: Any,
    adapter: PretrainedAdapter | None,
    batch: int,
) -> dict[str, Any]:
    """Return plain values that a resumed run must have as well."""
    network = base.shape.network  # whose config says nothing of quantisation
    described = {"adapter": adapter.description()} if adapter else {}
    return {
        **described,
        "flow": config.flow.describe(),
        **config.control.describe(),
        **({"labels": [*map(list, splits.source.labels)]} if "labels" in splits.source.control else {}),
        **({"balance_classes": True} if splits.training.balanced else {}),
        "architecture": {name: value for name, value in network.config.items() if not name.startswith("_")},
        "quantize": config.fine_tuning.quantize,
        "family_options": {name: base.options[name] for name in sorted(base.options)},
        "outside_mask": config.fine_tuning.outside_mask if splits.source.has_masks else None,
        "autoencoder": weights_hash(vae),
        "images": {name: getattr(splits.data, name) for name in ("resolution", "background", "random_flip")},
        "optimizer": {"optimizer": config.loop.optimizer},
        "data": splits.training.fingerprint(),
        "data_order": splits.training.order(),
        "framing": asdict(config.framing),
        "batch": batch,
        "seed": config.loop.seed,
    }
