"""Train a generator on a folder of images: `latentflow train DATA -o runs/cats`."""

from __future__ import annotations

import copy
import dataclasses
import shlex
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from latentflow.autoencoder import AutoencoderConfig, downscale_factor
from latentflow.cli import given, parse, run, write_config
from latentflow.data import (
    Framing,
    LatentFolder,
    cached_latents,
    cached_masks,
    cached_pixels,
    find_source,
    frame,
    readable,
    split,
)
from latentflow.data.config import DataConfig, FramingConfig
from latentflow.errors import UserError
from latentflow.memory import memory_phase
from latentflow.models.config import NetworkConfig, TextConfig
from latentflow.pipeline import LatentFlowPipeline
from latentflow.training import Callbacks, LoopConfig, fit, log_to, resume_line
from latentflow.training.adapters import Adapter, AdapterConfig
from latentflow.training.alignment import AlignmentConfig, make_alignment
from latentflow.training.base import base_resolution, with_base_classes, with_base_flow
from latentflow.training.card import CardFacts, write_card
from latentflow.training.conditions import conditions_of
from latentflow.training.cost import sample_flops
from latentflow.training.early_stop import refuse_unvalidated
from latentflow.training.export import carry_over
from latentflow.training.fine_tuning import (
    FEW,
    FineTuningConfig,
    fine_tuning_lines,
    fitted,
    held_out_share,
    refuse_without_base,
)
from latentflow.training.flow import FlowConfig, validation_loss
from latentflow.training.folders import write_folder
from latentflow.training.hub import check_push, push
from latentflow.training.latent_data import LatentData, Sized
from latentflow.training.masking import Masking
from latentflow.training.mean_flow import refuse_unfit, stage_class
from latentflow.training.memorised import tell_memorised
from latentflow.training.plan import estimate_lines, plan_lines
from latentflow.training.presets import PRESETS
from latentflow.training.preview import preview_grid, preview_source, preview_steps
from latentflow.training.prior import MixedData, asked_of, prior_data
from latentflow.training.processes import process_state
from latentflow.training.routing import Routing, RoutingConfig
from latentflow.training.run_lock import run_lock
from latentflow.training.start import (
    Networks,
    is_pipeline,
    networks_from,
    new_networks,
    refuse_renumbered_classes,
)
from latentflow.training.vae import autoencoder_for


@dataclass(frozen=True, kw_only=True)
class Config:
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


def main(argv: Sequence[str] | None = None) -> None:
    """Train a generator on a folder of images."""
    config = parse(Config, argv, prog="latentflow train", presets=PRESETS)
    with nullcontext() if config.dry_run else run_lock(config.output):
        train(config, resume_line("train", argv), given(Config, argv))


def train(config: Config, again: str, given_keys: Collection[str]) -> None:
    """The run, from top to bottom; ``given_keys`` are those that no default may change."""
    loop, data, framing, output = config.loop, config.data, config.framing, Path(config.output)
    if config.init_from and Path(config.init_from).is_dir() and not is_pipeline(config.init_from):
        raise UserError(
            f"--init-from {config.init_from} is not a pipeline folder: it holds no model_index.json",
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

    # ---- a fine-tune: what the checkpoint is reminded of, defaults that fit ----
    prior, fine_lines, own_share = [], [], None
    if config.init_from:
        prior, told_of = asked_of(config.init_from, config.fine_tuning, len(training), loop.seed, config.vae)
        own_share = 1 - config.fine_tuning.prior_share if prior else 1.0
        pictures = len(training)
        loop = fitted(loop, given_keys, pictures, own_share, adapter=bool(config.adapter.lora_rank))
        fine_lines = fine_tuning_lines(config.init_from, loop, given_keys, pictures, own_share)
        fine_lines += [f"resolution: {data.resolution} pixels", told_of]
        config = dataclasses.replace(
            config,
            loop=loop,
            data=dataclasses.replace(config.data, validation=data.validation, resolution=data.resolution),
            flow=with_base_flow(config.flow, config.init_from, given_keys),
        )
    refuse_unfit(
        config.flow,
        loop,
        adapted=config.init_from if config.adapter.lora_rank else None,
        routed=config.routing.route_share > 0,
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
            config.init_from, source, config.flow, inpainting, framing.size_conditioning, latent_size
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
        adapter = Adapter(networks, config.adapter, config.init_from, source.classes)
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
    stage = stage_class(config.flow)(
        networks.network,
        config.flow,
        loop.seed,
        networks.text_encoder if networks.trained_text else None,
        masking,
        routing,
        make_alignment(config.alignment, networks.network),
        samples=loop.max_train_steps * batch,
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
        views = {}
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
    centre = dataclasses.replace(framing, crops=1)
    held_out = latent_data(cut(validation.once(), config=centre)) if len(validation) else None
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
            average=averages,
            folded_guidance=config.flow.choices().settings.guidance if averages else 1.0,
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
        {"flow": stage},
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
            "flow": config.flow.describe(),
            "data": training.fingerprint(),
            **({"prior": [len(prior), config.fine_tuning.prior_share]} if prior else {}),
            **{
                name: dataclasses.asdict(one)
                for name, one in {
                    "framing": framing,
                    "routing": config.routing,
                    "alignment": config.alignment,
                }.items()
                if one != type(one)()
            },
            "batch": batch,
            "seed": loop.seed,
        },
        resume_line=again,
        flops=flops,
        partly=bool(config.init_from) and source.kind == "unconditional",
    )
    if finished and config.init_from and len(training) <= FEW and process_state().is_main_process:
        tell_memorised(output, training, validation, data.background, device)
    if finished:
        try_it = shlex.join(["latentflow", "generate", "--checkpoint", str(output / "pipeline")])
        log.info(f"done: {output / 'pipeline'}; try it with\n  {try_it}")
        if config.push_to_hub and process_state().is_main_process:
            log.info(f"pushed: {push(output / 'pipeline', config.push_to_hub)}")


if __name__ == "__main__":
    run(main)
