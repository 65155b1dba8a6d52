"""Training recipes at equal wall-clock: which levers pay, and by how much (docs/measurements/recipe.md).

    python benchmarks/recipe.py DATA --vae AUTOENCODER -o runs/recipe-emoji [--seconds 200] [--seeds 0 1] [--only NAME]
    python benchmarks/recipe.py DATA --vae AUTOENCODER -o runs/recipe-emoji --table docs/measurements/recipe-emoji

DATA is what `latentflow train` takes, a folder or `shapes`. Every recipe is a set of that command's flags (RECIPES),
on the same network (--size) and latents. First the time of a step is measured, each recipe's turn by turn with
vanilla's (with one thread in CPU time, so that other work on the machine does not count): a recipe gets as many steps
as fit into --seconds, and its learning rate decays over them. All see the samples in the same order and are validated
on the same held-out images, noises and times (uniform), by the plain squared error of the velocity, with the
averaged weights.

Results are files in --output, one for each recipe and seed; what is there is not computed again. --table writes
FILE.md and FILE.png from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from recipe_table import write_table
from torch import Tensor, nn

from latentflow.autoencoder import decode, downscale_factor, load_autoencoder
from latentflow.config import (
    AlignmentConfig,
    FlowConfig,
    FramingConfig,
    LoopConfig,
    NetworkConfig,
    RoutingConfig,
    TextConfig,
)
from latentflow.data import (
    Source,
    cached_latents,
    cached_pixels,
    crop,
    find_source,
    pixels_to_images,
    readable,
    split,
)
from latentflow.data.sources.shapes import check
from latentflow.errors import lookup
from latentflow.flow import guide, integrate
from latentflow.metrics import features, frechet_distance, in_proportion, real_split, retrieve
from latentflow.models import Condition
from latentflow.training import Callbacks, fit
from latentflow.training.data import conditions_of
from latentflow.training.losses import flow_loss
from latentflow.training.losses.alignment import Routing, make_alignment
from latentflow.training.losses.flow import FlowLoss, validation_loss
from latentflow.training.losses.latent_data import BucketData, LatentData
from latentflow.training.trained_model import new_networks

Recipe = dict[str, Any]

# What all recipes have in common, unless they say otherwise: network, batch, and a rate for this width. Those named
# after presets have the preset's.
SIZES: dict[str, Recipe] = {
    "mini": {
        "patch_size": 2, "width": 96, "depth": 4, "heads": 3, "text_width": 96, "text_depth": 1, "text_heads": 3,
        "train_batch_size": 64, "learning_rate": 6e-3,
    },
    # Its 16 tokens are here patches of 8 x 8 latents.
    "tiny": {
        "network_preset": "tiny", "patch_size": 2, "width": 192, "heads": 3, "depth": 6, "text_width": 192,
        "text_heads": 3, "train_batch_size": 128, "learning_rate": 2e-3,
    },
    "small": {
        "network_preset": "small", "patch_size": 1, "width": 256, "heads": 4, "depth": 8, "train_batch_size": 64,
        "learning_rate": 2e-3,
    },
}  # fmt: skip
# SiT's own (arXiv:2401.08740): its block, uniform times, AdamW at a constant 1e-4, weight average 0.9999.
VANILLA: Recipe = {
    "block": "plain", "time_density": "uniform", "optimizer": "adamw", "learning_rate": 1e-4, "adam_beta2": 0.999,
    "weight_decay": 0.0, "lr_scheduler": "constant", "lr_warmup_steps": 0, "max_grad_norm": 0.0, "ema_decay": 0.9999,
}  # fmt: skip
RECIPES: dict[str, Recipe] = {
    "vanilla": VANILLA,
    "vanilla, network of diffusers": VANILLA | {"network": "diffusers"},
    "vanilla, learning rate 1e-3": VANILLA | {"learning_rate": 1e-3},
    "vanilla, learning rate 4e-3": VANILLA | {"learning_rate": 4e-3},
    "default": {},
    # one lever less
    "plain block": {"block": "plain"},
    "uniform times": {"time_density": "uniform"},
    "no decay": {"lr_scheduler": "constant"},
    "no average": {"ema_decay": 0.0},
    "average 0.9999": {"ema_decay": 0.9999},
    "beta2 0.999": {"adam_beta2": 0.999},
    "no clipping": {"max_grad_norm": 0.0},
    "no dropped conditions": {"condition_dropout": 0.0},
    # the rate
    "learning rate 4e-3": {"learning_rate": 4e-3},
    "learning rate 3e-3": {"learning_rate": 3e-3},
    "learning rate 1.2e-2": {"learning_rate": 1.2e-2},
    "decay from the start": {"lr_decay_share": 1.0},
    "decay over the last half": {"lr_decay_share": 0.5},
    # one lever more
    "Muon 8e-3": {"optimizer": "muon", "learning_rate": 8e-3},
    "Muon 4e-3": {"optimizer": "muon", "learning_rate": 4e-3},
    "Muon 2e-3": {"optimizer": "muon", "learning_rate": 2e-3},
    "schedule-free": {"optimizer": "schedule-free", "lr_scheduler": "constant"},
    "uniform times from 0.8 on": {"time_uniform_from": 0.8},
    "direction loss": {"direction_weight": 1.0},
    "contrastive": {"contrastive_weight": 0.05},
    "condition-aware OT": {"coupling": "conditional-ot"},
    "4 registers": {"registers": 4},
    "routing": {"route_share": 0.5},
    "self-alignment": {"alignment": "self"},
}
CURVE_POINTS = 10
TURNS = 5  # of timing
SAMPLES, SAMPLER_STEPS, GUIDANCE = 100, 10, 3.0


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    names = options.only or list(RECIPES)
    if options.table:
        write_table(options.output, options.table, list(RECIPES))
        return
    bench = Bench(options.data, options.vae, options.threads, SIZES[options.size])
    options.output.mkdir(parents=True, exist_ok=True)
    refuse_mixture(options)
    for seed in options.seeds:  # a whole table of one seed first
        for name in names:
            file = options.output / f"{name}-{seed}.json"
            settings = lookup(RECIPES, name, "recipe")
            # diffusers' network takes classes, no text
            if file.exists() or ("network" in settings and bench.source.kind == "text"):
                continue
            seconds = step_seconds(bench, settings, options.output)
            steps = max(1, round(options.seconds / seconds))
            print(f"{name}, seed {seed}: {steps} steps of {seconds:.3f} s", flush=True)
            result = bench.run(settings, steps, seed, seconds)
            file.write_text(json.dumps(result | {"name": name, "settings": settings}, indent=1))
            print(f"  validation loss {result['curve'][-1]['loss']:.4f}  {result['samples']}", flush=True)


def refuse_mixture(options: argparse.Namespace) -> None:
    """Refuse to add results to those of another experiment."""
    experiment = {"data": options.data, "vae": options.vae, "seconds": options.seconds, "size": options.size}
    file = options.output / "experiment.json"
    if file.exists() and json.loads(file.read_text()) != experiment:
        raise SystemExit(f"{options.output} holds results of {file.read_text()}: use another --output")
    file.write_text(json.dumps(experiment))


# ------------------------------------------------------------------------------------------------ one recipe


class DiffusersDiT(nn.Module):
    """diffusers' own `DiTTransformer2DModel`, called as our networks are. Classes only: it takes no text."""

    def __init__(self, channels: int, side: int, classes: int, size: Recipe) -> None:
        super().__init__()
        from diffusers import DiTTransformer2DModel

        self.inner = DiTTransformer2DModel(
            num_attention_heads=size["heads"],
            attention_head_dim=size["width"] // size["heads"],
            in_channels=channels,
            out_channels=channels,
            num_layers=size["depth"],
            sample_size=side,
            patch_size=size["patch_size"],
            num_embeds_ada_norm=classes,
        )
        # It drops classes by itself while it trains; the rows to drop are given here.
        for one in self.inner.modules():
            if hasattr(one, "dropout_prob"):
                one.dropout_prob = 0.0
                one.embedding_table = nn.Embedding(classes + 1, size["width"])
        self.classes = classes

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        labels = cond.class_labels
        if labels is None:
            labels = torch.full((len(x),), self.classes)
        if cond.drop is not None:
            labels = torch.where(cond.drop, self.classes, labels)
        times = 1000.0 * t.expand(len(x))
        out: Tensor = self.inner(x, timestep=times, class_labels=labels).sample
        return out


def config_of(config_class: type, settings: Recipe) -> Any:
    """The fields of a config among the settings."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{name: value for name, value in settings.items() if name in names})


@dataclass(frozen=True)
class Bench:
    """The data, and what is done with every recipe.

    Attributes:
        data: as for `latentflow train`.
        vae_folder: a trained autoencoder.
        threads: of torch.
        size: flags that all recipes have in common.
    """

    data: str
    vae_folder: str
    threads: int
    size: Recipe

    @cached_property
    def source(self) -> Source:
        return readable(find_source(self.data))

    @cached_property
    def vae(self) -> Any:
        return load_autoencoder(self.vae_folder).requires_grad_(False)

    @cached_property
    def parts(self) -> tuple[Source, Source]:
        training, held_out = split(self.source, 0.05, 0)
        return self.source.subset(training), self.source.subset(held_out)

    @property
    def side(self) -> int:
        return 64 // int(downscale_factor(self.vae))

    @cached_property
    def images(self) -> tuple[Tensor, list[str]]:
        """The training images (N, 3, 64, 64) and what they show."""
        part = self.parts[0]
        return pixels_to_images(cached_pixels(part, 64)[:]), texts_of(part)

    def networks(self, settings: Recipe, seed: int) -> dict[str, Any]:
        """The transformer, text_encoder and tokenizer."""
        torch.manual_seed(seed)
        if settings.get("network") == "diffusers":
            network = DiffusersDiT(16, self.side, len(self.source.classes), self.size)
            return {"transformer": network, "text_encoder": None, "tokenizer": None}
        size = self.size | settings
        return new_networks(
            self.source, self.vae, self.side, config_of(NetworkConfig, size), config_of(TextConfig, size)
        )

    def latents(self, part: Source, networks: dict[str, Any], seed: int) -> LatentData:
        framed = crop(part, 64, int(downscale_factor(self.vae)) * self.size["patch_size"], FramingConfig())
        table = cached_latents(part, self.vae, 64, flips=False)
        return LatentData(
            framed,
            [BucketData(table)],
            conditions_of(part, seed, networks["tokenizer"]),
            flips=False,
            seed=seed,
        )

    def stage(self, networks: dict[str, Any], settings: Recipe, seed: int, steps: int) -> FlowLoss:
        batch = config_of(LoopConfig, self.size | settings).train_batch_size
        routing = None
        if settings.get("route_share"):
            routing = Routing(
                config_of(RoutingConfig, settings), networks["transformer"], (steps * batch, batch)
            )
        return flow_loss(
            networks["transformer"],
            config_of(FlowConfig, settings),
            seed,
            networks["text_encoder"],
            routing=routing,
            alignment=make_alignment(config_of(AlignmentConfig, settings), networks["transformer"]),
            samples=steps * batch,
        )

    def run(self, settings: Recipe, steps: int, seed: int, seconds: float) -> dict[str, Any]:
        """Train for so many steps -> the curve of the validation loss and figures of samples."""
        networks = self.networks(settings, seed)
        training, held_out = (self.latents(part, networks, seed) for part in self.parts)
        stage = self.stage(networks, settings, seed, steps)
        plain = FlowLoss(networks["transformer"], FlowConfig(time_density="uniform"), 1, stage.text_encoder)
        loop = config_of(LoopConfig, self.size | settings)
        every = max(1, steps // CURVE_POINTS)
        curve: list[dict[str, float]] = []
        samples: dict[str, float] = {}

        def validate() -> dict[str, float]:
            plain.eval()
            loss = validation_loss(plain, held_out, torch.device("cpu"))
            step = min((len(curve) + 1) * every, steps)
            curve.append(
                {
                    "step": step,
                    "images": step * loop.train_batch_size,
                    "seconds": step * seconds,
                    "loss": loss,
                }
            )
            if step == steps:
                samples.update(self.samples(networks))
            return {"loss": loss}

        loop = dataclasses.replace(
            loop, max_train_steps=steps, seed=seed, validation_steps=every, preview_steps=0, checkpointing_steps=10**9,
            log_steps=10**9,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            if not fit({"flow": stage}, training, loop, folder, callbacks=Callbacks(validate=validate)):
                raise SystemExit("stopped: this run counts for nothing")
        parameters = sum(one.numel() for one in stage.parameters())
        return {
            "seed": seed, "steps": steps, "step_seconds": seconds, "parameters": parameters, "curve": curve,
            "samples": samples,
        }  # fmt: skip

    @torch.no_grad()
    def samples(self, networks: dict[str, Any]) -> dict[str, float]:
        """Draw from conditions of the training set, in its own proportions -> share of right ones, Frechet distance to
        that set but for as many images as are drawn, and theirs ("floor")."""
        images, texts = self.images
        order = in_proportion(texts, 0)
        asked = [texts[order[i % len(order)]] for i in range(SAMPLES)]
        beside, reference = (images[rows] for rows in real_split(order, SAMPLES))
        cond = self.condition(networks, asked)
        noise = torch.randn(SAMPLES, 16, self.side, self.side, generator=torch.Generator().manual_seed(0))
        network = networks["transformer"]
        if cond.batch_size:
            velocity = guide(
                lambda x, t: network(x, t, cond), lambda x, t: network(x, t, cond.unconditional()), GUIDANCE
            )
        else:
            velocity = lambda x, t: network(x, t, cond)  # noqa: E731
        drawn = decode(self.vae, integrate(velocity, noise, torch.linspace(0, 1, SAMPLER_STEPS + 1), "heun"))
        sets = {"frechet": drawn[: len(beside)], "floor": beside}
        real = features(reference, "pixels-16")
        figures = {name: frechet_distance(features(one, "pixels-16"), real) for name, one in sets.items()}
        if self.data == "shapes" and self.source.kind == "text":
            figures["right"] = sum(map(check, drawn, asked)) / SAMPLES
        elif cond.batch_size:
            figures["right"] = retrieve(drawn, asked, images, texts).shares[1]
        return figures

    def condition(self, networks: dict[str, Any], asked: list[str]) -> Condition:
        if self.source.kind == "class":
            return Condition(class_labels=torch.tensor([self.source.classes.index(name) for name in asked]))
        if self.source.kind != "text":
            return Condition()
        made = networks["tokenizer"](asked, padding=True, truncation=True, return_tensors="pt")
        mask = made["attention_mask"]
        text = networks["text_encoder"](input_ids=made["input_ids"], attention_mask=mask).last_hidden_state
        return Condition(text=text, text_mask=mask.bool())


def texts_of(part: Source) -> list[str]:
    if part.kind == "class":
        return [example.label or "" for example in part.examples]
    return part.captions() if part.kind == "text" else [""] * len(part)


# ------------------------------------------------------------------------------------------------ time of a step


class Timed(LatentData):
    """Notes the clock when each batch is asked for."""

    clock: Callable[[], float]

    def __getitems__(self, draws: list[Any]) -> dict[str, Any]:
        self.times.append(self.clock())
        return super().__getitems__(draws)


# Settings that decide what a step computes, and what they are where a recipe does not say. Recipes that agree in them
# are timed once: what they would differ by is the noise of the measurement, and each would get other steps for it.
COSTS: Recipe = {
    "block": "modern", "network": "dit", "optimizer": "adamw", "registers": 0, "coupling": "independent",
    "route_share": 0.0, "alignment": None, "contrastive_weight": 0.0, "direction_weight": 0.0,
}  # fmt: skip


def step_seconds(bench: Bench, settings: Recipe, output: Path) -> float:
    """Seconds of a step of `fit`: vanilla's, kept with the results, times the ratio of the two, turn by turn."""
    file = output / "step-seconds.json"
    known: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    reference, cost = (
        " ".join(f"{name}={value}" for name, value in (COSTS | one).items() if name in COSTS)
        for one in (VANILLA, settings)
    )
    if cost not in known:
        turns = [(timed_steps(bench, VANILLA), timed_steps(bench, settings)) for _ in range(TURNS)]
        vanilla, one = (min(seconds) for seconds in zip(*turns, strict=True))
        known.setdefault(reference, vanilla)
        if cost != reference:
            known[cost] = known[reference] * one / vanilla
        file.write_text(json.dumps(known, indent=1))
    return known[cost]


def timed_steps(bench: Bench, settings: Recipe, warm_up: int = 2, steps: int = 6) -> float:
    """The seconds of the fastest of some steps."""
    networks = bench.networks(settings, 0)
    data = bench.latents(bench.parts[0], networks, 0)
    data.__class__ = Timed
    data.times, data.clock = [], time.process_time if bench.threads == 1 else time.perf_counter
    loop = dataclasses.replace(
        config_of(LoopConfig, bench.size | settings), max_train_steps=warm_up + steps + 1, validation_steps=0,
        preview_steps=0, checkpointing_steps=10**9,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        fit({"flow": bench.stage(networks, settings, 0, warm_up + steps + 1)}, data, loop, Path(folder))
    return min(b - a for a, b in pairwise(data.times[warm_up:]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--vae", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only", nargs="+", default=None, metavar="NAME", help=f"of: {', '.join(RECIPES)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--size", choices=list(SIZES), default="mini", help="of the network; an --output for each"
    )
    parser.add_argument(
        "--table", type=Path, default=None, metavar="FILE", help="write FILE.md and FILE.png, and stop"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
