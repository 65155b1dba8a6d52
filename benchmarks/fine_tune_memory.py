"""Memory and time of fine-tuning pretrained models on graphics cards: counted, nothing is downloaded.

    python benchmarks/fine_tune_memory.py                      # a quarter of an hour on one core
    python benchmarks/fine_tune_memory.py flux2-klein-4b       # some of the models

Prints the two tables of docs/guide/fine-tune-pretrained.md from the configs of tests/training/configs: the flags with
which a run fits, by the planner of `latentflow train --dry-run`; and the operations of a step, which is simulated on
tensors without values, with the seconds that they take at the share of a GPU's peak that `--dry-run` assumes of our own
networks. No GPU is used.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from latentflow.config import AdapterConfig
from latentflow.families.from_configs import model_from_configs
from latentflow.training.estimate import GPUS, UTILISATION
from latentflow.training.fine_tune.memory_plan import CARDS, GIB, FineTuning, MemoryPlanner

CONFIGS = Path(__file__).resolve().parents[1] / "tests" / "training" / "configs"
MODELS = {
    "sd35-medium": "SD 3.5 medium",
    "flux2-klein-4b": "FLUX.2 klein 4B",
    "z-image": "Z-Image",
    "flux1-dev": "FLUX.1 dev",
    "qwen-image": "Qwen-Image",
}
SIDES = (512, 1024)
# flags -> their short names in the table
SHORT = {
    "--gradient-checkpointing": "checkpointing",
    "--optimizer adamw-8bit": "8-bit",
    "--quantize nf4": "nf4",
    "--resolution 768": "768 px",
    "--resolution 512": "512 px",
}


def planner(name: str, folder: Path) -> MemoryPlanner:
    """Open the configs of a model, which are written into ``folder``."""
    for file, content in json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8")).items():
        if file != "sources":
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / file).write_text(json.dumps(content), encoding="utf-8")
    return MemoryPlanner(model_from_configs(folder / name))


def default(side: int, *, full: bool = False) -> FineTuning:
    """Return what `latentflow train --init-from` does without further flags on a GPU that has bfloat16."""
    return FineTuning(
        lora_rank=0 if full else 16,
        lora_layers=AdapterConfig().lora_layers,
        gradient_checkpointing=False,
        resolution=side,
    )


def cell(planner: MemoryPlanner, settings: FineTuning, gib: int) -> str:
    """Return the flags that a run needs to fit into a card, and the GiB that it takes then."""
    found = planner.fitting(settings, gib)
    if found is None or (settings.lora_rank == 0 and "--lora-rank 16" in found[0]):
        return "no"
    return f"{' + '.join(SHORT[flag] for flag in found[0]) or 'no flag'} ({found[1].peak / GIB:.1f})"


def rows(name: str, folder: Path, sides: Iterable[int] = SIDES, *, full: bool = True) -> Iterator[str]:
    """Yield the lines of a model, the last one for all of its weights."""
    made = planner(name, folder)
    runs = [(f"{side} px", default(side)) for side in sides]
    runs += [(f"{side} px, all weights", default(side, full=True)) for side in (512,) if full]
    for what, settings in runs:
        yield f"| {MODELS[name]}, {what} | {' | '.join(cell(made, settings, gib) for gib in CARDS)} |"


def operations(name: str, folder: Path, side: int) -> float:
    """Return the floating-point operations of a step with gradient checkpointing; a multiply-add is two."""

    def attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)  # type: ignore[no-any-return]

    def backward(out: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(out, q, k, v)  # type: ignore[no-any-return]

    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    on_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    made, settings = planner(name, folder), replace(default(side), gradient_checkpointing=True)
    made.weights(settings)
    made._image(settings)  # before: only the step is counted
    with FlopCounterMode(
        display=False, custom_mapping={on_cpu: attention, on_cpu_backward: backward}
    ) as counter:
        made._activations(settings)
    return float(counter.get_total_flops())


def time_row(name: str, folder: Path) -> str:
    """Return the line of a model: for each size the operations, and the seconds on each GPU."""
    cells = []
    for side in SIDES:
        flops = operations(name, folder, side)
        seconds = [f"{flops / (UTILISATION * gpu.flops_per_second):.2g}" for gpu in GPUS]
        cells += [f"{flops / 1e12:.0f}", *seconds]
    return f"| {MODELS[name]} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="default: all")
    chosen = parser.parse_args().models or [*MODELS]
    transformers.logging.set_verbosity_error()
    print(f"| | {' | '.join(f'{gib} GB' for gib in CARDS)} |", f"|{'---|' * (1 + len(CARDS))}", sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            for line in rows(name, Path(folder)):
                print(line, flush=True)
        gpus = " | ".join(gpu.name.removeprefix("NVIDIA ") for gpu in GPUS)
        columns = " | ".join(f"{side} px, TFLOP | {gpus}" for side in SIDES)
        print(f"\n| | {columns} |", f"|{'---|' * (1 + len(SIDES) * (1 + len(GPUS)))}", sep="\n")
        for name in chosen:
            print(time_row(name, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
