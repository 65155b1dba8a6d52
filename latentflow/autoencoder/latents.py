"""Autoencoders of diffusers: loaded, and converting between images, raw latents and the latents that the flow sees.

diffusers writes a checkpoint's scaling in one of two ways, both read here: ``(raw - latents_mean) * scaling_factor /
latents_std`` per channel, or ``(raw - shift_factor) * scaling_factor``. Autoencoders trained or measured by latentflow
have the first, with ``scaling_factor = 1``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, is_number
from ..flow.tensors import Generators, normal_like, require_finite
from ..utils.components import about, library_reads, load_checked, load_module, may_be_on_the_hub
from ..utils.files import CONFIG, read_settings
from ..utils.memory import inner_phase
from ..utils.names import near_path
from ..utils.placement import execution_device
from ..utils.weight_files import variants, weight_files
from .tiny import AutoencoderTinyGroupNorm, is_tiny, load_tiny

log = logging.getLogger(__name__)

# Any of diffusers' autoencoder classes; they share no base class that declares encode, decode and config.
Autoencoder: TypeAlias = Any

# Autoencoders for which the overflow warning was given.
_OVERFLOWING: WeakSet[Any] = WeakSet()
# What `_layout` has measured, and the side of the image that it encodes.
_LAYOUTS: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()
_SIDE = 64
# Its names in pipelines; the last two are those of tokenizers (LDM, aMUSEd; Kandinsky 2).
_PARTS = ("vae", "vqvae", "movq")
# Classes whose config says channels and factor.
_PLAIN = (diffusers.AutoencoderKL, diffusers.AutoencoderTiny, diffusers.AutoencoderDC, diffusers.VQModel)
#: autoencoder -> another one that decodes its latents in its place; see ``decoders``
DECODERS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

# diffusers keeps config entries that a class does not declare (AutoencoderDC: our latent statistics), and warns of
# them at every load although nothing is lost.
logging.getLogger("diffusers.configuration_utils").addFilter(
    lambda record: "latents_mean" not in record.getMessage()
)


def load_autoencoder(name_or_path: str | Path, *, subfolder: str | None = None, **kwargs: Any) -> Autoencoder:
    """Load a diffusers autoencoder (AutoencoderKL, AutoencoderTiny, AutoencoderDC, VQModel, ...), ready to use.

    Args:
        name_or_path: a folder that `save_pretrained` wrote, a pipeline folder or hub id (its ``vae`` is taken), or a
            folder of the TAESD family, with encoder.safetensors and decoder.safetensors.
        subfolder: folder of the autoencoder within; found automatically in a local pipeline folder (`vae`, `vqvae` or
            `movq`).
        kwargs: handed to the class's ``from_pretrained`` (``torch_dtype``, ``variant``, ``revision``...).

    Returns:
        The autoencoder in evaluation mode. float16 weights of a class that overflows in float16 (``force_upcast`` in
        its config) are widened to float32.

    Raises:
        UserError: nothing loadable is there, its class is not an autoencoder of diffusers, weights and config do not
            belong together, or the statistics of its latents are invalid.
    """
    local = Path(name_or_path)
    if is_tiny(local):
        return load_tiny(local, kwargs.get("torch_dtype", kwargs.get("dtype", torch.float32)))
    if subfolder is None:
        subfolder = next((name for name in _PARTS if (local / name / CONFIG).is_file()), None)
    folder = local / (subfolder or "")
    shown = f"the autoencoder in '{name_or_path}'"
    fix = "Give a folder written by save_pretrained (config.json and *.safetensors) or a reachable hub id."
    kwargs.setdefault("use_safetensors", True)
    if local.is_file():
        raise UserError(f"'{name_or_path}' is a file, and an autoencoder is a folder", fix)
    if not local.is_dir() and not may_be_on_the_hub(str(name_or_path)):
        raise UserError(
            f"no autoencoder at '{name_or_path}': there is no such folder", f"{near_path(str(local))}{fix}"
        )
    if local.is_dir():
        if not (folder / CONFIG).is_file() and (local / "model_index.json").is_file():
            raise UserError(f"'{name_or_path}' is a pipeline without an autoencoder", fix)
        if not (folder / CONFIG).is_file():
            raise UserError(f"no autoencoder at '{folder}': there is no {CONFIG}", fix)
        kind = _class_of(folder, read_settings(folder / CONFIG))
        if kwargs.get("variant") is None and weight_files(folder, None) is None:
            there = variants(folder)
            kwargs["variant"] = there[0] if len(there) == 1 else None  # its only weights, such as fp16
        vae: Autoencoder = load_module(kind, folder, shown, fix=fix, **kwargs)
    else:
        kind = _class_of(name_or_path, _config_of_hub(name_or_path, subfolder, kwargs))
        vae = load_checked(kind, str(name_or_path), shown, fix=fix, subfolder=subfolder, **kwargs)
    with about(shown):
        check_statistics(vae)
    if not isinstance(vae, _PLAIN) or vae.config.get("in_channels", 3) != 3:
        _check_takes_images(vae, shown)
    if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
        vae = vae.float()
    return vae


@torch.no_grad()
def _check_takes_images(vae: Autoencoder, shown: str) -> None:
    """Refuse an autoencoder of videos, sound or other channels than RGB: try it.

    Raises:
        UserError: names its class.
    """
    try:
        side = downscale_factor(vae) * 2
        images = decode(vae, torch.zeros(1, latent_channels(vae), 2, 2))
        fits = images.shape == (1, 3, side, side) or _normalises_itself(vae)
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):
        fits = False
    if not fits:
        raise UserError(
            f"{shown}, of class {type(vae).__name__}, does not take RGB images",
            "Expected AutoencoderKL, AutoencoderTiny, AutoencoderDC, VQModel or another class for images.",
        )


def _config_of_hub(name_or_path: str | Path, subfolder: str | None, kwargs: dict[str, Any]) -> Any:
    keys = ("revision", "cache_dir", "token", "local_files_only")
    handed_on = {key: kwargs[key] for key in keys if key in kwargs}
    fix = (
        "Give a local folder that holds config.json, or, when online, a hub id such as 'stabilityai/sd-vae-ft-mse' "
        "(download it once and pass the folder if this machine is offline)."
    )
    with library_reads(f"the autoencoder '{name_or_path}'", fix=fix):
        return diffusers.AutoencoderKL.load_config(name_or_path, subfolder=subfolder, **handed_on)


def _class_of(shown: object, config: Any) -> Any:
    name = config.get("_class_name") if isinstance(config, dict) else None
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if name == AutoencoderTinyGroupNorm.__name__:
        cls = AutoencoderTinyGroupNorm
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin) and hasattr(cls, "encode")):
        raise UserError(
            f"'{shown}' holds a {name}, which is not an autoencoder of diffusers",
            "Expected AutoencoderKL, AutoencoderTiny, AutoencoderDC, VQModel or another class with encode and decode.",
        )
    return cls


def latent_channels(vae: Autoencoder) -> int:
    """Number of channels C of the latents."""
    return _layout(vae)[0]


def downscale_factor(vae: Autoencoder) -> int:
    """Pixels per latent cell along one side."""
    return _layout(vae)[1]


def _layout(vae: Autoencoder) -> tuple[int, int]:
    """Return the channels of the latents, and their pixels per cell along a side.

    They are in the config where its names say them, and otherwise measured, once, by encoding an image of zeros.
    """
    config, cells = vae.config, _cells(vae)
    channels = _raw_channels(vae)
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    if channels and blocks and isinstance(vae, (*_PLAIN, diffusers.AutoencoderKLFlux2)):
        return int(channels) * cells**2, int(2 ** (len(blocks) - 1)) * cells
    if vae not in _LAYOUTS:
        side = config.get("image_size") or _SIDE
        with torch.no_grad():
            latents = normalise(vae, posterior(vae, torch.zeros(1, 3, side, side))[0])
        _LAYOUTS[vae] = latents.shape[1], side // latents.shape[2]
    return _LAYOUTS[vae]


def _raw_channels(vae: Autoencoder) -> int | None:
    """Return the channels of raw latents by the config's names, if it says them."""
    names = (
        "vq_embed_dim",
        "latent_channels",
        "z_dim",
    )  # the first: of a VQModel's codes, where they are not equal
    return next((vae.config[name] for name in names if vae.config.get(name)), None)


def has_statistics(vae: Autoencoder) -> bool:
    """Return True if the checkpoint carries per-channel latent statistics."""
    return (
        _normalises_itself(vae)
        or _cells(vae) > 1
        or (vae.config.get("latents_mean") is not None and vae.config.get("latents_std") is not None)
    )


def check_statistics(vae: Autoencoder) -> None:
    """Refuse an autoencoder whose config cannot scale its latents.

    Raises:
        UserError: a statistic is not finite, a deviation or the scaling factor is not above 0, their number is not that
            of the channels, or there are means without deviations or deviations without means.
    """
    config, channels = vae.config, _raw_channels(vae)
    if _normalises_itself(vae):
        return
    there = [name for name in ("latents_mean", "latents_std") if config.get(name) is not None]
    if len(there) == 1:
        lacks = "latents_std" if there == ["latents_mean"] else "latents_mean"
        raise UserError(f"the autoencoder's config has {there[0]} but no {lacks}", "Restore its config.json.")
    for name in ("latents_mean", "latents_std", "scaling_factor", "shift_factor"):
        value = config.get(name)
        if value is None:
            continue
        many, positive = name.startswith("latents"), name in ("latents_std", "scaling_factor")
        values = [*value] if many and isinstance(value, list | tuple) else [value]
        if many and len(values) != channels:
            raise UserError(
                f"the autoencoder's {name} has {len(values)} numbers for {channels} channels of its latents",
                "Restore its config.json.",
            )
        if any(not is_number(value) or (positive and value <= 0) for value in values):
            raise UserError(
                f"the autoencoder's {name} is {str(value)[:60]}",
                f"Expected: finite numbers{' above 0' if positive else ''}. Restore its config.json.",
            )


def encoded(vae: Autoencoder, images: Tensor) -> tuple[Tensor, ...]:
    """Return what the autoencoder's own ``encode`` makes of images: mean and standard deviation, or latents alone."""
    result = vae.encode(images)
    if hasattr(result, "latent_dist"):
        return result.latent_dist.mean, result.latent_dist.std
    return (result.latents if hasattr(result, "latents") else result.latent,)


def posterior(vae: Autoencoder, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Encode images into raw latents.

    Args:
        images: (B, 3, H, W) in [-1, 1].

    Returns:
        Mean and standard deviation, each (B, C, h, w) float32; the deviation is None for a deterministic autoencoder.

    Raises:
        UserError: the images are not finite, or their latents are not, even in float32.
    """

    video = of_videos(vae)

    def moments(rows: Tensor) -> tuple[Tensor, ...]:
        inputs = placed(vae, rows / 2.0 + 0.5 if _normalises_itself(vae) else rows)
        found = encoded(vae, inputs.unsqueeze(2) if video else inputs)
        return tuple(part.squeeze(2).float() if video else part.float() for part in found)

    require_finite(images, "an image to encode", "Check where it comes from.")
    mean, *std = finite(vae, moments, images, "latent")
    return mean, std[0] if std else None


def normalise(vae: Autoencoder, raw: Tensor) -> Tensor:
    """Turn raw latents (B, C, h, w) into latents, by the checkpoint's own statistics.

    FLUX.2's are also joined, 2 x 2 cells into one of four times the channels: (B, 4 C, h / 2, w / 2).
    """
    raw = F.pixel_unshuffle(raw, _cells(vae))
    shift, scale = _shift_and_scale(vae, raw)
    return (raw - shift) * scale


def normalised_posterior(vae: Autoencoder, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Encode images (B, 3, H, W) in [-1, 1] into mean and standard deviation of latents, see `posterior`, normalised by
    the checkpoint's own statistics."""
    mean, std = posterior(vae, images)
    if std is not None:  # normalising is affine: its slope is what scales a deviation
        std = normalise(vae, std) - normalise(vae, torch.zeros_like(std))
    return normalise(vae, mean), std


def denormalise(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Turn latents (B, C, h, w) into raw latents: the inverse of `normalise`."""
    shift, scale = _shift_and_scale(vae, latents)
    return F.pixel_shuffle(latents / scale + shift, _cells(vae))


def encode(vae: Autoencoder, images: Tensor, *, generator: Generators = None) -> Tensor:
    """Encode images (B, 3, H, W) in [-1, 1] into latents (B, C, h, w) float32.

    Without a generator the posterior's mean is taken; with one (or one for each image) a sample is drawn from it.
    """
    mean, std = posterior(vae, images)
    if generator is not None and std is not None:
        mean = mean + std * normal_like(mean, generator)
    return normalise(vae, mean)


def decode(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Decode latents (B, C, h, w) into images (B, 3, H, W) float32, nominally in [-1, 1] (not clipped).

    Raises:
        UserError: the latents are not finite, or the images are not, in float32 either.
    """
    require_finite(
        latents, "a latent to decode", "It comes from sampling: look at the network and its guidance."
    )
    if vae in DECODERS:
        latents = F.pixel_shuffle(latents.float(), fitting_cells(vae, DECODERS[vae]) or 1)
        vae = DECODERS[vae]

    def images(rows: Tensor) -> tuple[Tensor, ...]:
        inputs, video = placed(vae, rows), of_videos(vae)
        decoded = vae.decode(inputs.unsqueeze(2) if video else inputs, return_dict=False)[0].float()
        if _normalises_itself(vae):
            decoded = 2.0 * decoded - 1.0
        return (decoded.squeeze(2) if video else decoded,)

    with inner_phase("decode"):
        return finite(vae, images, denormalise(vae, latents.float()), "image")[0]


def finite(
    vae: Autoencoder, function: Callable[[Tensor], tuple[Tensor, ...]], values: Tensor, what: str
) -> tuple[Tensor, ...]:
    """Return ``function(values)``, with the rows that are not finite computed again in float32.

    Each row for itself, so that an overflow beside an image does not change it.

    Raises:
        UserError: a row is not finite in float32 either; a weight that is not finite is named.
    """
    results = function(values)
    bad = _bad_rows(results)
    if not len(bad):
        return results
    total, dtype = len(values), str(vae.dtype).removeprefix("torch.")
    with in_float32(vae):
        again = function(values[bad])
    if left := len(_bad_rows(again)):
        weight = next(
            (name for name, value in vae.state_dict().items() if not torch.isfinite(value).all()), None
        )
        raise UserError(
            f"{left} of {total} {what}s of the autoencoder {'is' if left == 1 else 'are'} not finite, in float32 too"
            + (f": its weight {weight} is not" if weight else ""),
            "Its weights are damaged: copy or download the checkpoint again, or take another autoencoder.",
        )
    if vae not in _OVERFLOWING:
        _OVERFLOWING.add(vae)
        log.warning(
            "the autoencoder overflows in %s: %d of %d %ss are made again in float32. To save that time, load it in "
            "float32 (pipe.vae.to(torch.float32)) or bfloat16",
            *(dtype, len(bad), total, what),
        )
    rows = bad.to(values.device)
    return tuple(
        result.index_copy(0, rows.to(result.device), new) for result, new in zip(results, again, strict=True)
    )


def _bad_rows(results: tuple[Tensor, ...]) -> Tensor:
    """Return the numbers of the rows that are not finite; on the meta device, which has no values, none."""
    if results[0].is_meta:
        return torch.empty(0, dtype=torch.long)
    fine = torch.stack([torch.isfinite(result).flatten(1).all(1) for result in results]).all(0)
    return (~fine).nonzero()[:, 0]


@contextmanager
def in_float32(vae: Autoencoder) -> Iterator[None]:
    """Let the autoencoder compute in float32 within the context, whatever its weights are kept in."""
    own = vae.dtype
    # diffusers' own `to` warns of modules to be kept in float32, also where there are none. Weights that accelerate
    # keeps on "meta" come back as wide as they are marked here.
    torch.nn.Module.to(vae, torch.float32)
    try:
        with torch.autocast(execution_device(vae).type, enabled=False):
            yield
    finally:
        torch.nn.Module.to(vae, own)


@torch.no_grad()
def measure_statistics(vae: Autoencoder, batches: Iterable[Tensor]) -> None:
    """Measure the per-channel mean and standard deviation of raw latents and store them in the autoencoder's config.

    Args:
        batches: image batches (B, 3, H, W) in [-1, 1]; a few hundred images suffice.

    Raises:
        ValueError: no image was given, or the latents are not finite.
    """
    count = 0
    total, squares = torch.zeros(2, latent_channels(vae), dtype=torch.float64)
    for images in batches:
        mean, std = posterior(vae, images)
        mean = mean.double().cpu()
        second = mean.square() if std is None else mean.square() + std.double().cpu().square()
        count += mean[:, 0].numel()
        total += mean.sum((0, 2, 3))
        squares += second.sum((0, 2, 3))
    if not count or not torch.isfinite(squares).all():
        raise ValueError(
            "latent statistics need at least one image and finite latents; check the autoencoder's output"
        )
    centre = total / count
    deviation = (squares / count - centre.square()).clamp_min(1e-12).sqrt()
    vae.register_to_config(
        latents_mean=centre.tolist(), latents_std=deviation.tolist(), scaling_factor=1.0, shift_factor=None
    )


def _shift_and_scale(vae: Autoencoder, like: Tensor) -> tuple[Tensor, Tensor]:
    config = vae.config
    factor = float(config.get("scaling_factor") or 1.0)
    if _normalises_itself(vae):
        return like.new_zeros(()), like.new_ones(())
    if _cells(vae) > 1:  # statistics in a batch norm, which FLUX.2 alone has
        deviation = (vae.bn.running_var + config["batch_norm_eps"]).sqrt()
        return vae.bn.running_mean.view(1, -1, 1, 1).to(like), deviation.reciprocal().view(1, -1, 1, 1).to(
            like
        )
    if has_statistics(vae):
        shift, scale = torch.tensor(config["latents_mean"]), factor / torch.tensor(config["latents_std"])
    else:
        shift, scale = torch.tensor([float(config.get("shift_factor") or 0.0)]), torch.tensor([factor])
    return shift.view(1, -1, 1, 1).to(like), scale.view(1, -1, 1, 1).to(like)


def _cells(vae: Autoencoder) -> int:
    """Return how many raw cells along a side make one cell of the latents: 2 for FLUX.2's autoencoder, else 1."""
    return 2 if hasattr(vae, "bn") else 1


def fitting_cells(vae: Autoencoder, decoder: Autoencoder) -> int | None:
    """Return how many cells of ``decoder`` along a side make one of the latents of ``vae``; None: they do not fit."""
    channels, factor = _layout(vae)
    for cells in {1, _cells(vae)}:
        if _layout(decoder) == (channels // cells**2, factor // cells):
            return cells
    return None


def _normalises_itself(vae: Autoencoder) -> bool:
    """Return True for a representation autoencoder (arXiv:2510.11690), which normalises in `encode` and takes images in
    [0, 1]."""
    return isinstance(vae, diffusers.AutoencoderRAE)


def of_videos(vae: Autoencoder) -> bool:
    """Return True for an autoencoder of videos, for which an image is a video of one frame."""
    return "z_dim" in vae.config  # Qwen-Image's and Wan's, whose classes have no other name in common


def placed(vae: Autoencoder, value: Tensor) -> Tensor:
    """Move a tensor to the device on which the autoencoder computes, in its precision."""
    return value.to(execution_device(vae), vae.dtype)
