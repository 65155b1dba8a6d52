"""The networks that a run starts with: new ones, or those of a checkpoint fitted to other data."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..autoencoder import Autoencoder, latent_channels, mask_channels
from ..config import FlowConfig, NetworkConfig, TextConfig
from ..data import Source
from ..errors import UserError, few
from ..models import DiT, UNet, dit_config, load_text_encoder, small_text_encoder, train_tokenizer
from ..utils.files import check_types, read_settings
from .fine_tune.base import open_base, refuse_other_flow

log = logging.getLogger(__name__)

_DIT_SETTINGS = (
    "patch_size", "width", "depth", "heads", "norm", "activation", "position", "qk_norm", "registers",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks that are trained and what goes with them.

    Attributes:
        network: the velocity network.
        text_encoder, tokenizer: None without captions.
        trained_text: the text encoder is trained along.
        classes: the names of the classes, in the order of their ids.
    """

    network: Any
    text_encoder: PreTrainedModel | None = None
    tokenizer: Any = None
    trained_text: bool = False
    classes: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Return the architecture as plain values; a resumed run must have the same."""
        shapes = {name: list(weight.shape) for name, weight in self.network.named_parameters()}
        if self.text_encoder is not None and self.trained_text:
            encoder = self.text_encoder.named_parameters()
            shapes |= {f"text.{name}": list(weight.shape) for name, weight in encoder}
        return shapes


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
) -> Networks:
    """Build networks with fresh weights for the source's kind of condition, and with ``inpainting`` for masked images.

    Args:
        device: on "meta" the velocity network has shapes and no weights: enough for a plan, at no cost.
        intervals: it takes the end of an interval.

    Raises:
        UserError: a setting does not fit (see `DiT` and `UNet`), or the text encoder cannot be loaded.
    """
    tokenizer, encoder, trained = None, None, False
    if source.kind == "text" and text.text_encoder:
        tokenizer, encoder = load_text_encoder(text.text_encoder)
    elif source.kind == "text":
        tokenizer = train_tokenizer([*chain.from_iterable(source.all_captions())], text.text_length)
        encoder = small_text_encoder(tokenizer, text.text_width, text.text_depth, text.text_heads)
        trained = True
    arguments: dict[str, Any] = {
        "in_channels": latent_channels(vae),
        "num_classes": len(source.classes) if source.kind == "class" else None,
        "text_dim": _text_dim(encoder),
        "condition_channels": mask_channels(vae) if inpainting else 0,
        "sample_size": latent_size,
        "size_conditioning": size_conditioning,
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
            built = DiT(**dit_config(network.network_preset, network.block, **arguments, **chosen))
    return Networks(
        network=built, text_encoder=encoder, tokenizer=tokenizer, trained_text=trained, classes=source.classes
    )


def networks_from(
    checkpoint: str,
    source: Source,
    flow: FlowConfig,
    inpainting: bool = False,
    size_conditioning: bool = False,
    latent_size: int | None = None,
    student: bool = False,
) -> Networks:
    """Load a checkpoint's networks and fit them to other data: new classes get new rows, new words new embeddings.

    Nothing else changes: latents of another size get the positions that belong to them, which are computed.

    With ``inpainting`` a network that has not learnt it gets the channels for it, their weights zero, and likewise
    with ``size_conditioning``: its samples are exactly those from before. A network of velocities that is to learn
    averages (``flow.objective``) gets the length of the interval in the same way: at first every average is the
    velocity.

    Args:
        checkpoint: a pipeline folder.
        source: what they will be trained on, its classes those of `with_base_classes`.
        flow: how they will be trained; path and prediction must be the checkpoint's.
        latent_size: side of the latents that they will be trained on; None: the checkpoint's.
        student: the checkpoint is a teacher, and its own path does not count. Its text encoder, which both share,
            is frozen.

    Raises:
        UserError: the checkpoint cannot be opened, is conditioned on something else than the source, or was
            trained on another path or to another prediction.
    """
    model = open_base(checkpoint)
    if not student:
        refuse_other_flow(checkpoint, model, flow)
    old, config = model.network, dict(model.network.config)
    if not {"text": model.takes_text, "class": model.takes_classes}.get(source.kind, True):
        raise UserError(
            f"{checkpoint} is not conditioned on {source.kind}, the data is",
            "Use --condition none, or a checkpoint of the same kind.",
        )
    changes: dict[str, Any] = {}
    if source.kind == "class":
        changes["num_classes"] = len(source.classes)
    if inpainting and not config["condition_channels"]:
        changes["condition_channels"] = mask_channels(model.vae)
    if size_conditioning:
        changes["size_conditioning"] = True
    if flow.choices().objective.average:
        if not isinstance(old, DiT):
            raise _no_intervals(f"{checkpoint}, a {type(old).__name__},")
        changes["interval_conditioning"] = True
    if latent_size not in (None, config["sample_size"]):
        changes["sample_size"] = latent_size
    network = old
    if any(config.get(name) != value for name, value in changes.items()):
        arguments = {key: value for key, value in config.items() if not key.startswith("_")}
        network = type(old)(**(arguments | changes))
        _copy_weights(old, network)
    tokenizer, encoder = model.pipeline.tokenizer, model.pipeline.text_encoder
    trained = model.trains_text and not student
    if trained and source.kind == "text":
        tokenizer, encoder = _extended_text(tokenizer, encoder, [*chain.from_iterable(source.all_captions())])
    return Networks(
        network=network,
        text_encoder=encoder,
        tokenizer=tokenizer,
        trained_text=trained,
        classes=source.classes or model.classes,
    )


def _no_intervals(what: str) -> UserError:
    return UserError(
        f"{what} cannot learn average velocities: only a DiT takes the end of an interval",
        "Use --network dit, or --objective flow-matching; students of any network: --method reflow or one-step.",
    )


def refuse_renumbered_classes(pipeline: Path, source: Source) -> None:
    """Refuse to go on with a run whose ``pipeline`` has another id for a class that the data still have.

    Raises:
        UserError: it has. ``--allow-changes`` is no remedy: every image would be trained under another class.
    """
    file = pipeline / "model_index.json"
    if source.kind != "class" or not file.is_file():
        return
    index = read_settings(file)
    check_types(file, index, {"id2label": dict[str, str] | None})
    numbers = {
        name: int(number) for number, name in (index.get("id2label") or {}).items() if number.isdecimal()
    }
    moved = [
        f"'{name}' was {numbers[name]}, is {number}"
        for number, name in enumerate(source.classes)
        if numbers.get(name, number) != number
    ]
    if moved:
        raise UserError(
            f"the classes of {pipeline} have other numbers than those of {source.name}: {few(moved)}",
            f"Use another output folder; there, --init-from {pipeline} keeps what was learnt, class by class.",
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
    new_words = [word for word, _ in vocabulary if word not in known]
    encoder.resize_token_embeddings(len(longer), mean_resizing=False)
    _copy_rows(source, encoder.get_input_embeddings().weight, [known.get(word) for word, _ in vocabulary])
    log.info("%d new words join the %d that the checkpoint knows", len(new_words), len(known))
    return longer, encoder


def _text_dim(encoder: PreTrainedModel | None) -> int | None:
    if encoder is None:
        return None
    config = encoder.config
    return int(getattr(config, "hidden_size", None) or config.d_model)
