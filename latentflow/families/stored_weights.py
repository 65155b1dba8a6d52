"""Memory that the weights of a module take, by how they are stored: counted from shapes, also on the meta device."""

from __future__ import annotations

from torch import nn

#: ways to store weights; those of `QUANTISED` concern the weights of linear layers, and keep the rest in bfloat16
STORED = ("float32", "bfloat16", "int8", "float8", "nf4")
QUANTISED = STORED[2:]
_BLOCK, _SECOND_BLOCK = 64, 256  # of bitsandbytes: weights to a scale, and scales to a scale of theirs


def parameter_count(module: nn.Module) -> int:
    """Return the number of parameters, each shared one once."""
    return sum(parameter.numel() for parameter in module.parameters())


def quantised_layers(module: nn.Module, stored: str) -> dict[str, nn.Linear]:
    """Return the linear layers that are quantised: all but the head of a language model.

    bitsandbytes (nf4) also leaves out the layers that their class keeps in float32 where the others are float16, such
    as the second of each feed-forward of T5.
    """
    kept = {"lm_head"}
    if stored == "nf4":
        kept |= {*(getattr(module, "_keep_in_fp32_modules", None) or ())}
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and kept.isdisjoint(name.split("."))
    }


def stored_bytes(module: nn.Module, stored: str, *, double: bool = False) -> float:
    """Return the memory of the weights of a module in bytes.

    torchao keeps a float32 scale for each row of an 8-bit weight, and for int8 a zero point. bitsandbytes keeps a
    float32 scale for each block of 64; with ``double`` quantisation (QLoRA, arXiv:2305.14314) a byte, and a float32 for
    each 256 of these.

    Args:
        module: not quantised yet, on any device.
        stored: one of `STORED`.
        double: quantise the scales of nf4 as well.
    """
    every = parameter_count(module)
    if stored not in QUANTISED:
        return every * (4 if stored == "float32" else 2)
    weights = [layer.weight for layer in quantised_layers(module, stored).values()]
    rest = 2 * (every - sum(weight.numel() for weight in weights))
    if stored != "nf4":
        row = 5 if stored == "int8" else 4
        return rest + sum(weight.numel() + row * weight.shape[0] for weight in weights)
    blocks = [-(-weight.numel() // _BLOCK) for weight in weights]
    scales = sum(count + 4 * -(-count // _SECOND_BLOCK) if double else 4 * count for count in blocks)
    return rest + scales + sum(weight.numel() for weight in weights) / 2
