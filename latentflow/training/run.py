"""The run of a generator from top to bottom: data, autoencoder, networks, cached latents, training, export."""

from __future__ import annotations

import copy
import dataclasses
import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import tyro
from torch import Tensor

from ..autoencoder import AutoencoderConfig, downscale_factor
from ..data import (
    Framing,
    LatentFolder,
    Rows,
    cached_latents,
    cached_masks,
    cached_pixels,
    find_source,
    frame,
    readable,
    split,
)
from ..data.config import DataConfig, FramingConfig
from ..errors import UserError
from ..memory import memory_phase
from ..models.config import NetworkConfig, TextConfig
from ..pipeline import LatentFlowPipeline
from .adapters import Adapter, AdapterConfig
from .alignment import AlignmentConfig, make_alignment
from .average_velocity import refuse_unfit, stage_class
from .base import base_resolution, lost_guidance, with_base_classes, with_base_flow
from .callbacks import Callbacks
from .card import CardFacts, write_card
from .conditions import conditions_of
from .config import LoopConfig
from .cost import sample_flops
from .distillation import Distillation, few_steps, student_keys
from .early_stop import refuse_unvalidated
from .export import carry_over
from .fine_tuning import (
    FEW,
    FineTuningConfig,
    fine_tuning_lines,
    fitted,
    held_out_share,
    refuse_without_base,
)
from .flow import FlowConfig, validation_loss
from .folders import write_folder
from .hub import check_push, push
from .latent_data import LatentData, Sized
from .logs import log_to
from .loop import fit
from .masking import Masking
from .memorised import tell_memorised
from .plan import estimate_lines, plan_lines
from .preview import preview_grid, preview_source, preview_steps
from .prior import MixedData, asked_of, prior_data
from .processes import process_state
from .routing import Routing, RoutingConfig
from .start import (
    Networks,
    is_pipeline,
    networks_from,
    new_networks,
    refuse_renumbered_classes,
)
from .vae import autoencoder_for


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Turn a folder of images into a diffusers pipeline; the same line again resumes."""

    data: DataConfig
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])]
    """Run folder; the result is its subfolder `pipeline`."""
    init_from: str | None = None
    """Fine-tune: start from the weights of this pipeline folder."""
    vae: str | None = None
    """A pretrained diffusers autoencoder (folder or hub id). Empty: one is trained on the data first."""
    export_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the weights in `pipeline`; the run's checkpoints keep float32."""
    push_to_hub: str | None = None
    """Put the result on the Hugging Face hub under this name, owner/name. A new repository is private."""
    dry_run: bool = False
    """Print the plan, the sizes and an estimate of memory and time, and stop."""
    fine_tuning: FineTuningConfig = FineTuningConfig()
    framing: FramingConfig = FramingConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    network: NetworkConfig = NetworkConfig()
    text: TextConfig = TextConfig()
    adapter: AdapterConfig = AdapterConfig()
    flow: FlowConfig = FlowConfig()
    routing: RoutingConfig = RoutingConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    loop: LoopConfig = LoopConfig()

    def __post_init__(self) -> None:
        if self.framing.mirror_captions and not self.data.random_flip:
            raise UserError(
                "--mirror-captions without --random-flip", "Add --random-flip: nothing is mirrored."
            )
        if not self.init_from:
            refuse_without_base(self.fine_tuning)
        if self.adapter.lora_rank and not self.init_from:
            raise UserError("--lora-rank without --init-from", "Name the checkpoint that it adapts.")
        if self.adapter.lora_rank and self.loop.ema_lengths:
            raise UserError(
                "--ema-lengths with --lora-rank: averages of another length are not made for adapters",
                "Leave out one of the two.",
            )


def train(
    config: RunConfig,
    again: str,
    given_keys: Collection[str],
    write_config: Callable[[RunConfig, Path], None],
    distillation: Distillation | None = None,
) -> None:
    """The run, from top to bottom.

    Args:
        again: the command that resumes it.
        given_keys: of the settings that no default may change.
        write_config: writes the settings into a file.
        distillation: with a teacher, the checkpoint ``config.init_from``, whose student is trained.
    """
    loop, data, framing, output = config.loop, config.data, config.framing, Path(config.output)
    if config.init_from and Path(config.init_from).is_dir() and not is_pipeline(config.init_from):
        raise UserError(
            f"{config.init_from} is not a pipeline folder: it holds no model_index.json",
            "Give a pipeline folder, such as runs/cats/pipeline.",
        )
    if config.push_to_hub and not config.dry_run:
        check_push(config.push_to_hub)

    # ---- data: what is there, what it is conditioned on ----
    if config.dry_run:
        log = log_to(None)
    else:
        output.mkdir(parents=True, exist_ok=True)
        log = log_to(output)
    source = readable(find_source(data.data, **data.wanted()))
    given = config.vae or config.init_from
    if isinstance(source, LatentFolder):
        data, given = source.adopt(data), given or source.autoencoder
    if config.init_from:
        source = with_base_classes(source, config.init_from, output)
        data = dataclasses.replace(data, validation=held_out_share(given_keys, data.validation, len(source)))
        if "resolution" not in given_keys and not isinstance(source, LatentFolder):
            data = dataclasses.replace(data, resolution=base_resolution(config.init_from) or data.resolution)
    training, validation = (source.subset(rows) for rows in split(source, data.validation, loop.seed))
    refuse_renumbered_classes(output / "pipeline", source)
    refuse_unvalidated(loop, len(validation) > 0)

    if distillation is not None:
        distillation.refuse_unfit(source, framing.size_conditioning, loop)

    # ---- a fine-tune: what the checkpoint is reminded of, defaults that fit ----
    prior: list[str] = []
    fine_lines: list[str] = []
    own_share = None
    if config.init_from:
        if distillation is None:
            prior, line = asked_of(config.init_from, config.fine_tuning, len(training), loop.seed, config.vae)
            told_of = [line]
        else:
            told_of = distillation.lines()
        own_share = 1 - config.fine_tuning.prior_share if prior else 1.0
        pictures = len(training)
        loop = fitted(loop, given_keys, pictures, own_share, adapter=bool(config.adapter.lora_rank))
        lost = lost_guidance(config.flow, config.init_from, given_keys) if distillation is None else 1.0
        fine_lines = fine_tuning_lines(config.init_from, loop, given_keys, pictures, own_share, lost)
        fine_lines += [f"resolution: {data.resolution} pixels", *told_of]
        config = dataclasses.replace(
            config,
            loop=loop,
            data=dataclasses.replace(config.data, validation=data.validation, resolution=data.resolution),
            flow=with_base_flow(
                config.flow,
                config.init_from,
                given_keys if distillation is None else student_keys(given_keys),
            ),
        )
    refuse_unfit(
        config.flow,
        loop,
        routed=config.routing.route_share > 0,
        taught=distillation is not None,
        bare=not config.init_from and source.kind == "unconditional",
    )
    for line in (*plan_lines(source, training, validation, loop, own_share), *fine_lines):
        log.info(line)
    if not config.dry_run and process_state().is_main_process:
        write_config(config, output / "config.yaml")

    # ---- autoencoder: given, the checkpoint's, or trained now ----
    vae = autoencoder_for(
        given,
        training,
        validation,
        config.autoencoder,
        loop,
        output / "autoencoder",
        data=data,
        resume_line=again,
        untrained=config.dry_run,
    )
    if vae is None:
        return  # stopped by a signal; the line that resumes was printed

    # ---- networks ----
    torch.manual_seed(loop.seed)
    latent_size = data.resolution // downscale_factor(vae)
    own_masks = source.has_masks
    averages = config.flow.choices().objective.average
    inpainting = config.flow.inpainting or own_masks
    if config.init_from:
        networks = networks_from(
            config.init_from,
            source,
            config.flow,
            inpainting,
            framing.size_conditioning,
            latent_size,
            student=distillation is not None,
        )
    else:
        networks = new_networks(
            source,
            vae,
            latent_size,
            config.network,
            config.text,
            inpainting,
            framing.size_conditioning,
            device="meta" if config.dry_run else "cpu",
            intervals=averages,
        )
    adapter = None
    if config.init_from and config.adapter.lora_rank:
        followed = few_steps(config.flow, distillation).plain()
        adapter = Adapter(networks, config.adapter, config.init_from, source.classes, followed)
        networks = adapter.networks
        for line in adapter.lines():
            log.info(line)
    if config.network.gradient_checkpointing:
        networks.network.enable_gradient_checkpointing()
    masking = None
    if networks.network.config.condition_channels:
        masking = Masking(vae, config.flow.shapes(own_masks), loop.seed)
    batch = loop.train_batch_size * loop.gradient_accumulation_steps * process_state().num_processes
    routing = None
    if config.routing.route_share:
        routing = Routing(config.routing, networks.network, (loop.max_train_steps * batch, batch))
    make_stage = stage_class(config.flow) if distillation is None else distillation.stage(config.flow)
    stage = make_stage(
        networks.network,
        config.flow,
        loop.seed,
        networks.text_encoder if networks.trained_text else None,
        masking,
        routing,
        make_alignment(config.alignment, networks.network),
        samples=loop.max_train_steps * batch,
        samples_per_step=batch,
    )
    told = bool(networks.network.config.size_conditioning)
    unit = downscale_factor(vae) * networks.network.config.get("patch_size", 1)
    cut = partial(frame, resolution=data.resolution, unit=unit, told=told)
    framed = cut(training, config=framing)
    for line in framed.lines():
        log.info(line)
    if config.dry_run:
        views = 0 if isinstance(source, LatentFolder) else framing.crops * (1 + data.random_flip)
        for line in estimate_lines(stage, networks, vae, source, loop, latent_size, views):
            log.info(line)
        return

    # ---- latents and conditions, cached ----
    def sized(framed: Framing, number: int) -> Sized:
        part, size = framed.part(number), framed.sizes[number]
        views: dict[str, Tensor | Rows] = {}
        if stage.needs_pixels:
            views["pixels"] = cached_pixels(part, size, data.background)
        if own_masks:
            own = cached_masks(part, size)
            views |= {"masks": own.masks, "has_mask": own.has_mask}
        with memory_phase("encode"), process_state().main_process_first():
            table = cached_latents(
                part,
                vae,
                size,
                background=data.background,
                flips=data.random_flip,
                device=process_state().device,
                progress=process_state().is_main_process,
            )
        return Sized(table, views)

    def latent_data(framed: Framing) -> LatentData:
        return LatentData(
            framed,
            [sized(framed, number) for number in range(len(framed.sizes))],
            conditions_of(framed.source, networks, loop.seed, framing.mirror_captions),
            flips=data.random_flip,
            told=told,
            seed=loop.seed,
        )

    own_data = latent_data(framed)
    train_data: LatentData | MixedData = own_data
    if prior:
        samples = prior_data(
            str(config.init_from), prior, networks, output / "prior", loop.seed, stage.needs_pixels, told
        )
        train_data = MixedData(own_data, samples, config.fine_tuning.prior_share)
    if distillation is not None and distillation.method.pairs:
        train_data = distillation.pairs(training, networks, output, loop.seed, told, stage.needs_pixels)
    centre = dataclasses.replace(framing, crops=1)
    validates = len(validation) > 0 and (distillation is None or distillation.validates)
    held_out = latent_data(cut(validation.once(), config=centre)) if validates else None
    vae.cpu()

    # ---- training ----
    device = process_state().device
    id2label = dict(enumerate(networks.classes)) or None

    def pipeline(networks: Networks = networks) -> LatentFlowPipeline:
        return LatentFlowPipeline(
            vae=vae,
            transformer=networks.network,
            text_encoder=networks.text_encoder,
            tokenizer=networks.tokenizer,
            id2label=id2label,
            path=config.flow.path,
            path_options=config.flow.path_options,
            prediction=config.flow.prediction,
            coupling=config.flow.coupling,
            **few_steps(config.flow, distillation).plain(),
        )

    def export(folder: Path) -> None:
        result = pipeline() if adapter is None else pipeline(adapter.merged())
        if config.export_dtype != "float32":
            result = copy.deepcopy(result).to(dtype=getattr(torch, config.export_dtype))
        result.save_pretrained(folder)
        facts = CardFacts(
            where=config.push_to_hub or str(output / "pipeline"),
            source=source,
            parts={name: one for name, one in result.components.items() if isinstance(one, torch.nn.Module)},
            inpaints=result.takes_masks,
            sample_steps=preview_steps(result),
        )
        write_card(folder, output, facts)
        carry_over(output / "pipeline", folder)
        if adapter is not None:
            write_folder(output / "adapter", partial(adapter.save, earlier=output / "adapter"))

    flops = sample_flops(networks.network, stage.text_encoder, train_data, latent_size)
    if loop.compile:
        networks.network.compile()
    finished = fit(
        {"flow": stage} if distillation is None else distillation.players(stage),
        train_data,
        loop,
        output,
        callbacks=Callbacks(
            validate=None if held_out is None else lambda: {"loss": validation_loss(stage, held_out, device)},
            preview=lambda: preview_grid(pipeline(), preview_source(training, validation), device),
            export=export,
            export_to=output / "pipeline",
        ),
        description={
            "network": networks.describe(),
            **({} if adapter is None else {"adapter": adapter.description()}),
            **({} if distillation is None else {"distillation": distillation.describe()}),
            "flow": config.flow.describe(),
            "data": training.fingerprint(),
            **({"prior": [len(prior), config.fine_tuning.prior_share]} if prior else {}),
            **{
                name: dataclasses.asdict(one)
                for name, one in cast(
                    dict[str, Any],
                    {
                        "framing": framing,
                        "routing": config.routing,
                        "alignment": config.alignment,
                    },
                ).items()
                if one != type(one)()
            },
            "batch": batch,
            "seed": loop.seed,
        },
        resume_line=again,
        flops=flops,
        partly=bool(config.init_from) and source.kind == "unconditional",
    )
    if (
        finished
        and distillation is not None
        and distillation.method.pairs
        and process_state().is_main_process
    ):
        log.info(distillation.straightness(output / "pipeline", stage, own_data))
    if finished and config.init_from and len(training) <= FEW and process_state().is_main_process:
        tell_memorised(output, training, validation, data.background, device)
    if finished:
        try_it = shlex.join(["latentflow", "generate", "--checkpoint", str(output / "pipeline")])
        log.info(f"done: {output / 'pipeline'}; try it with\n  {try_it}")
        if config.push_to_hub and process_state().is_main_process:
            log.info(f"pushed: {push(output / 'pipeline', config.push_to_hub)}")
