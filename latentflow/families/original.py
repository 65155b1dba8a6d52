"""Weights of SiT, DiT, LightningDiT and REPA as their authors publish them, made a checkpoint of latentflow.

What differs from our ``DiT`` in how the network is written down is folded into the weights, exactly:

- a network whose time is a + b t: its time features cos and sin of w (a + b t) are a rotation of ours, of w |b| t;
- a velocity from data to noise: the last layer's sign;
- weights of norms under adaLN: w x (1 + s) = x (1 + (w s + w - 1));
- rotary positions that turn neighbouring channels: an order of the channels of queries and keys;
- a hidden width of SwiGLU that ours rounds up: units that are zero.
"""

from __future__ import annotations

import argparse
import importlib
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autoencoder import load_autoencoder
from ..errors import UserError, few, lookup, reading
from ..models import DIT_PRESETS, DiT
from ..utils.files import MEND
from ..utils.single_files import ORIGINAL_WEIGHT

#: entries of training checkpoints in which the weights may be, the averaged ones first
_ENTRIES = ("ema", "model_ema", "ema_state_dict", "model", "state_dict", "module")


@dataclass(frozen=True)
class Original:
    """Conventions of one kind of weights.

    Attributes:
        time: (a, b): its network's time is a + b t, where t = 1 is data.
        sign: of what it predicts, against ours.
        settings: of the pipeline: path and prediction, and how its code guides.
        paper: where they are from.
        autoencoder: the one that it was trained with.
    """

    time: tuple[float, float]
    sign: float
    settings: Mapping[str, Any]
    paper: str
    autoencoder: str
    extra: tuple[str, ...] = field(default=())


ORIGINALS: dict[str, Original] = {
    "sit": Original(
        (0.0, 1.0), 1.0, {"guidance_channels": 3}, "arXiv:2401.08740", "stabilityai/sd-vae-ft-ema"
    ),
    "dit": Original(
        (999.0, -1000.0),
        1.0,
        {"guidance_channels": 3, "path": "ddpm", "prediction": "noise"},
        "arXiv:2212.09748",
        "stabilityai/sd-vae-ft-ema",
    ),
    "lightningdit": Original(
        (0.0, 1.0), 1.0, {"guidance_channels": 3}, "arXiv:2501.01423", "VA-VAE f16d32, in diffusers' layout"
    ),
    # Its projectors align features with an encoder's in training only.
    "repa": Original(
        (1.0, -1.0), -1.0, {}, "arXiv:2410.06940", "stabilityai/sd-vae-ft-ema", ("projectors.",)
    ),
}


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return the weights in a .pt, .pth, .ckpt or .safetensors file, the averaged ones of a training checkpoint.

    Nothing but tensors and plain values is unpickled (``weights_only=True``).

    Raises:
        UserError: there is no such file, it cannot be read so, or it holds no weights.
    """
    if not file.is_file():
        raise UserError(f"no file '{file}'", "Give the file of weights that you have downloaded.")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        with reading(file, Exception, fix=MEND):
            content: Any = load_file(file)
    else:
        # Training scripts keep their flags beside the weights.
        with (
            reading(file, Exception, fix=MEND),
            torch.serialization.safe_globals([argparse.Namespace]),
        ):
            mapped = zipfile.is_zipfile(file)  # files of torch before 1.6 are none
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    for name in _ENTRIES:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    weights = {
        name.removeprefix("module.").removeprefix("_orig_mod."): value
        for name, value in (content.items() if isinstance(content, Mapping) else ())
        if isinstance(value, Tensor)
    }
    if not weights:
        raise UserError(f"{file} holds no weights", "Give a file of a network's weights.")
    return weights


def kind_of(weights: Mapping[str, Tensor], file_name: str) -> str:
    """Return the key of `ORIGINALS` that the weights are of.

    Raises:
        UserError: it cannot be seen: SiT's and DiT's have the same names and shapes; or the weights are of none.
    """
    if ORIGINAL_WEIGHT not in weights:
        raise UserError(
            f"{file_name} holds weights of another network",
            f"Weights of these kinds can be imported: {', '.join(ORIGINALS)}. A pretrained model of diffusers in one "
            ".safetensors file is given as --checkpoint.",
        )
    if any(name.startswith("projectors.") for name in weights):
        return "repa"
    if any("mlp.w12." in name or "feat_rope." in name or ".norm1.weight" in name for name in weights):
        return "lightningdit"
    # As words: "edit" and "transit" say nothing.
    named = set(re.findall(rf"(?<![a-z])({'|'.join(ORIGINALS)})(?![a-z])", file_name.lower()))
    if len(named) == 1:
        return str(named.pop())
    raise UserError(
        f"{file_name} may be of SiT or of DiT: their weights have the same names and shapes",
        f"Say which: --kind {' | '.join(ORIGINALS)}.",
    )


def import_pipeline(
    weights: Mapping[str, Tensor], kind: str, vae: str, class_names: Sequence[str] | None = None
) -> Any:
    """Return the ``LatentFlowPipeline`` of original weights.

    Args:
        weights, kind: as for `import_network`.
        vae: folder or hub id of the autoencoder that the network was trained with.
        class_names: one for each class; default: ImageNet's, for 1000 classes.

    Raises:
        UserError: the weights are not of such a network; the number of names is not that of its classes.
    """
    network = import_network(weights, kind)
    count = network.config["num_classes"]
    if class_names is None and count == 1000:
        from torchvision.models import ResNet18_Weights

        class_names = ResNet18_Weights.IMAGENET1K_V1.meta["categories"]
    if class_names is not None and len(class_names) != count:
        raise UserError(f"{len(class_names)} class names are given for {count} classes")
    names = None if class_names is None else dict(enumerate(class_names))
    module = importlib.import_module("latentflow.pipeline.generate")  # which lies above this package
    return module.LatentFlowPipeline(
        load_autoencoder(vae), network, id2label=names, **ORIGINALS[kind].settings
    )


def import_network(weights: Mapping[str, Tensor], kind: str) -> DiT:
    """Return a ``DiT`` that computes what the original network does.

    Args:
        weights: as the original has them; every one of them is used.
        kind: a key of `ORIGINALS`.

    Raises:
        UserError: the weights are not of such a network.
    """
    original = lookup(ORIGINALS, kind, "kind of weights")
    left = {name: value for name, value in weights.items() if not name.startswith(original.extra)}
    if damaged := [name for name, value in left.items() if not value.isfinite().all()]:
        raise UserError(f"weights are not finite: {few(damaged, 3)}", MEND)
    computed = [name for name in left if name.startswith("feat_rope.")]
    for name in computed:
        left.pop(name)
    try:
        config = _config(left, kind, turned=bool(computed))
        converted = _converted(left, config, original)
        with torch.device("meta"):
            network: DiT = DiT(**config)
        network.load_state_dict(converted, strict=True, assign=True)
    except (KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            f"these are not the weights of a {kind} network: {str(error).splitlines()[-1].strip()}",
            f"Weights of these kinds can be imported: {', '.join(ORIGINALS)}. The file has "
            f"{few(sorted(weights), 3)}.",
        ) from error
    network.requires_grad_(True).eval()
    return network


def _config(weights: Mapping[str, Tensor], kind: str, turned: bool) -> dict[str, Any]:
    """Return the arguments of ``DiT``, from the weights' shapes."""
    patch_weight = weights["x_embedder.proj.weight"]
    width, channels, patch, _ = patch_weight.shape
    out = weights["final_layer.linear.weight"].shape[0] // patch**2
    depth = 1 + max(int(found[1]) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name)))
    tokens = weights["pos_embed"].shape[1]
    config: dict[str, Any] = {
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "patch_size": patch,
        "width": width,
        "depth": depth,
        "heads": _heads(width, depth),
        "num_classes": weights["y_embedder.embedding_table.weight"].shape[0] - 1,
        "sample_size": round(tokens**0.5) * patch,
        "norm": "layer",
        "activation": "gelu",
        "position": "sincos",
        "qk_norm": False,
        "time_scale": abs(ORIGINALS[kind].time[1]),
    }
    if kind == "lightningdit":
        config["norm"] = "rms" if "blocks.0.norm1.weight" in weights else "layer"
        config["activation"] = "swiglu" if "blocks.0.mlp.w12.weight" in weights else "gelu"
        config["qk_norm"] = "blocks.0.attn.q_norm.weight" in weights
        # The rotary table is a buffer that some files leave out; with RMSNorm it is always there.
        if turned or config["norm"] == "rms":
            config |= {"position": "rope", "rope_base": 1e4}
    hidden = "blocks.0.mlp.w3.weight" if config["activation"] == "swiglu" else "blocks.0.mlp.fc2.weight"
    units = weights[hidden].shape[1] * (1.5 if config["activation"] == "swiglu" else 1.0)
    return config | {"mlp_ratio": round(units / width, 2)}


def _heads(width: int, depth: int) -> int:
    """Return the number of heads, which is not in the weights: of the papers' sizes, else 64 channels a head."""
    for preset in DIT_PRESETS.values():
        if preset["width"] == width and preset["depth"] == depth and "num_classes" in preset:
            return int(preset["heads"])
    return width // 64


def _converted(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], original: Original
) -> dict[str, Tensor]:
    """Return the weights by our names, what differs folded into them."""
    left = {name: value.to(torch.float32) for name, value in weights.items()}
    width, heads = config["width"], config["heads"]
    result: dict[str, Tensor] = {}
    time = left.pop("t_embedder.mlp.0.weight")
    result["t_embedder.mlp.0.weight"] = _rotated(time, *original.time)
    for name in ("weight", "bias"):
        result[f"final_layer.linear.{name}"] = original.sign * left.pop(f"final_layer.linear.{name}")
    if config["position"] == "rope":
        left.pop("pos_embed")  # computed
    for prefix, norms, parts in [
        ("final_layer", ("norm_final",), 2),
        *((f"blocks.{number}", ("norm1", "norm2"), 6) for number in range(config["depth"])),
    ]:
        modulation = {name: left.pop(f"{prefix}.adaLN_modulation.1.{name}") for name in ("weight", "bias")}
        if modulation["bias"].shape[0] == 4 * width:  # without shifts
            modulation = {name: _with_shifts(value, width) for name, value in modulation.items()}
        for place, norm in enumerate(norms):
            scale = left.pop(f"{prefix}.{norm}.weight", None)
            if scale is not None:
                _fold_norm(modulation, scale, slice((3 * place + 1) * width, (3 * place + 2) * width))
        result |= {f"{prefix}.adaLN_modulation.1.{name}": value for name, value in modulation.items()}
        if parts == 2:
            continue
        order = _order(width, heads, config["position"] == "rope")
        for name in ("weight", "bias"):
            qkv = left.pop(f"{prefix}.attn.qkv.{name}")
            result[f"{prefix}.attn.qkv.{name}"] = qkv[order]
        if config["qk_norm"]:
            scales = [left.pop(f"{prefix}.attn.{name}_norm.weight").repeat(heads) for name in ("q", "k")]
            result[f"{prefix}.attn.qk_scale"] = torch.cat(scales)[order[: 2 * width]]
        if config["activation"] == "swiglu":
            missing = -left[f"{prefix}.mlp.w3.weight"].shape[1] % 32
            for name, pad in (("weight", (0, 0, 0, missing)), ("bias", (0, missing))):
                halves = left.pop(f"{prefix}.mlp.w12.{name}").chunk(2)
                result[f"{prefix}.mlp.fc1.{name}"] = torch.cat([F.pad(half, pad) for half in halves])
            result[f"{prefix}.mlp.fc2.weight"] = F.pad(left.pop(f"{prefix}.mlp.w3.weight"), (0, missing))
            result[f"{prefix}.mlp.fc2.bias"] = left.pop(f"{prefix}.mlp.w3.bias")
    return result | left


def _rotated(weight: Tensor, start: float, slope: float) -> Tensor:
    """Return the first layer over [cos | sin] of w |slope| t, for one over those of w (start + slope t)."""
    half = weight.shape[1] // 2
    wide = weight.double()
    index = torch.arange(half, dtype=torch.float32)
    frequencies = torch.exp(-torch.log(torch.tensor(1e4)) / half * index).double()
    cos, sin = (frequencies * start).cos(), (frequencies * start).sin()
    sign = 1.0 if slope > 0 else -1.0
    on_cos, on_sin = wide[:, :half], wide[:, half:]
    turned = [on_cos * cos + on_sin * sin, sign * (on_sin * cos - on_cos * sin)]
    return torch.cat(turned, dim=1).to(weight.dtype)


def _with_shifts(value: Tensor, width: int) -> Tensor:
    """Return adaLN's rows with shifts of 0: (scale, gate, scale, gate) -> (shift, scale, gate, shift, ...)."""
    none = torch.zeros_like(value[:width])
    first, second = value[: 2 * width], value[2 * width :]
    return torch.cat([none, first, none, second])


def _fold_norm(modulation: dict[str, Tensor], norm: Tensor, rows: slice) -> None:
    """Put a norm's weights into the scales that follow it."""
    modulation["weight"] = modulation["weight"].clone()
    modulation["bias"] = modulation["bias"].clone()
    modulation["weight"][rows] *= norm[:, None]
    modulation["bias"][rows] = modulation["bias"][rows] * norm + norm - 1.0


def _order(width: int, heads: int, turned: bool) -> Tensor:
    """Return the rows of queries, keys and values in our order.

    Rotary positions turn pairs of neighbouring channels (2 i, 2 i + 1) there, (i, i + head_dim / 2) here.
    """
    rows = torch.arange(3 * width)
    if not turned:
        return rows
    each = rows.reshape(3, heads, width // heads // 2, 2)
    paired = each.transpose(-1, -2).reshape(3, -1)
    return torch.cat([paired[:2].flatten(), rows[2 * width :]])
