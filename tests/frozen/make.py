"""Make the artefacts of this folder, as users' files were at commit bef264d; kept for the record.

    python tests/frozen/make.py FOLDER

FOLDER must not exist. It runs at that commit only: it reaches into modules that have other names since. What is in this
folder is never made again; a new format gets a folder beside it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "LATENTFLOW_CACHE": "cache", "TOKENIZERS_PARALLELISM": "false"}

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from latentflow.training.loop.report import Reporter
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from latentflow import LatentFlowInpaintPipeline, LatentFlowPipeline, UNet
from latentflow.cli import main

CAPTIONS = [
    ("a red circle", "a glimmering wug", "round"),
    ("a small blue square", "a wug in blue", "square"),
    ("a green circle", "a glimmering green wug", "round"),
    ("a yellow square", "a square wug", "square"),
    ("two red squares", "two wugs", "square"),
    ("a blue circle on white", "a blue wug", "round"),
    ("a square above a circle", "a wug above a wug", "square"),
    ("nothing but green", "no wug", "round"),
]
COLOURS = ["red", "blue", "green", "gold", "crimson", "navy", "gray", "lime"]

AUTOENCODER = """--autoencoder-class dc --autoencoder-widths 4 8 --encoder-layers 0 1 --decoder-layers 0 1
    --latent-channels 4 --autoencoder-batch-size 4 --autoencoder-optimizer muon --autoencoder-learning-rate 0.002"""
NETWORK = "--network-preset tiny --width 8 --depth 1 --heads 1 --patch-size 2"
TEXT = "--text-width 8 --text-depth 1 --text-heads 1"
# What a later version might choose otherwise by default is named.
LOOP = """--validation 0.25 --train-batch-size 4 --lr-warmup-steps 2 --lr-scheduler linear --mixed-precision no
    --log-steps 1 --preview-steps 0 --checkpointing-steps 100 --validation-steps 2"""
RUNS = {
    "run-text": f"""train images -o run-text --columns text words --resolution 16 --inpainting --optimizer muon
        --learning-rate 0.002 --ema-lengths 0.1 --ema-snapshot-steps 4 --max-train-steps 8
        --autoencoder-steps 2 --seed 3 {AUTOENCODER} {NETWORK} {TEXT} {LOOP}""",
    "run-lora": f"""train images -o run-lora --columns text nickname --init-from pipelines/text --prior-samples 4
        --lora-rank 2 --optimizer adamw --learning-rate 0.5 --early-stop 9 --max-train-steps 8 --seed 4
        {LOOP}""",
    "run-autoencoder": f"""autoencoder images -o run-autoencoder --resolution 16 --random-flip
        --autoencoder-steps 8 --seed 3 --equivariance 0.5 --latent-noise 0.3 {AUTOENCODER} {LOOP}""",
    "run-distil": f"""distill pipelines/text images -o run-distil --columns text words --method progressive
        --step-counts 1 2 --guidance 6 --optimizer adamw --learning-rate 0.002 --max-train-steps 8 --seed 3 {LOOP}""",
}
CLASS = f"""train images -o class --condition class --masks none --vae pipelines/text --resolution 16
    --path variance-preserving --path-options beta_max 12 --prediction data --size-conditioning
    --max-train-steps 2 --seed 3 {NETWORK} {LOOP}"""
AVERAGE = f"""train images -o average --condition class --masks none --vae pipelines/text --resolution 16
    --objective mean-flow --objective-options guidance 2 --max-train-steps 2 --seed 3 {NETWORK} {LOOP}"""
PRECOMPUTE = """precompute images -o latents --columns text words --vae pipelines/text --resolution 16 --random-flip
    --pixels"""
FROM_LATENTS = f"train latents -o run-latents --max-train-steps 1 --seed 3 {NETWORK} {TEXT} {LOOP}"


def latentflow(line: str, stopped: bool = False) -> None:
    """Run a command line in this process; with ``stopped`` SIGTERM comes while step 4 is computed."""
    print("latentflow", " ".join(line.split()), flush=True)
    sys.argv = ["latentflow", *line.split()]
    said = io.StringIO()
    stopping = stopping_at(4) if stopped else nullcontext()
    with stopping, redirect_stdout(said), redirect_stderr(said):
        try:
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
    assert status == (128 + signal.SIGTERM if stopped else 0), said.getvalue()


@contextmanager
def stopping_at(step: int) -> Iterator[None]:
    """Send SIGTERM when the step before ``step`` has been logged."""
    metrics = Reporter.metrics

    def stopping(self: Reporter, at: int, *values: Any) -> None:
        metrics(self, at, *values)
        if at == step - 1:
            signal.raise_signal(signal.SIGTERM)

    Reporter.metrics = stopping  # type: ignore[method-assign]
    try:
        yield
    finally:
        Reporter.metrics = metrics  # type: ignore[method-assign]


def make_images() -> None:
    """Eight images with captions, other captions and classes; one with a mask."""
    Path("images").mkdir()
    rows = []
    for number, ((text, nickname, label), colour) in enumerate(zip(CAPTIONS, COLOURS, strict=True)):
        image = Image.new("RGB", (18, 16), ["white", "black"][number % 2])
        draw = ImageDraw.Draw(image)
        box = (2 + number, 3, 12 + number // 2, 13 - number // 3)
        (draw.ellipse if label == "round" else draw.rectangle)(box, fill=colour)
        image.save(f"images/{number}.png")
        rows.append({"file_name": f"{number}.png", "words": text, "nickname": nickname, "label": label})
    mask = Image.new("L", (18, 16), 0)
    mask.paste(255, (4, 4, 12, 12))
    mask.save("images/3-mask.png")
    Path("images/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def awake(pipe: LatentFlowPipeline, folder: str) -> None:
    """Save a pipeline with random numbers on its weights: a fresh network's last layers say nothing."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    pipe.save_pretrained(folder)


def tidy(run: str) -> None:
    """Remove what says something about the machine, or nothing at all."""
    for file in Path(run).rglob("environment.jsonl"):
        lines = [json.loads(line) | {"machine": "Linux"} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for file in Path(run).rglob("run.lock"):
        file.unlink()


def weights(folder: Path) -> dict[str, list[str]]:
    """Return the names and shapes of the weights in every file below a folder."""
    return {
        file.relative_to(folder).as_posix(): [
            f"{name} {[*one.shape]}" for name, one in sorted(load_file(file).items())
        ]
        for file in sorted(folder.rglob("*.safetensors"))
    }


def figures(run: str, after: int = 4) -> dict[str, dict[str, float]]:
    """Return what a finished run logged after the step at which it was stopped."""
    found: dict[str, dict[str, float]] = {}
    for line in Path(run, "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["step"] > after:
            kept = {
                name: one for name, one in row.items() if name in ("loss", "lr") or name.startswith("val_")
            }
            found[str(row["step"])] = found.get(str(row["step"]), {}) | kept
    return found


def draw(pipe: Any, **asked: Any) -> dict[str, torch.Tensor]:
    """Draw two images in two steps, as latents and as bytes."""
    pipe.set_progress_bar_config(disable=True)

    def drawn(kind: str) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        images: torch.Tensor = pipe(
            **asked, num_inference_steps=2, generator=generators, output_type=kind
        ).images
        return images

    return {"latents": drawn("latent"), "images": (drawn("pt") * 255).round().to(torch.uint8)}


def make_all() -> None:
    make_images()
    expected: dict[str, Any] = {"runs": {}}

    latentflow(RUNS["run-text"], stopped=True)
    stash("run-text")
    latentflow(RUNS["run-text"])
    expected["runs"]["run-text"] = {
        "figures": figures("run-text"),
        "weights": weights(Path("run-text/pipeline")),
    }
    awake(LatentFlowPipeline.from_pretrained("run-text/pipeline"), "pipelines/text")
    shutil.copy("run-text/pipeline/README.md", "card.txt")
    unstash("run-text")
    shutil.copytree("cache", "done/cache")

    for line in (CLASS, AVERAGE):
        latentflow(line)
        name = line.split()[3]
        awake(LatentFlowPipeline.from_pretrained(f"{name}/pipeline"), f"pipelines/{name}")
        shutil.rmtree(name)
    torch.manual_seed(0)
    network = UNet(in_channels=4, channels=(8, 8), layers_per_block=1, head_dim=4, sample_size=8)
    vae = LatentFlowPipeline.from_pretrained("pipelines/text").vae
    plain = LatentFlowPipeline(
        vae=vae, transformer=network, scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0)
    )
    awake(plain.to(dtype=torch.float16), "pipelines/unet")

    latentflow(PRECOMPUTE)
    latentflow(FROM_LATENTS)
    loss = figures("run-latents", after=0)["1"]["loss"]  # of a network that says zero: it is that of the data
    expected["runs"]["run-latents"] = {"figures": {"1": {"loss": loss}}}
    shutil.rmtree("run-latents")
    for name in ("run-lora", "run-autoencoder", "run-distil"):
        latentflow(RUNS[name], stopped=True)
        stash(name)
        latentflow(RUNS[name])
        result = Path(name, "autoencoder" if name == "run-autoencoder" else "pipeline")
        expected["runs"][name] = {"figures": figures(name), "weights": weights(result)}
        if name == "run-lora":
            shutil.copytree("run-lora/adapter", "adapter")
        unstash(name)

    tensors: dict[str, torch.Tensor] = {}
    text = LatentFlowPipeline.from_pretrained("pipelines/text")
    drawn = {"text": draw(text, prompt=["a red circle", "a green square"], guidance_scale=2.0)}
    text.load_lora_weights("adapter")
    drawn["adapter"] = draw(text, prompt=["a glimmering wug", "a green square"], guidance_scale=2.0)
    holes = LatentFlowInpaintPipeline.from_pretrained("pipelines/text")
    drawn["inpaint"] = draw(
        holes, prompt=["a red circle", "a green square"], image=Image.open("images/3.png").crop((0, 0, 16, 16)),
        mask_image=Image.open("images/3-mask.png").crop((0, 0, 16, 16)), guidance_scale=2.0,
        seamless=False,
    )  # fmt: skip
    for name, asked in (
        ("class", {"class_labels": ["round", "square"]}),
        ("average", {"class_labels": [0, 1]}),
    ):
        drawn[name] = draw(LatentFlowPipeline.from_pretrained(f"pipelines/{name}"), **asked)
    drawn["unet"] = draw(LatentFlowPipeline.from_pretrained("pipelines/unet"), num_images_per_prompt=2)
    for name, parts in drawn.items():
        tensors |= {f"{name}/{kind}": one.contiguous() for kind, one in parts.items()}
    save_file(tensors, "expected.safetensors")
    lines = {**RUNS, "latents": PRECOMPUTE, "run-latents": FROM_LATENTS}
    expected["lines"] = {name: " ".join(line.split()) for name, line in lines.items()}
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.rmtree("cache")
    shutil.move("done/cache", "cache")
    shutil.rmtree("done")
    Path("cache/looks-2.sqlite").unlink()  # it knows where the images lay
    for lock in Path("cache").rglob("in-use"):
        lock.unlink()
    for name in RUNS:
        tidy(name)


def stash(name: str) -> None:
    """Keep a stopped run aside while the same line finishes it."""
    shutil.copytree(name, f"stopped/{name}")


def unstash(name: str) -> None:
    """Put the stopped run in the place of the finished one."""
    shutil.rmtree(name)
    shutil.move(f"stopped/{name}", name)
    if not any(Path("stopped").iterdir()):
        Path("stopped").rmdir()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)
    os.chdir(folder)
    torch.set_num_threads(1)
    make_all()
