"""The figures of `gpu.py` as tables in Markdown."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any


def table(found: dict[str, Any]) -> str:
    """Return what was found as tables in Markdown."""
    machine = found["machine"]
    lines = [
        f"{machine['device']}, torch {machine['torch']}, {machine['date']}; matrix products of {machine['dtype']}: "
        f"{machine.get('matrix_flops_per_second', 0) / 1e12:.1f} TFLOP/s.",
        "",
        "| training, images a second | `fit` | bare loop, our network | bare loop, diffusers' network | `fit` / bare "
        "| `fit` / diffusers' | share of matrix products | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, part in found.items():
        speeds = part.get("images_per_second")
        if name.startswith("train-") and speeds:
            others = [speeds.get(f"bare loop, {whose} network") for whose in ("our", "diffusers'")]
            cells = [
                *(spread(values) if values else "failed" for values in (speeds["fit"], *others)),
                *(ratio(speeds["fit"], values) if values else "-" for values in others),
                f"{part['share_of_matrix_rate']['fit']:.1%}",
                peak(part),
            ]
            lines.append(f"| DiT-{name[6:]}/2, batch {part['batch']} | " + " | ".join(cells) + " |")
    if speeds := found.get("sample", {}).get("images_per_second"):
        part = found["sample"]
        lines += [
            "",
            "| sampling, images a second | pipeline | bare Euler loop | pipeline / bare |",
            "|---|---|---|---|",
        ]
        for count, values in speeds.items():
            row = [*map(spread, values.values()), ratio(*values.values())]
            lines.append(
                f"| {part['network']}, {part['evaluations']} guided evaluations, {count} at once | {' | '.join(row)} |"
            )
    if "validation_loss" in found.get("learn", {}):
        part = found["learn"]
        losses = ", ".join(f"{loss:.4f} (step {step})" for step, loss in part["validation_loss"])
        right = ", ".join(f"{share:.1%} ({name})" for name, share in part.get("right", {}).items())
        lines += ["", f"Learning on {Path(part['data']).name}: {part['steps']} steps of {part['batch']}, "
                  f"{part['images_per_second']:.0f} images a second, validation loss {losses}; "
                  f"right: {right}; peak memory {peak(part)}."]  # fmt: skip
    if "passed" in found.get("tests", {}):
        part = found["tests"]
        stopped = f" (stopped after {part['stopped_after_seconds']:.0f} s)" * (
            "stopped_after_seconds" in part
        )
        lines += ["", f"Tests for GPUs: {part['passed']} passed, {part['skipped']} were skipped, {len(part['failed'])} "
                  f"failed{stopped}. {' '.join(part['failed'])}".rstrip()]  # fmt: skip
    for name, part in found.items():
        lines += ["", f"{name} failed: {part['error']}"] if "error" in part else []
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """Return the median and the range."""
    return f"{statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def ratio(ours: list[float], others: list[float]) -> str:
    """Return the median of the turns' ratios, and their range."""
    values = [own / other for own, other in zip(ours, others, strict=False)]
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def peak(part: dict[str, Any]) -> str:
    """Return the peak memory of a section, that of all three loops together in training."""
    return f"{part['peak_gib']} GiB" if "peak_gib" in part else "-"
