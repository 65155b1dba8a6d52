"""One GPU in under eight minutes: the speed of training and sampling, learning, memory, and the tests for GPUs.

    python benchmarks/gpu.py -o gpu [--data EMOJI] [--skip tests] [--tiny --device cpu]

Writes gpu.json and gpu.md, again after each section, so that a run that is stopped keeps what it has measured. Each
section has seconds of its own, and ends when they are over; one that fails is reported, and the others go on.

train-B, train-XL: DiT-B/2 and DiT-XL/2 on cached latents of 4 x 32 x 32 with 1000 classes, in bfloat16, by
`latentflow.training.fit` with its defaults, beside two bare loops (no clipping, no average, no checks, no reports):
over our network, and over diffusers' `DiTTransformer2DModel` of the same width, depth and heads. All three are compiled
block by block on a GPU. They take turns, so that all see the same machine; torch counts the operations of a sample, and
their rate is given as a share of what large matrix products reach in the same minutes.

sample: our pipeline beside a bare loop of Euler's method over the same network, both guided.

learn: `latentflow train` on DATA (a folder of emoji with captions; without --data the procedural `shapes`) for three
minutes, and `latentflow evaluate`: the validation loss, and how many images are right.

tests: those marked `gpu`, in a process of their own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from gpu_table import table
from torch import Tensor, nn

from latentflow import LatentFlowPipeline
from latentflow.autoencoder import build_autoencoder
from latentflow.config import AutoencoderConfig, FlowConfig, FramingConfig, LoopConfig
from latentflow.data import LatentTable, crop, find_source
from latentflow.models import Condition, DiT, dit_config
from latentflow.training import fit
from latentflow.training.estimate import network_cost
from latentflow.training.loop.compiling import compiles
from latentflow.training.loop.distributed import matrix_product_rate
from latentflow.training.losses.flow import FlowLoss
from latentflow.training.losses.latent_data import BucketData, LatentData

ROOT = Path(__file__).resolve().parents[1]
CLASSES, CHANNELS = 1000, 4
GUIDANCE = 4.0
# Seconds of each section, with its compilation; together less than 480.
BUDGET = {"machine": 10.0, "train-B": 60.0, "train-XL": 85.0, "sample": 40.0, "learn": 215.0, "tests": 60.0}


@dataclass(frozen=True)
class Scale:
    """Sizes of everything that is measured.

    Attributes:
        networks: preset -> changes of its shape.
        batch: preset -> samples of a step.
        turn: steps of a turn.
        turns: at most, of each.
        evaluations: of the network for an image.
        drawn: images that are drawn at once.
        learn: flags of the training that checks learning; its seconds; images that are evaluated.
    """

    side: int = 32
    networks: tuple[tuple[str, dict[str, Any]], ...] = (("B", {}), ("XL", {}))
    batch: tuple[int, ...] = (256, 128)
    turn: int = 10
    turns: int = 10
    evaluations: int = 50
    drawn: tuple[int, ...] = (1, 32)
    learn: tuple[str, ...] = ("--train-batch-size", "256", "--network-preset", "small")
    learn_seconds: float = 180.0
    evaluated: int = 200


SMALL = {"width": 32, "depth": 1, "heads": 2, "sample_size": 8}
TINY = Scale(
    side=8, networks=(("B", SMALL), ("XL", SMALL)), batch=(4, 4), turn=1, turns=2, evaluations=2, drawn=(1, 2),
    learn=("--train-batch-size", "4", "--network-preset", "tiny", "--width", "16", "--depth", "1", "--heads", "1",
           "--text-width", "16", "--text-depth", "1", "--text-heads", "1", "--resolution", "16"),
    learn_seconds=1.0, evaluated=4,
)  # fmt: skip


class Finished(Exception):  # noqa: N818
    """Enough turns were taken."""


@dataclass
class Bench:
    """A run of this benchmark: the device, the sizes, and what was found so far."""

    device: torch.device
    scale: Scale
    data: str | None
    output: Path
    found: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the networks."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def wait(self) -> float:
        """Return the time when the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def rate(self, seconds: float) -> float:
        """Return the operations per second of large matrix products, the best in so many seconds."""
        return matrix_product_rate(self.device, self.dtype, seconds)

    @contextmanager
    def section(self, name: str) -> Iterator[dict[str, Any]]:
        """Measure a section into the dict that is yielded; afterwards what was found is written.

        A failure is a figure as well: it is written, and the other sections go on.
        """
        print(f"{name} ...", flush=True)
        found: dict[str, Any] = {}
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        try:
            yield found
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {error}"[:500]
            print(f"{name} failed: {found['error']}", flush=True)
        found["seconds"] = round(time.perf_counter() - begun, 1)
        if self.device.type == "cuda":
            found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            torch.cuda.empty_cache()
        self.found[name] = found
        self.output.with_suffix(".json").write_text(json.dumps(self.found, indent=2) + "\n")
        self.output.with_suffix(".md").write_text(table(self.found))


# ---------------------------------------------------------------- training


class Bare:
    """A bare training loop: noise, a straight path, autocast, fused AdamW.

    Args:
        call: (network, x, t, labels) -> its prediction.
    """

    def __init__(
        self, bench: Bench, network: nn.Module, call: Callable[..., Tensor], latents: Tensor
    ) -> None:
        self.bench, self.network, self.call = bench, network.to(bench.device), call
        self.latents = latents.to(bench.device)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def turn(self, steps: int, batch: int) -> float:
        """Return the seconds of so many steps."""
        device, begun = self.bench.device, self.bench.wait()
        for _ in range(steps):
            x1 = self.latents[torch.randint(len(self.latents), (batch,), device=device)]
            labels = torch.randint(CLASSES, (batch,), device=device)
            x0, t = torch.randn_like(x1), torch.sigmoid(torch.randn(batch, device=device))
            xt = torch.lerp(x0, x1, t.view(-1, 1, 1, 1))
            with torch.autocast(device.type, self.bench.dtype, enabled=self.bench.dtype != torch.float32):
                output = self.call(self.network, xt, t, labels)
            (output[:, :CHANNELS].float() - (x1 - x0)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return self.bench.wait() - begun


class TakingTurns(LatentData):
    """The data of `fit`, which lets the bare loops have their turns when it is asked for a batch.

    Args:
        bare: name -> loop.
        until: the time when no more turns are taken.
    """

    def __init__(
        self, bench: Bench, latents: Tensor, bare: dict[str, Bare], batch: int, until: float
    ) -> None:
        source = find_source("shapes", condition="class")
        rows = (torch.arange(len(latents)) % len(source)).tolist()
        labels = {"class_labels": torch.arange(len(latents)) % CLASSES}
        bucket = BucketData(LatentTable(latents[:, None], None))
        super().__init__(crop(source.subset(rows), 64, 8, FramingConfig()), [bucket], labels, flips=False)
        self.bench, self.bare, self.rows, self.until = bench, bare, batch, until
        self.asked, self.begun = 0, 0.0
        self.seconds: dict[str, list[float]] = {name: [] for name in ("fit", *bare)}

    def __getitems__(self, uses: list[Any]) -> dict[str, Any]:
        turn, names = self.bench.scale.turn, list(self.bare)
        if self.asked % turn == 0:
            now = self.bench.wait()
            if self.asked > turn:  # the first turn of each warms up, and compiles
                self.seconds["fit"].append(now - self.begun)
            done = len(self.seconds["fit"])
            if done and (done >= self.bench.scale.turns or now > self.until):
                raise Finished
            for name in names if done % 2 else reversed(names):
                try:
                    taken = self.bare[name].turn(turn, self.rows)
                except Exception as error:  # as of a compiler: the others go on
                    print(f"{name} failed: {type(error).__name__}: {error}"[:500], flush=True)
                    del self.bare[name], self.seconds[name]
                    continue
                if self.asked:
                    self.seconds[name].append(taken)
            self.begun = self.bench.wait()
        self.asked += 1
        return super().__getitems__(uses)


def our_network(preset: str, changes: dict[str, Any]) -> DiT:
    """Return a network with the same weights each time."""
    torch.manual_seed(0)
    return DiT(**dit_config(preset, num_classes=CLASSES, **changes))


def diffusers_network(ours: DiT, side: int) -> DiTTransformer2DModel:
    """Return diffusers' network of the same shape."""
    config = ours.config
    return DiTTransformer2DModel(
        num_attention_heads=config.heads, attention_head_dim=config.width // config.heads, in_channels=CHANNELS,
        out_channels=2 * CHANNELS, num_layers=config.depth, sample_size=side, patch_size=config.patch_size,
        num_embeds_ada_norm=CLASSES,
    )  # fmt: skip


def compile_blocks(bench: Bench, blocks: nn.ModuleList) -> None:
    """Compile the blocks of a network as `latentflow train` does by default: on a GPU, if it has a compiler."""
    for block in blocks if compiles(LoopConfig(), bench.device) else ():
        block.compile()


def train(bench: Bench, preset: str, changes: dict[str, Any], batch: int, until: float, found: dict) -> None:
    """Measure the three loops in turns."""
    side = bench.scale.side
    latents = torch.randn(2048 if side == 32 else 16, CHANNELS, side, side)
    ours, network = our_network(preset, changes), our_network(preset, changes)
    theirs = diffusers_network(ours, side)
    for blocks in (ours.blocks, network.blocks, theirs.transformer_blocks):
        compile_blocks(bench, blocks)
    bare = {
        "bare loop, our network": Bare(
            bench, ours, lambda net, x, t, labels: net(x, t, Condition(class_labels=labels)), latents
        ),
        "bare loop, diffusers' network": Bare(
            bench, theirs, lambda net, x, t, labels: net(x, timestep=1000 * t, class_labels=labels).sample, latents
        ),
    }  # fmt: skip
    data = TakingTurns(bench, latents, bare, batch, until)
    config = LoopConfig(
        max_train_steps=10**6, train_batch_size=batch, learning_rate=1e-4, validation_steps=0, preview_steps=0,
        checkpointing_steps=10**6, mixed_precision="no" if bench.dtype == torch.float32 else "bf16",
    )  # fmt: skip
    try:
        with tempfile.TemporaryDirectory() as folder:
            fit({"flow": FlowLoss(network, FlowConfig(), seed=0)}, data, config, Path(folder))
    except Finished:
        pass
    flops = network_cost(network, side, 0).flops
    rate = bench.rate(1.0 if bench.device.type == "cuda" else 0.0)
    found |= {"parameters": sum(weight.numel() for weight in network.parameters()), "batch": batch}
    found |= {"flops_per_sample": flops, "matrix_flops_per_second": rate, "steps_per_turn": bench.scale.turn}
    found["images_per_second"] = {
        name: [bench.scale.turn * batch / seconds for seconds in values]
        for name, values in data.seconds.items()
    }
    found["share_of_matrix_rate"] = {
        name: statistics.median(values) * flops / rate
        for name, values in found["images_per_second"].items()
        if "diffusers" not in name  # whose operations are a few others
    }


# ---------------------------------------------------------------- sampling


def sample(bench: Bench, until: float, found: dict[str, Any]) -> None:
    """Measure our pipeline beside a bare Euler loop over its network, for each number of images, in turns."""
    scale, device = bench.scale, bench.device
    preset, changes = scale.networks[-1]
    network = our_network(preset, changes).to(device, bench.dtype).eval()
    compile_blocks(bench, network.blocks)
    vae = build_autoencoder(AutoencoderConfig(latent_channels=CHANNELS, autoencoder_widths=(8, 8, 8, 8)), 64)
    vae.register_to_config(latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS)
    names = {number: str(number) for number in range(CLASSES)}
    pipe = LatentFlowPipeline(vae=vae, transformer=network, id2label=names).to(device)  # decodes nothing here
    pipe.set_progress_bar_config(disable=True)
    size = scale.side * pipe.vae_scale_factor
    found["images_per_second"] = {}
    for count in scale.drawn:
        labels = [*range(count)]

        def ours(count: int = count, labels: list[int] = labels) -> None:
            pipe(
                class_labels=labels, num_inference_steps=scale.evaluations, guidance_scale=GUIDANCE, solver="euler",
                height=size, width=size, output_type="latent",
                generator=[torch.Generator().manual_seed(number) for number in labels],
            )  # fmt: skip

        @torch.inference_mode()
        def bare(count: int = count, labels: list[int] = labels) -> None:
            x = torch.randn(count, CHANNELS, scale.side, scale.side, device=device, dtype=bench.dtype)
            drop = torch.arange(2 * count, device=device) >= count
            condition = Condition(class_labels=torch.tensor(labels * 2, device=device), drop=drop)
            for step in range(scale.evaluations):
                right, null = network(torch.cat([x, x]), step / scale.evaluations, condition).chunk(2)
                x = x + (null + GUIDANCE * (right - null)) / scale.evaluations

        speeds: dict[str, list[float]] = {"pipeline": [], "bare loop": []}
        ends = time.perf_counter() + (until - time.perf_counter()) / (1 + (count != scale.drawn[-1]))
        for turn in range(scale.turns + 1):
            for name, draw in (("pipeline", ours), ("bare loop", bare))[:: 1 if turn % 2 else -1]:
                begun = bench.wait()
                draw()
                if turn:  # the first warms up, and compiles
                    speeds[name].append(count / (bench.wait() - begun))
            if turn and time.perf_counter() > ends:
                break
        found["images_per_second"][str(count)] = speeds
        found |= {"network": f"DiT-{preset}/2", "evaluations": scale.evaluations}


# ---------------------------------------------------------------- learning


def command(program: str, *arguments: object) -> None:
    """Run `latentflow PROGRAM` in this process."""
    file = {"train": ROOT / "train" / "flow.py", "evaluate": ROOT / "pipelines" / "evaluate.py"}[program]
    spec = importlib.util.spec_from_file_location(f"{program}_program", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where the types of its config are looked up
    spec.loader.exec_module(module)
    module.main([str(argument) for argument in arguments])


def learn(bench: Bench, until: float, found: dict[str, Any]) -> None:
    """Train on captioned images for the section's seconds, and measure what was learnt."""
    scale, data = bench.scale, bench.data or "shapes"
    with tempfile.TemporaryDirectory() as folder:
        trial, run, report = Path(folder, "trial"), Path(folder, "run"), Path(folder, "report.json")
        given = [
            "--vae",
            ROOT / "checkpoints" / "emoji-64",
            *scale.learn,
            "--validation-steps",
            0,
            "--seed",
            0,
        ]
        steps = 40 if bench.device.type == "cuda" else 4
        command(
            "train",
            data,
            "-o",
            trial,
            *given,
            "--preview-steps",
            0,
            "--max-train-steps",
            steps,
            "--log-steps",
            2,
        )
        rows = metrics(trial)
        batch = int(scale.learn[scale.learn.index("--train-batch-size") + 1])
        speed = statistics.median(row["images_per_second"] for row in rows[len(rows) // 2 :]) / batch
        left = min(scale.learn_seconds, until - time.perf_counter() - 0.15 * scale.learn_seconds)
        total = max(steps, int(left * speed))
        given += ["--validation-steps", max(1, total // 6), "--preview-steps", 0, "--max-train-steps", total]
        command("train", data, "-o", run, *given, "--validation-time", 1)
        rows = metrics(run, "val_loss")
        found |= {"data": data, "steps": total, "batch": batch, "images_per_second": speed * batch}
        found["validation_loss"] = [[row["step"], row["val_loss"]] for row in rows]
        evaluated = ["-n", scale.evaluated, "--features", "pixels-16", "--device", bench.device.type]
        command("evaluate", run / "pipeline", data, "-o", report, *evaluated)
        measured = json.loads(report.read_text())
        retrieval, shapes = measured.get("caption_retrieval", {}), measured.get("shapes", {})
        figures = {
            "nearest real image": retrieval.get("top_1"),
            "among the nearest 5": retrieval.get("top_5"),
        }
        figures |= {f"checker of shapes, {name}": shapes.get(name) for name in ("train", "held_out")}
        found["right"] = {name: figure["share"] for name, figure in figures.items() if figure}


def metrics(run: Path, name: str = "images_per_second") -> list[dict[str, float]]:
    """Return the rows of a run's metrics that have this figure."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if name in row]


# ---------------------------------------------------------------- tests


def tests(bench: Bench, seconds: float, found: dict[str, Any]) -> None:
    """Run the tests marked gpu, and count what became of them in so many seconds."""
    files = sorted(
        (ROOT / "tests").rglob("test_*.py"), reverse=True
    )  # those of large networks, in families, last
    marked = [str(file) for file in files if re.search(r"mark\.gpu\b", file.read_text(encoding="utf-8"))]
    line = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-n",
        "0",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-rN",
        "--tb=line",
    ]
    line += [*["--run-gpu"] * (bench.device.type == "cuda"), *marked]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(line, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            found["stopped_after_seconds"] = seconds
        output.seek(0)
        ended = re.findall(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", output.read(), flags=re.MULTILINE)
    found |= {kind.lower(): sum(became == kind for _, became in ended) for kind in ("PASSED", "SKIPPED")}
    found["failed"] = [name for name, became in ended if became in ("FAILED", "ERROR")]


def main() -> None:
    """Measure the sections one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu"), help="without .json and .md")
    parser.add_argument("--data", help="a folder of captioned images for the section learn")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--skip", nargs="*", choices=[*BUDGET], default=[])
    parser.add_argument("--tiny", action="store_true", help="toy sizes, in seconds, to try the program")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("this machine has no GPU that torch can use; --tiny --device cpu tries the program")
    bench = Bench(
        torch.device(options.device), TINY if options.tiny else Scale(), options.data, options.output, {}
    )
    # The end of each section: what one takes too long, the next ones have less.
    ends, end = {}, time.perf_counter()
    for name, seconds in BUDGET.items():
        end += 0.0 if name in options.skip else 0.1 if options.tiny else seconds
        ends[name] = end

    with bench.section("machine") as found:
        cuda = bench.device.type == "cuda"
        found |= {"device": torch.cuda.get_device_name() if cuda else f"CPU ({platform.machine()})"}
        found |= {
            "torch": str(torch.__version__),
            "date": time.strftime("%Y-%m-%d"),
            "dtype": str(bench.dtype)[6:],
        }
        found["matrix_flops_per_second"] = bench.rate(2.0 if cuda else 0.0)
    for (preset, changes), batch in zip(bench.scale.networks, bench.scale.batch, strict=True):
        if (name := f"train-{preset}") not in options.skip:
            with bench.section(name) as found:
                train(bench, preset, changes, batch, ends[name], found)
    if "sample" not in options.skip:
        with bench.section("sample") as found:
            sample(bench, ends["sample"], found)
    if "learn" not in options.skip:
        with bench.section("learn") as found:
            learn(bench, ends["learn"], found)
    if "tests" not in options.skip:
        with bench.section("tests") as found:
            tests(bench, max(BUDGET["tests"], ends["tests"] - time.perf_counter()), found)
    print(table(bench.found))


if __name__ == "__main__":
    main()
