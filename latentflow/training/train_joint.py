"""The run of an autoencoder and a flow that learn together, from top to bottom: data, networks, training, result."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from ..autoencoder import Autoencoder, build_autoencoder, latent_channels
from ..autoencoder.losses import PatchDiscriminator
from ..config import RunConfig
from ..data import Source, cached_pixels, pixels_to_images
from ..errors import UserError
from ..families.stored_weights import parameter_count
from ..metrics import psnr
from .data import (
    DataSplits,
    as_begun,
    conditions_of,
    generator_as_begun,
    given_autoencoder,
    load_data,
    refuse_renumbered_classes,
)
from .export import card_facts, export_pipeline, preview_grid, preview_source
from .fine_tune.base import refuse_pretrained_settings
from .loop.compiling import compile_network
from .loop.data_order import SampleUse
from .loop.fit import Callbacks
from .losses.autoencoder import DiscriminatorLoss
from .losses.flow import validation_loss
from .losses.joint import JointAutoencoderLoss, JointFlowLoss
from .losses.latent_data import Conditions, PixelData
from .recipe import scratch_recipe
from .report.card import generate_command, write_card
from .train import describe
from .train_autoencoder import reconstructions
from .trained_model import build
from .training_run import TrainingRun, WriteConfig
from .unfinished import forget_initial, keep_initial

_VALIDATION_IMAGES = 256


def train_joint(
    config: RunConfig,
    resume_command: str,
    given_keys: Collection[str],
    write_config: WriteConfig,
) -> None:
    """Train an autoencoder and a generator together, or go on with a run that was stopped.

    Args:
        config: with ``joint``.
        given_keys, write_config: see `train`.

    Raises:
        UserError: the settings contradict each other, or the data; or the encoder has collapsed at the end.
        SystemExit: a signal stopped the run before its end, after saving; the status is 128 + its number.
    """
    run = TrainingRun(config, resume_command, write_config)
    output, state = run.output, run.state

    # ---- data ----
    loop = generator_as_begun(config.loop, output, given_keys).with_validation_time(given_keys)
    config = replace(config, data=as_begun(config.data, output, given_keys), loop=loop)
    refuse_pretrained_settings(config.fine_tuning)
    splits = load_data(config.data, given_keys, seed=loop.seed, vae=config.vae)
    source, training = splits.source, splits.training
    validation = splits.validation.once()
    validation = validation.subset(validation.spread(_VALIDATION_IMAGES)) if len(validation) else validation
    if source.precomputed:
        raise UserError(
            f"--joint with {source.name}, whose images are latents already",
            "Give the images themselves: the autoencoder learns from them.",
        )
    if source.has_masks:
        raise UserError(
            f"--joint with {source.name}, whose images have masks: it learns no inpainting",
            "Add --masks none to leave them out; or train the autoencoder first (latentflow autoencoder).",
        )
    refuse_renumbered_classes(output / "pipeline", source)
    loop.check_validated(len(validation) > 0)

    # ---- networks and losses ----
    recipe = replace(scratch_recipe(config.flow, loop, splits), loss_options={"kind": JointFlowLoss})
    torch.manual_seed(loop.seed)
    vae = starting_autoencoder(config, splits)
    model = build(config, source, splits.data.resolution, vae, recipe)
    flow = model.loss
    assert isinstance(flow, JointFlowLoss)
    batch = loop.train_batch_size * loop.gradient_accumulation_steps
    settings = replace(config.autoencoder, autoencoder_batch_size=batch)
    discriminator = PatchDiscriminator() if settings.adversarial_weight else None
    autoencoder = JointAutoencoderLoss(
        vae, settings, config.joint, flow, loop.seed, discriminator, loop.random_numbers
    )
    modules: dict[str, nn.Module] = {"autoencoder": autoencoder, "flow": flow}
    if discriminator is not None:
        modules["discriminator"] = DiscriminatorLoss(discriminator, autoencoder)

    # ---- plan ----
    sizes = [parameter_count(part) / 1e6 for part in (vae, model.flow_model.network)]
    own = (
        f"joint training ({config.joint.joint}): autoencoder {sizes[0]:.1f} M parameters, network {sizes[1]:.1f} M, "
        f"latents of {latent_channels(vae)} x {model.latent_size} x {model.latent_size}"
    )
    run.plan([*recipe.plan, own])
    if config.dry_run:
        return
    run.keep(config)

    # ---- data as the losses take them ----
    def images(part: Source, flips: bool) -> JointData:
        encoder = None if flow.trains_text else model.flow_model.pipeline.text_encoder
        tokenizer, mirror = model.flow_model.pipeline.tokenizer, config.framing.mirror_captions and flips
        conditions = conditions_of(part, loop.seed, tokenizer, encoder, mirror=mirror)
        return JointData(part, splits.data.resolution, splits.data.background, conditions, flips=flips)

    learned = images(training, splits.data.random_flip)
    held_out = images(validation, False) if len(validation) else None

    # ---- validation, preview, export ----
    def validate() -> dict[str, float]:
        assert held_out is not None
        autoencoder.keep_statistics()
        originals = pixels_to_images(held_out.pixels[:])
        found = torch.cat(list(reconstructions(vae, originals)))
        return {
            "loss": validation_loss(flow, held_out, state.device),
            "psnr": float(psnr(found, originals).mean()),
        }

    def preview() -> Image.Image:
        autoencoder.keep_statistics()
        return preview_grid(model.flow_model, preview_source(training, splits.validation), state.device)

    def export(folder: Path) -> None:
        autoencoder.refuse_collapse()
        autoencoder.keep_statistics()
        dtype = getattr(torch, config.export_dtype)
        export_pipeline(folder, model, source, output, dtype, config.push_to_hub)

    # ---- training ----
    result = output / "pipeline"
    if state.is_main_process:
        keep_initial(output, model.pipeline())
    compile_network(model.flow_model.network, loop, state.device)
    if not run.fit(
        modules,
        learned,
        loop,
        Callbacks(
            validate=None if held_out is None else validate, preview=preview, export=export, export_to=result
        ),
        description=describe(config, splits, model, recipe)
        | {
            "autoencoder": config.autoencoder.describe(),
            "joint": asdict(config.joint),
            **({} if config.joint.joint == "alignment" else {"network_sees": "latents at a spread of one"}),
        },
    ):
        return
    forget_initial(output)

    # ---- the result ----
    facts = card_facts(model, source, output, config.push_to_hub)
    write_card(result, output, facts)
    command = generate_command(facts.kind, facts.example, str(result))
    run.end(result, command, f"its autoencoder is {result / 'vae'}: --vae {result} takes it")


def starting_autoencoder(config: RunConfig, splits: DataSplits) -> Autoencoder:
    """Return the autoencoder that learns: a new one, or that of ``--vae``; its statistics are in its config.

    Raises:
        UserError: it does not fit the mode, or the resolution.
    """
    if splits.autoencoder is None:
        vae = build_autoencoder(config.autoencoder, splits.data.resolution)
        channels = latent_channels(vae)
        vae.register_to_config(latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
        return vae.to(memory_format=torch.channels_last)
    vae = given_autoencoder(splits.autoencoder, splits.training, splits.data, measured=not config.dry_run)
    fitting = {"unified": (AutoencoderDC,), "lsgm": (AutoencoderKL,)}
    classes = fitting.get(str(config.joint.joint), (AutoencoderDC, AutoencoderKL))
    if not isinstance(vae, classes):
        names = " or ".join(each.__name__ for each in classes)
        raise UserError(
            f"--joint {config.joint.joint} with {splits.autoencoder}, of class {type(vae).__name__}",
            f"It needs {names}; without --vae a new autoencoder is trained.",
        )
    return vae.requires_grad_(True)


class JointData:
    """Images with the condition of each, as many times in an epoch as their ``repeats`` say; see `PixelData`.

    Attributes:
        pixels: (N, 3, H, W) uint8, cached.
    """

    def __init__(
        self, source: Source, resolution: int, background: str, conditions: Conditions, *, flips: bool
    ) -> None:
        self.pixels = cached_pixels(source, resolution, background)
        self._images, self._conditions = PixelData(source, self.pixels, flips=flips), conditions
        self._uses = np.asarray(source.uses(), dtype=np.int32)
        weights = np.asarray(source.weights(), dtype=np.float32)
        self._weights: Tensor | None = None if (weights == 1).all() else torch.from_numpy(weights)

    def __len__(self) -> int:
        return len(self._uses)

    def __getitems__(self, uses: list[SampleUse]) -> dict[str, Any]:
        ids = [use.sample_id for use in uses]
        rows = self._uses[[use.index for use in uses]].tolist()
        batch = self._images.__getitems__(
            [SampleUse(row, number) for row, number in zip(rows, ids, strict=True)]
        )
        weights = {} if self._weights is None else {"weights": self._weights[rows]}
        return {**batch, **weights, **self._conditions(rows, ids)}

    def name(self, index: int) -> str:
        return self._images.name(int(self._uses[index]))
