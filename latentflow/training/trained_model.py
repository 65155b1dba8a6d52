"""The model that a run trains: new networks, or those of a checkpoint fitted to other data, with an adapter or
without; and the module whose output is their loss.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..autoencoder import Autoencoder, codebook, downscale_factor, latent_channels, mask_channels
from ..config import LatentVariableConfig, NetworkConfig, RunConfig, TextConfig
from ..data import Source
from ..data.dataset import NO_CLASS
from ..errors import UserError, few
from ..families import FlowModel
from ..families.tokens import CodeModel, TokenModel
from ..flow.discrete import MixturePath
from ..models import (
    ControlInputs,
    DiT,
    TokenDiT,
    UNet,
    dit_config,
    load_text_encoder,
    small_text_encoder,
    train_tokenizer,
)
from ..pipeline.generate import LatentFlowPipeline
from ..utils.words import known_words, missing_words
from .fine_tune.adapters import Adapter
from .fine_tune.base import kept_guidance, open_base, refuse_other_flow
from .loop.distributed import samples_per_step
from .losses import CodeLoss, ControlImages, TokenLoss, flow_loss
from .losses.alignment import Routing, make_alignment
from .losses.conditioned import ConditionedLoss
from .losses.flow import Masking
from .losses.latent_variable import LatentVariable
from .recipe import Recipe

log = logging.getLogger(__name__)

_DIT_SETTINGS = (
    "patch_size", "width", "depth", "heads", "norm", "activation", "position", "qk_norm", "registers",
)  # fmt: skip


@dataclass(frozen=True)
class TrainedModel:
    """A flow model with its loss.

    Attributes:
        flow_model: of the networks that are trained, as they are at any time: for previews and the export.
        adapter: in the networks; None without one.
        loss: the module whose output is the loss.
        latent_size: side of the latents.
        batch: samples of a step, in all processes.
    """

    flow_model: FlowModel
    adapter: Adapter | None
    loss: ConditionedLoss
    latent_size: int
    batch: int

    def pipeline(self) -> Any:
        """Return the pipeline of the networks as they are now, with an adapter merged into copies of them."""
        pipeline = self.flow_model.pipeline
        return pipeline if self.adapter is None else pipeline.from_pipe(pipeline, **self.adapter.merged())

    def describe(self) -> dict[str, Any]:
        """Return plain values that a resumed run must have as well."""
        shapes = {name: list(weight.shape) for name, weight in self.flow_model.network.named_parameters()}
        if self.loss.text_encoder is not None:
            encoder = self.loss.text_encoder.named_parameters()
            shapes |= {f"text.{name}": list(weight.shape) for name, weight in encoder}
        described: dict[str, Any] = {"network": shapes}
        return described if self.adapter is None else described | {"adapter": self.adapter.description()}


def build(
    config: RunConfig, source: Source, resolution: int, vae: Autoencoder, recipe: Recipe
) -> TrainedModel:
    """Build new networks for the images of ``source``, or load those of the checkpoint; and make their loss.

    Raises:
        UserError: the settings contradict each other, the data or the checkpoint.
    """
    loop, flow = config.loop, config.flow
    tokens = config.tokens.path(len(codebook(vae))) if config.tokens.tokens else None
    inpainting = tokens is None and (flow.inpainting or source.has_masks)
    sizes = config.framing.size_conditioning
    latent_size = resolution // downscale_factor(vae)
    torch.manual_seed(loop.seed)

    # ---- networks ----
    learnt = False  # a latent variable
    trained_null = flow.condition_dropout > 0 or has_unlabelled(source)
    if config.init_from:
        base = open_base(config.init_from)
        learnt = base.latent_variable is not None
        trained_null = base.trained_null or (trained_null and not recipe.student)
        if not recipe.student:
            refuse_other_flow(config.init_from, base, flow)
        networks = networks_from(
            base,
            config.init_from,
            source,
            inpainting=inpainting,
            size_conditioning=sizes,
            latent_size=latent_size,
            intervals=flow.choices().objective.average,
            fixed_text=recipe.student,
            latent_variable=config.latent_variable,
        )
    else:
        networks = new_networks(
            source,
            vae,
            latent_size,
            config.network,
            config.text,
            inpainting,
            sizes,
            device="meta" if config.dry_run else "cpu",
            intervals=recipe.sampling.average,
            tokens=tokens,
            tied=config.tokens.tied_logits,
            codes=len(codebook(vae)) if flow.predicts_codes else None,
            latent_variable=config.latent_variable,
        )
    guidance = kept_guidance(config.init_from) if config.init_from else {}
    if not trained_null:
        guidance |= {"trained_null": False, "usual_guidance": 1.0}
        log.info("the checkpoint draws without guidance, which needs what is learnt without a condition")
    elif not config.init_from and not flow.condition_dropout and source.kind != "unconditional":
        log.info("--condition-dropout 0: guidance leads away from the images without a condition alone")
    model = LatentFlowPipeline(
        vae=vae,
        **networks,
        path=flow.path,
        path_options=flow.path_options,
        prediction=flow.prediction,
        coupling=flow.coupling,
        time_density=flow.time_density,
        time_options=flow.time_options,
        token_path=None if tokens is None else config.tokens.plain(),
        **recipe.sampling.plain(),
        **guidance,
    ).model
    network, encoder = model.network, model.pipeline.text_encoder
    trains_text = model.trains_text and not recipe.student  # which shares its teacher's
    adapter = None
    if config.init_from and config.adapter.lora_rank:
        adapter = Adapter(model, config.adapter, config.init_from, trains_text=trains_text)
        trains_text = adapter.trains_text
    if recipe.student and network.z_encoder is not None:  # z means what it means to the teacher
        network.z_encoder.requires_grad_(False)
    if config.network.gradient_checkpointing:
        network.enable_gradient_checkpointing()

    # ---- loss ----
    batch = samples_per_step(loop)
    samples = loop.max_train_steps * batch
    if isinstance(model, TokenModel):
        learned = encoder if trains_text else None
        token_loss = TokenLoss(
            network,
            config.tokens,
            model.token_path,
            loop.seed,
            flow.condition_dropout,
            learned,
            random_numbers=loop.random_numbers,
        )
        return TrainedModel(model, None, token_loss, latent_size, batch)
    of_codes: dict[str, Any] = (
        {"kind": CodeLoss, "codes": model.codes} if isinstance(model, CodeModel) else {}
    )
    loss = flow_loss(
        network,
        flow,
        loop.seed,
        encoder if trains_text else None,
        Masking(vae, flow.shapes(source.has_masks), loop.seed) if model.takes_masks else None,
        Routing(config.routing, network, (samples, batch)) if config.routing.route_share else None,
        make_alignment(config.alignment, network) if config.alignment.alignment else None,
        control=None
        if not source.control
        else ControlImages(
            ControlInputs.of(network.config["control"]), config.control.control_dropout, loop.seed
        ),
        samples=samples,
        samples_per_step=batch,
        random_numbers=loop.random_numbers,
        latent_variable=LatentVariable(config.latent_variable, samples, batch, learnt=learnt),
        **of_codes,
        **recipe.loss_options,
    )
    return TrainedModel(model, adapter, loss, latent_size, batch)


def new_networks(
    source: Source,
    vae: Autoencoder,
    latent_size: int,
    network: NetworkConfig,
    text: TextConfig,
    inpainting: bool = False,
    size_conditioning: bool = False,
    device: str = "cpu",
    intervals: bool = False,
    tokens: MixturePath | None = None,
    tied: bool = True,
    codes: int | None = None,
    latent_variable: LatentVariableConfig | None = None,
) -> dict[str, Any]:
    """Build networks with fresh weights for the source's kind of condition, and with ``inpainting`` for masked images.

    Args:
        device: on "meta" the velocity network has shapes and no weights: enough for a plan, at no cost.
        intervals: it takes the end of an interval.
        tokens: the path of the tokens that it learns; None: latents.
        tied: logits of the tokens share their embeddings.
        codes: number of codes that it predicts, from latents; None: what has the shape of latents.
        latent_variable: its settings; None: it has none, or keeps that of the checkpoint.

    Returns:
        Arguments of ``LatentFlowPipeline``: transformer, text_encoder, tokenizer, id2label.

    Raises:
        UserError: a setting does not fit (see `DiT` and `UNet`), or the text encoder cannot be loaded.
    """
    tokenizer, encoder = None, None
    if source.kind == "text" and text.text_encoder:
        tokenizer, encoder = load_text_encoder(text.text_encoder)
    elif source.kind == "text":
        tokenizer = train_tokenizer([*chain.from_iterable(source.all_captions())], text.text_length)
        encoder = small_text_encoder(tokenizer, text.text_width, text.text_depth, text.text_heads)
    arguments: dict[str, Any] = {
        "in_channels": latent_channels(vae),
        "num_classes": len(source.classes) if source.kind == "class" else None,
        "text_dim": _text_dim(encoder),
        "condition_channels": mask_channels(vae) if inpainting else 0,
        "sample_size": latent_size,
        "size_conditioning": size_conditioning,
        "control": control_inputs(source, vae).plain(),
        **(latent_variable or LatentVariableConfig()).network(),
    }
    with torch.device(device):
        if network.network == "unet":
            if intervals:
                raise _no_intervals("--network unet")
            built: Any = UNet(**arguments)
        else:
            chosen = {name: getattr(network, name) for name in _DIT_SETTINGS}
            chosen = {name: value for name, value in chosen.items() if value is not None}
            if intervals:
                # The derivative by time is part of what is learned, and times 1000 makes noise of it: the plain time
                # of continuous consistency models (arXiv:2410.11081, sec. 4.1).
                chosen |= {"interval_conditioning": True, "time_scale": 1.0}
            if tokens is not None or codes is not None:
                chosen["patch_size"] = 1  # each token has logits of its own
            if codes is not None:
                chosen["out_channels"] = codes
            settings = dit_config(network.network_preset, network.block, **arguments, **chosen)
            if tokens is None:
                built = DiT(**settings)
            else:
                del settings["in_channels"]
                built = TokenDiT(tokens.vocabulary, tokens.states, tied=tied, transformer=settings)
    return _components(built, encoder, tokenizer, source.classes)


def has_unlabelled(source: Source) -> bool:
    """Return whether any image is trained on without a condition, as are all of data without one."""
    if source.kind == "text":
        return any(not caption.strip() for captions in source.all_captions() for caption in captions)
    return source.kind == "unconditional" or NO_CLASS in source.class_ids()


def control_inputs(source: Source, vae: Autoencoder) -> ControlInputs:
    """Return the control images that a network takes for those of ``source``."""
    return ControlInputs(
        image=latent_channels(vae) if "image" in source.control else 0,
        labels=source.labels if "labels" in source.control else (),
        cell=downscale_factor(vae),
    )


def networks_from(
    base: FlowModel,
    checkpoint: str,
    source: Source,
    *,
    inpainting: bool = False,
    size_conditioning: bool = False,
    latent_size: int | None = None,
    intervals: bool = False,
    fixed_text: bool = False,
    latent_variable: LatentVariableConfig | None = None,
) -> dict[str, Any]:
    """Fit the networks of ``base`` to other data: new classes get new rows, new words new embeddings.

    Nothing else changes: latents of another size get the positions that belong to them, which are computed.

    With ``inpainting`` a network that has not learnt it gets the channels for it, their weights zero, and likewise
    with ``size_conditioning``, for control images and a latent variable: its samples are exactly those from before.
    With ``intervals``, to learn average velocities, it gets the length of the interval in the same way: at first every
    average is the velocity.

    Args:
        checkpoint: where ``base`` was opened.
        source: what they will be trained on, its classes those of `with_base_classes`.
        latent_size: side of the latents that they will be trained on; None: the checkpoint's.
        fixed_text: the text encoder is a teacher's as well, and stays as it is.
        latent_variable: its settings; None: it has none, or keeps that of the checkpoint.

    Returns:
        Arguments of ``LatentFlowPipeline``: transformer, text_encoder, tokenizer, id2label.

    Raises:
        UserError: the network is conditioned on something else than the source, knows other labels of control images,
            or cannot learn averages.
    """
    old, config = base.network, dict(base.network.config)
    if not {"text": base.takes_text, "class": base.takes_classes}.get(source.kind, True):
        by_name = base.takes_text and "--condition text (the names of the classes are the captions), "
        raise UserError(
            f"{checkpoint} is not conditioned on {source.kind}, the data is",
            f"Use {by_name or ''}--condition none, or a checkpoint of the same kind.",
        )
    changes: dict[str, Any] = {}
    if source.kind == "class":
        changes["num_classes"] = len(source.classes)
    if inpainting and not config["condition_channels"]:
        changes["condition_channels"] = mask_channels(base.vae)
    if size_conditioning:
        changes["size_conditioning"] = True
    if source.control:
        known = ControlInputs.of(config.get("control"))
        changes["control"] = known.joined(control_inputs(source, base.vae)).plain()
    own = config["latent_variable"], config["latent_variable_dim"]
    changes |= (latent_variable or LatentVariableConfig()).network(own)
    if intervals:
        if not isinstance(old, DiT):
            raise _no_intervals(f"{checkpoint}, a {type(old).__name__},")
        changes["interval_conditioning"] = True
    if latent_size not in (None, config["sample_size"]):
        changes["sample_size"] = latent_size
    network = extended(old, **changes)
    tokenizer, encoder = base.pipeline.tokenizer, base.pipeline.text_encoder
    if source.kind == "text" and base.trains_text and not fixed_text:
        tokenizer, encoder = _extended_text(tokenizer, encoder, [*chain.from_iterable(source.all_captions())])
    return _components(network, encoder, tokenizer, source.classes or base.classes)


def extended(old: Any, **changes: Any) -> Any:
    """Return a network with other settings and the weights of ``old``, which is itself returned where none differs."""
    arguments = {key: value for key, value in old.config.items() if not key.startswith("_")}
    if all(arguments.get(name) == value for name, value in changes.items()):
        return old
    network = type(old)(**(arguments | changes))
    _copy_weights(old, network)
    return network


def _components(network: nn.Module, encoder: Any, tokenizer: Any, classes: Sequence[str]) -> dict[str, Any]:
    return {
        "transformer": network,
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "id2label": dict(enumerate(classes)) or None,
    }


def _no_intervals(what: str) -> UserError:
    return UserError(
        f"{what} cannot learn average velocities: only a DiT takes the end of an interval",
        "Use --network dit, or --objective flow-matching; students of any network: --method reflow or one-step.",
    )


@torch.no_grad()
def _copy_weights(old: nn.Module, new: nn.Module) -> None:
    """Copy all weights. Class tables have rows for the old classes, then for new ones, then for the null.

    The weights of input channels that only the new one has stay as they are: zero. A table of positions of another
    size stays as it was computed.
    """
    sources = dict(old.named_parameters())
    for name, target in new.named_parameters():
        if name not in sources:  # what is new says nothing at first
            continue
        source = sources[name]
        if source.shape == target.shape:
            target.copy_(source)
        elif "embedding_table" in name:
            known, new_rows = len(source) - 1, len(target) - len(source)
            _copy_rows(source, target, [*range(known), *[None] * new_rows, known])
        elif name != "pos_embed":
            target[:, : source.shape[1]] = source


def _copy_rows(source: Tensor, target: Tensor, rows: list[int | None]) -> None:
    for index, row in enumerate(rows):
        # A class or word never seen starts as the mean of those known: nearer to sense than noise.
        target[index] = source[row] if row is not None else source.mean(0)


@torch.no_grad()
def _extended_text(
    tokenizer: Any, encoder: PreTrainedModel, captions: list[str]
) -> tuple[Any, PreTrainedModel]:
    """Return a tokenizer that knows the old words and those of ``captions``, and the encoder with rows for the new."""
    words = [word for word in tokenizer.get_vocab() if not word.startswith(("[", "##"))]
    longer = train_tokenizer([*captions, " ".join(words)], tokenizer.model_max_length)
    known = tokenizer.get_vocab()
    source = encoder.get_input_embeddings().weight.clone()
    vocabulary = sorted(longer.get_vocab().items(), key=lambda item: item[1])
    encoder.resize_token_embeddings(len(longer), mean_resizing=False)
    _copy_rows(source, encoder.get_input_embeddings().weight, [known.get(word) for word, _ in vocabulary])
    if words_to_learn := missing_words(tokenizer.backend_tokenizer, captions):
        log.info(
            "new words: the checkpoint knows %d words and learns %d more from your captions: %s",
            len(known_words(tokenizer.backend_tokenizer)),
            len(words_to_learn),
            few([f"'{word}'" for word in words_to_learn]),
        )
    return longer, encoder


def _text_dim(encoder: PreTrainedModel | None) -> int | None:
    if encoder is None:
        return None
    config = encoder.config
    return int(getattr(config, "hidden_size", None) or config.d_model)
