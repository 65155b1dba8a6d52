"""Training steps of an adapter of a pretrained model: `latentflow train` beside diffusers' own program, in one run.

    python benchmarks/fine_tune_pretrained.py --script train_dreambooth_lora_flux2_klein.py [--rounds 3]
    python benchmarks/fine_tune_pretrained.py --script ... --size tiny --side 64 --precision float32   (no GPU)

The script is examples/dreambooth/train_dreambooth_lora_flux2_klein.py of diffusers' repository, at the tag of the
installed version; it is no part of the package. Both programs train a LoRA in the same layers of one checkpoint, of the
shape of FLUX.2 klein and with random weights, on the same images and captions, with the same rank, batch, precision and
optimiser, from cached latents and prompts. Each runs in a process of its own and is ended after its last timed step;
they take turns. Prints for each setting the median images per second and peak memory of both, and the median ratios
with their ranges. Without a GPU seconds are CPU seconds (give OMP_NUM_THREADS=1), and memory is what is resident after
a step.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OURS = ROOT / "train" / "flow.py"
WORDS = "a red green blue apple tree hat house sun of over big small user assistant"


@dataclass(frozen=True)
class Size:
    """Shape of a model.

    Attributes:
        network: arguments of diffusers' network, beside its defaults for klein.
        width: of the text encoder, of which the network sees three layers.
        channels: of the autoencoder.
    """

    network: dict[str, Any]
    width: int
    channels: tuple[int, ...]


SIZES = {
    "4b": Size({"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}, 2560, (128, 256, 512, 512)),
    "tiny": Size({"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2}, 64, (8, 8, 8, 8)),
}  # fmt: skip
#: hidden states of the text encoder that klein is given, by default of its pipeline
LAYERS = (9, 18, 27)
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


# ---------------------------------------------------------------- a checkpoint and data


def save_checkpoint(folder: Path, size: Size) -> None:
    """Save a pipeline of FLUX.2 klein with random weights in bfloat16."""
    import diffusers
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    special = ["<|endoftext|>", "<|im_end|>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    chat = "{% for message in messages %}user {{ message['content'] }} assistant {% endfor %}"
    tokenizer: Any = transformers.Qwen2TokenizerFast(
        vocab={letter: number for number, letter in enumerate(alphabet)},
        merges=[],
        model_max_length=512,
        chat_template=chat,
    )
    text = transformers.Qwen3Config(
        vocab_size=len(alphabet),
        hidden_size=size.width,
        intermediate_size=size.width,
        num_hidden_layers=max(LAYERS) + 1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
    )
    network: Any = diffusers.Flux2Transformer2DModel
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        parts: dict[str, Any] = {
            "transformer": network(
                **size.network, joint_attention_dim=len(LAYERS) * size.width, guidance_embeds=False
            ),
            "text_encoder": transformers.Qwen3ForCausalLM(text),
            "vae": diffusers.AutoencoderKLFlux2(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=size.channels,
                norm_num_groups=min(size.channels[0], 32),
            ),
        }
    torch.set_default_dtype(torch.float32)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.Flux2KleinPipeline(**parts, tokenizer=tokenizer, scheduler=scheduler, is_distilled=False)
    pipe.save_pretrained(folder)


def save_images(folder: Path, side: int, count: int = 20) -> None:
    """Save random images with captions, as both programs read them."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    words = WORDS.split()
    lines = []
    for number in range(count):
        name = f"{number}.png"
        coarse = Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        coarse.resize((side, side)).save(folder / name)
        lines.append(
            json.dumps({"file_name": name, "text": f"a {words[number % 13]} {words[number * 5 % 13]}"})
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def adapted_layers(checkpoint: Path) -> list[str]:
    """Return the names of the layers in which our program puts its adapter by default."""
    import diffusers
    import torch

    from latentflow.config import AdapterConfig
    from latentflow.training.fine_tune.adapters import chosen_layers

    kind: Any = diffusers.Flux2Transformer2DModel
    with torch.device("meta"):
        network = kind.from_config(kind.load_config(checkpoint / "transformer"))
    return [*chosen_layers(network, AdapterConfig().lora_layers)]


# ---------------------------------------------------------------- the two programs


@dataclass(frozen=True)
class Setting:
    """One comparison.

    Attributes:
        precision: bfloat16, float32 or nf4 (which computes in bfloat16).
        inpainting: ours learns to fill masks as well, through input channels of its own.
    """

    precision: str
    checkpointing: bool
    side: int
    rank: int
    batch: int
    inpainting: bool = False

    def __str__(self) -> str:
        checkpointing = "with" if self.checkpointing else "without"
        return (
            f"{self.precision}, {self.side} pixels, rank {self.rank}, batch {self.batch}, {checkpointing} "
            "gradient checkpointing"
        )

    def ours(self, work: Path, output: Path) -> list[str]:
        """Return the arguments of `latentflow train`."""
        mixed = "no" if self.precision == "float32" else "bf16"
        line = (
            f"{work / 'images'} --init-from {work / 'model'} -o {output} --resolution {self.side} --lora-rank "
            f"{self.rank} --lora-alpha {self.rank} --train-batch-size {self.batch} --learning-rate 1e-4 "
            f"--lr-warmup-steps 1 --condition-dropout 0 --mixed-precision {mixed} --validation 0 --preview-steps 0 "
            "--max-train-steps 100000 --checkpointing-steps 100000"
        )
        flags = ["--gradient-checkpointing"] * self.checkpointing + ["--inpainting"] * self.inpainting
        return [*line.split(), *flags, *(["--quantize", "nf4"] if self.precision == "nf4" else [])]

    def theirs(self, work: Path, output: Path) -> list[str]:
        """Return the arguments of diffusers' program."""
        mixed = "no" if self.precision == "float32" else "bf16"
        layers = " ".join(map(str, LAYERS))
        line = (
            f"--pretrained_model_name_or_path {work / 'model'} --dataset_name {work / 'images'} --image_column image "
            f"--caption_column text --instance_prompt unused --output_dir {output} --resolution {self.side} --rank "
            f"{self.rank} --lora_alpha {self.rank} --train_batch_size {self.batch} --learning_rate 1e-4 "
            f"--lr_warmup_steps 0 --mixed_precision {mixed} --cache_latents --skip_final_inference --optimizer adamw "
            f"--max_train_steps 100000 --checkpointing_steps 100000 --cache_dir {work / 'cache'} "
            f"--text_encoder_out_layers {layers}"
        )
        flags = ["--gradient_checkpointing"] * self.checkpointing
        if self.precision == "nf4":
            file = work / "nf4.json"
            file.write_text(json.dumps(NF4))
            flags += ["--bnb_quantization_config_path", str(file)]
        return [*line.split(), *flags, "--lora_layers", ",".join(adapted_layers(work / "model"))]


def timed(record: Path, warm_up: int, steps: int, program: Path, arguments: list[str]) -> None:
    """Run a program in this process until its optimiser has taken its last timed step, and write what it took.

    Written are ``seconds`` of each step, and the peak ``memory`` in bytes during them.
    """
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    times: list[float] = []
    memory = [0]

    # CPU seconds where there is no GPU: other programs on the machine do not change them.
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time

    def after_step(*_: object) -> None:
        times.append(clock())
        if len(times) <= warm_up:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            return
        if torch.cuda.is_available():
            memory[0] = torch.cuda.max_memory_allocated()
        else:
            import psutil

            memory[0] = max(memory[0], psutil.Process().memory_info().rss)
        if len(times) == warm_up + steps + 1:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                times[-1] = clock()
            seconds = [
                after - before for before, after in zip(times[warm_up:], times[warm_up + 1 :], strict=False)
            ]
            record.write_text(json.dumps({"seconds": seconds, "memory": memory[0]}))
            raise SystemExit(0)

    register_optimizer_step_post_hook(after_step)
    sys.argv = [str(program), *arguments]
    runpy.run_path(str(program), run_name="__main__")


def run(side: str, setting: Setting, work: Path, script: Path, warm_up: int, steps: int) -> dict[str, Any]:
    """Return what `timed` finds of a program (``ours`` or ``theirs``) in a process of its own.

    Raises:
        SystemExit: the program failed; the end of what it printed is shown.
    """
    with tempfile.TemporaryDirectory(dir=work) as folder:
        record, output = Path(folder) / "record.json", Path(folder) / "output"
        program = OURS if side == "ours" else script
        arguments = setting.ours(work, output) if side == "ours" else setting.theirs(work, output)
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "LATENTFLOW_CACHE": str(work / "cache"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        own = ["--timed", str(record), "--warm-up", str(warm_up), "--steps", str(steps)]
        ended = subprocess.run(
            [sys.executable, __file__, *own, "--script", str(program), "--", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if not record.exists():
            raise SystemExit(f"{program} failed:\n{ended.stdout[-4000:]}")
        found: dict[str, Any] = json.loads(record.read_text())
        return found


def measure(
    setting: Setting, size: str, script: Path, rounds: int, warm_up: int, steps: int, work: Path
) -> dict[str, list[float]]:
    """Return, a value a round, ``ours`` and ``theirs``: images per second, and ``memory ours`` and ``memory theirs``.

    Args:
        work: a folder for the checkpoint, the images and caches; what it holds is used again.
    """
    if not (work / "model" / "model_index.json").exists():
        save_checkpoint(work / "model", SIZES[size])
    if not (work / "images").exists():
        save_images(work / "images", setting.side)
    found: dict[str, list[float]] = {}
    for turn in range(rounds):
        for side in ("ours", "theirs") if turn % 2 else ("theirs", "ours"):
            one = run(side, setting, work, script, warm_up, steps)
            found.setdefault(side, []).append(setting.batch / statistics.median(one["seconds"]))
            found.setdefault(f"memory {side}", []).append(one["memory"] / 1e9)
    return found


def ratios(found: dict[str, list[float]], prefix: str = "") -> list[float]:
    """Return ours / theirs of every round, sorted."""
    return sorted(a / b for a, b in zip(found[f"{prefix}ours"], found[f"{prefix}theirs"], strict=True))


def lines(found: dict[str, list[float]]) -> list[str]:
    """Return rows of the table in Markdown: ours, theirs and their ratio with its range."""
    rows = []
    for what, prefix, digits in (("images/s", "", 3), ("memory, GB", "memory ", 2)):
        medians = [f"{statistics.median(found[prefix + side]):.{digits}f}" for side in ("ours", "theirs")]
        each = ratios(found, prefix)
        rows.append(
            f"| {what} | {medians[0]} | {medians[1]} | {statistics.median(each):.3f} [{each[0]:.3f}..{each[-1]:.3f}] |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--script", type=Path, required=True, help="your copy of diffusers' program")
    parser.add_argument("--size", choices=[*SIZES], default="4b")
    parser.add_argument("--side", type=int, default=512, help="of the images in pixels")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--precision", nargs="+", choices=["bfloat16", "nf4", "float32"], default=["bfloat16", "nf4"]
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each program in each setting")
    parser.add_argument("--warm-up", type=int, default=10, help="steps of a run that are not timed")
    parser.add_argument("--steps", type=int, default=40, help="steps of a run that are timed")
    parser.add_argument(
        "--work", type=Path, help="folder for checkpoint and images, used again; default: temporary"
    )
    parser.add_argument("--timed", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.timed:
        timed(args.timed, args.warm_up, args.steps, args.script, args.arguments)
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        for precision in args.precision:
            for checkpointing in (False, True):
                setting = Setting(precision, checkpointing, args.side, args.rank, args.batch)
                found = measure(
                    setting, args.size, args.script.resolve(), args.rounds, args.warm_up, args.steps, work
                )
                print(f"\n{setting}\n\n| | ours | diffusers' | ours / diffusers' |\n|---|---|---|---|")
                print("\n".join(lines(found)), flush=True)


if __name__ == "__main__":
    main()
