"""The base that an adapter was made for: its name, and the fingerprint of a pretrained network.

A hash of all weights takes too long for billions of them, and a quantised base has others. The one-dimensional ones
(biases, weights of norms) are some thousand numbers to a few million, are never quantised, and differ after full
fine-tuning.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Weights that are no part of the base: of adapters (peft's names) and of IP-Adapters.
_ADDED = re.compile(r"lora_|^encoder_hid_proj\.|^image_proj\.|\.processor\.")
# Wrappers of peft and of torch.compile in the names of weights.
_WRAPPERS = re.compile(r"\bbase_layer\.|^_orig_mod\.")


def fingerprint(network: nn.Module) -> dict[str, str]:
    """Return hashes of a network's one-dimensional weights, by the precision in which they can be compared.

    A number that was rounded to bfloat16 cannot be rounded to float16 as the original would be, and the reverse. So
    weights that bfloat16 holds exactly have a hash in bfloat16 alone, those that float16 holds exactly in float16
    alone, and all others in each precision. The same base, opened in another precision, has one of the hashes too.

    Returns:
        precision -> SHA-256; empty where nothing can be compared: no such weights, or weights in fewer than 16 bits or
        not in memory.
    """
    weights = {
        _WRAPPERS.sub("", name): weight.detach()
        for name, weight in network.named_parameters()
        if weight.ndim == 1 and not _ADDED.search(name)
    }
    dtypes = {weight.dtype for weight in weights.values()}
    if not weights or dtypes - {*_DTYPES.values()} or any(weight.is_meta for weight in weights.values()):
        return {}
    # diffusers keeps some layers of a network in float32 when the rest is rounded.
    lowest = min(dtypes, key=lambda dtype: dtype.itemsize)
    values = {name: weights[name].to("cpu", lowest).float() for name in sorted(weights)}
    exact = [
        name
        for name in ("bfloat16", "float16")
        if all(torch.equal(value, _rounded(value, _DTYPES[name])) for value in values.values())
    ]
    return {name: _hash(values, _DTYPES[name]) for name in exact[:1] or _DTYPES}


def is_other_base(made_for: Mapping[str, str], here: Mapping[str, str]) -> bool:
    """Compare two fingerprints in the highest precision that both have; without one, return False."""
    common = next((name for name in _DTYPES if name in made_for and name in here), None)
    return common is not None and made_for[common] != here[common]


def other_base(shown: str, base_name: str) -> UserError:
    """Return the error of an adapter that was made for another base than the one that it is loaded onto."""
    return UserError(
        f"{shown} was made for a base with other weights ({base_name or 'unnamed'})",
        "Load it onto that one. To try it on this one all the same: any_base=True, on the command line "
        "--lora-any-base.",
    )


def shared_name(checkpoint: str) -> str:
    """Return the name of a checkpoint, folder or hub id, for a file that is given away: one or two parts of its path,
    without the author's home."""
    path = Path(checkpoint)
    return path.name if path.expanduser().parent == Path.home() else "/".join(path.parts[-2:])


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).float()


def _hash(weights: Mapping[str, Tensor], dtype: torch.dtype) -> str:
    """Return the hash of names, shapes and values, without what float16 loses of numbers that bfloat16 holds: very
    small ones and very large ones."""
    digest, float16 = hashlib.sha256(), torch.finfo(torch.float16)
    for name, weight in weights.items():
        values = _rounded(weight, dtype).clamp(float16.min, float16.max)
        values[values.abs() < float16.smallest_normal] = 0.0
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
