"""Adapters in the text encoders of pretrained models: learnt beside the network's, and opened by stock diffusers."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from latentflow.config import AdapterConfig, FlowConfig, LoopConfig
from latentflow.families import FAMILIES
from latentflow.families.from_configs import model_from_configs
from latentflow.families.stored_weights import parameter_count
from latentflow.families.text_encoders import text_encoders
from latentflow.pipeline.adapter_conversion import layouts_of, write_in_layout
from latentflow.pipeline.adapter_files import read_facts
from latentflow.pipeline.stock_adapters import adapted_encoders
from latentflow.training.adapted_run import adapted_run
from latentflow.training.fine_tune.memory_plan import FineTuning, MemoryPlanner
from latentflow.training.fine_tune.pretrained_adapter import PretrainedAdapter
from latentflow.training.fine_tune.step_memory import encoding_prompts
from latentflow.training.loop.optimizers import make_optimizers
from latentflow.training.losses.pretrained import PretrainedLoss

from ..families.parts import clip
from ..families.test_pretrained import seeded
from ..families.tiny import TINY, checkpoint
from .command import call, call_on_two, losses, same_state, state
from .pretrained import ADAPTER, QUICK, adapter, base_flags, photos, validated

pytestmark = pytest.mark.usefixtures("no_memorisation")
#: family -> text encoders with an adapter
ENCODERS = {
    "StableDiffusionPipeline": ["text_encoder"],
    "StableDiffusionXLPipeline": ["text_encoder", "text_encoder_2"],
    "StableDiffusion3Pipeline": ["text_encoder", "text_encoder_2"],
    "FluxPipeline-dev": ["text_encoder"],
}
each_family = pytest.mark.parametrize("name", ENCODERS)
CAPTIONS = ["a red apple", "a green hat of the sun", "a house", "big blue tree over a small house"]


class Learner:
    """A tiny model with an adapter in network and text encoders, which learns from four images."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, **config: Any) -> None:
        tiny = TINY[name]
        self.model: Any = FAMILIES[name.partition("-")[0]](deepcopy(checkpoint(name)), **tiny.call)
        with torch.no_grad():
            images = torch.rand(4, 3, tiny.side, tiny.side, generator=seeded(3)) * 2 - 1
            self.latents = self.model.encode(images)
        self.model.pipeline.to(dtype)
        self.adapter = PretrainedAdapter(
            self.model, AdapterConfig(lora_rank=2, lora_alpha=3.0, lora_text_encoder=True, **config)
        )
        self.loss = PretrainedLoss(self.model, FlowConfig(), seed=1).train()

    def __call__(self, first: int = 0) -> Tensor:
        """Return the loss of the images with the sample ids from ``first``."""
        ids = [*range(first, first + 4)]
        loss: Tensor = self.loss({"latents": self.latents, "sample_ids": ids, "captions": CAPTIONS})["loss"]
        return loss

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """The parameters that learn."""
        return {name: weight for name, weight in self.loss.named_parameters() if weight.requires_grad}

    def scatter(self) -> None:
        """Give the adapter random weights."""
        for number, (name, weight) in enumerate(self.learned.items()):
            if "magnitude" not in name:
                weight.data = 0.15 * torch.randn(weight.shape, generator=seeded(number))

    def train(self, steps: int) -> None:
        (optimizer,) = make_optimizers(self.loss, LoopConfig(optimizer="adamw", learning_rate=3e-2))
        for step in range(steps):
            optimizer.zero_grad()
            self(4 * step).backward()
            optimizer.step()


def image(name: str, pipe: Any) -> Tensor:
    """Return what a stock pipeline draws, (1, 3, H, W) in [0, 1]."""
    tiny = TINY[name]
    size = {"height": tiny.side, "width": tiny.side}
    pipe.set_progress_bar_config(disable=True)
    call = {**tiny.call, **size, "num_inference_steps": 3, "output_type": "pt"}
    images: Tensor = pipe(prompt=[CAPTIONS[1]], generator=seeded(), **call).images
    return images


def opened(name: str, file: Any) -> Any:
    """Return the stock pipeline with an adapter, a file or its tensors, by its own loader."""
    pipe = deepcopy(checkpoint(name))
    pipe.load_lora_weights(file)
    return pipe


def test_the_families_whose_loader_has_adapters_of_clip() -> None:
    found = {
        name: [*adapted_encoders(checkpoint(name))]
        for name in TINY
        if hasattr(getattr(diffusers, name.partition("-")[0]), "save_lora_weights")
    }
    kinds = {name.partition("-")[0] for name in ENCODERS}
    assert {name: parts for name, parts in found.items() if name in ENCODERS} == ENCODERS
    others = {name for name, parts in found.items() if parts and name.partition("-")[0] not in kinds}
    assert others == {"FluxKontextPipeline"}, others


@each_family
def test_gradients_reach_all_layers_and_are_those_of_the_loss(name: str) -> None:
    """By the change of the loss along them, which central differences measure."""
    learner = Learner(name)
    learner.scatter()
    learner().backward()
    own = {key: weight for key, weight in learner.learned.items() if key.startswith("text_encoders.")}
    assert {key.split(".")[1] for key in own} == {*ENCODERS[name]}
    assert {key.split(".")[-4] for key in own} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    without = {key for key, weight in own.items() if weight.grad is None or not weight.grad.any()}
    if name == "StableDiffusionXLPipeline":  # it takes the states before the last of two layers
        assert without == {key for key in own if ".text_encoder." in key and ".layers.1." in key}
    else:
        assert without == set()
    directions = {key: weight.grad for key, weight in own.items() if weight.grad is not None}
    length = sum(float(value.square().sum()) for value in directions.values()) ** 0.5
    step = 0.02

    def moved(by: float) -> float:
        with torch.no_grad():
            for key, value in directions.items():
                own[key].add_(value, alpha=by / length)
            return float(learner().double())

    change = -(moved(-step) - moved(2 * step)) / (2 * step)
    assert change == pytest.approx(length, rel=0.05)


@each_family
def test_it_is_in_float32_beside_encoders_in_bfloat16_under_autocast(name: str) -> None:
    """As on a GPU; what the adapter does in bfloat16 is near to what it does in float32."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        learner = Learner(name, dtype, lora_dora=True)
        learner.scatter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            learner().backward()
        own = {key: weight for key, weight in learner.learned.items() if key.startswith("text_encoders.")}
        assert {weight.dtype for weight in own.values()} == {torch.float32}
        gradients = [weight.grad for weight in own.values() if weight.grad is not None]
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.9


@each_family
def test_captions_are_encoded_as_the_model_encodes_them_and_dropped_ones_are_its_null(name: str) -> None:
    learner = Learner(name)
    learner.scatter()
    learner.loss.eval()
    with torch.no_grad():
        rows = learner.model.encode_prompt(CAPTIONS)
        batch = {"captions": CAPTIONS, "latents": learner.latents}
        made = learner.loss.prompts(batch, torch.tensor([False, True, False, True]))
        null = learner.model.null(1)
    for key, value in made.values.items():
        for place, expected in enumerate((rows[0], null, rows[2], null)):
            torch.testing.assert_close(value[place], expected.values[key][0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [  # of two encoders as SDXL's, and T5 beside them
        pytest.param(name, marks=pytest.mark.slow) if name == "StableDiffusion3Pipeline" else name
        for name in ENCODERS
    ],
)
def test_the_stock_pipeline_opens_it_in_every_layout(name: str, tmp_path: Path) -> None:
    kohya = {"lora_layers": ("transformer_blocks.0.attn",)} if "Flux" in name else {}  # see NOT_READ
    learner = Learner(name, **kohya)
    learner.train(6)
    learner.loss.eval()
    learner.adapter.save(tmp_path)
    kind, file = type(learner.model.pipeline), tmp_path / "pytorch_lora_weights.safetensors"
    keys = load_file(file).keys()
    assert {key.partition(".")[0] for key in keys if key.startswith("text")} == {*ENCODERS[name]}
    drawn, plain = image(name, learner.model.pipeline), image(name, deepcopy(checkpoint(name)))
    stock = opened(name, file)
    torch.testing.assert_close(image(name, stock), drawn, rtol=0, atol=1e-5)
    stock.fuse_lora(components=[*stock._lora_loadable_modules])
    stock.unload_lora_weights()
    torch.testing.assert_close(image(name, stock), drawn, rtol=0, atol=2e-5)
    alone = {key: value for key, value in load_file(file).items() if not key.startswith("text")}
    for without in (plain, image(name, opened(name, alone))):
        assert float((drawn - without).abs().max()) > 1e-3
    for layout in layouts_of(kind):
        write_in_layout(file, other := tmp_path / f"{layout}.safetensors", layout, kind)
        torch.testing.assert_close(image(name, opened(name, other)), drawn, rtol=0, atol=1e-5)


LINE = shlex.split(
    "--lora-rank 2 --lora-text-encoder --learning-rate 1e-2 --condition-dropout 0.2 --checkpointing-steps 3 "
    "--gradient-accumulation-steps 2 --mirror-captions --random-flip"
)


@pytest.fixture(scope="module")
def line(pretrained: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """A run of SDXL, where a layer learns nothing and a dropped caption is no prompt."""
    name = "StableDiffusionXLPipeline"
    data = photos(tmp_path_factory.mktemp("data"), TINY[name].side, 4)
    return [data, *base_flags(name, pretrained(name)), *QUICK, *LINE]


@pytest.fixture(scope="module")
def whole(
    no_memorisation: None, line: list[Any], cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A run on one process that nobody stopped, and what it printed."""
    run = tmp_path_factory.mktemp("whole")
    return run, call(cache, *line, "-o", run, "--train-batch-size", 2, "--max-train-steps", 6)


def test_a_run_says_what_learns_and_at_which_rate(whole: tuple[Path, str]) -> None:
    run, said = whole
    assert "text encoders: text_encoder and text_encoder_2 learn too, at the rate 0.0005, 0.05 of the" in said
    assert "layers and 16 of text_encoder and text_encoder_2: " in said
    made = adapter(run)
    assert len([key for key in made if key.startswith("text")]) == 2 * 16
    moved = {key for key, value in made.items() if ".lora_B." in key and value.any()}
    assert {key.partition(".")[0] for key in moved} == {"unet", "text_encoder", "text_encoder_2"}
    kept = {key.split("/")[-1].partition(".")[0] for key in state(run) if key.startswith("flow-weights")}
    assert kept == {"network", "text_encoders"}
    largest = {
        part: max(
            float(value.abs().max()) for key, value in made.items() if key in moved and key.startswith(part)
        )
        for part in ("unet", "text")
    }
    assert largest["text"] < 0.1 * largest["unet"]  # AdamW's steps are as large as the rate


def test_an_unfinished_run_has_the_adapter_of_its_newest_checkpoint(whole: tuple[Path, str]) -> None:
    run, _ = whole
    made, aside = adapter(run), run / "aside"
    (run / "adapter").rename(aside)
    try:
        found = adapted_run(str(run))
        assert found is not None
        folder, said = found.adapter()
    finally:
        aside.rename(run / "adapter")
    again = load_file(folder / Path(ADAPTER).name)
    assert "is not finished" in said and again.keys() == made.keys()
    assert all(torch.equal(again[key], made[key]) for key in made)
    bases = [read_facts(place, "", {}).base for place in (folder, run / "adapter")]
    assert bases[0] == bases[1] != {}


def test_stopped_and_started_again_it_is_the_same_run(
    whole: tuple[Path, str], line: list[Any], cache: Path, tmp_path: Path
) -> None:
    for steps in (3, 6):
        said = call(cache, *line, "-o", tmp_path, "--train-batch-size", 2, "--max-train-steps", steps)
    assert "step 1/" not in said
    assert same_state(whole[0], tmp_path)
    one, two = adapter(whole[0]), adapter(tmp_path)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--auto-micro-batch"]])
def test_two_processes_learn_what_one_learns(
    whole: tuple[Path, str],
    line: list[Any],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    call_on_two(cache, *line, *more, "-o", tmp_path, "--train-batch-size", 1, "--max-train-steps", 6)
    assert losses(tmp_path) == pytest.approx(losses(whole[0]), abs=1e-4)
    one, two = adapter(whole[0]), adapter(tmp_path)
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-4)


@pytest.mark.slow
@each_family
def test_30_steps_on_8_images_learn_from_their_captions(
    name: str, pretrained: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    """With previews, validation, prior samples and the figure of what was learnt: all of them encode prompts."""
    data = photos(tmp_path / "data", TINY[name].side)
    (tmp_path / "prior.txt").write_text("a house\na hat")
    flags = shlex.split(
        f"--lora-rank 2 --lora-text-encoder --lora-dora --lora-dropout 0.1 --learning-rate 3e-3 --validation 0.25 "
        f"--validation-steps 10 --preview-steps 15 --max-train-steps 30 --prior-samples 2 --prior-prompts "
        f"{tmp_path / 'prior.txt'}"
    )
    call(cache, data, "-o", tmp_path / "run", *base_flags(name, pretrained(name)), *QUICK, *flags)
    found = validated(tmp_path / "run")
    assert found.keys() == {10, 20, 30} and found[30] < found[10]
    made = adapter(tmp_path / "run")
    assert any("text" in key and "magnitude" in key for key in made)
    with_it, plain = (
        image(name, opened(name, tmp_path / "run" / ADAPTER)),
        image(name, deepcopy(checkpoint(name))),
    )
    assert float((with_it - plain).abs().max()) > 1e-3


def test_what_cannot_learn_is_refused(
    pretrained: Callable[[str], Path], cache: Path, line: list[Any], tmp_path: Path
) -> None:
    name = "ChromaPipeline"
    refused = [line[0], "-o", tmp_path / "run", *base_flags(name, pretrained(name)), "--lora-rank", 2]
    said = call(cache, *refused, "--lora-text-encoder", expect=2)
    assert "--lora-text-encoder: diffusers has no adapters for the text encoders of" in said
    said = call(cache, *line, "-o", tmp_path / "run", "--condition", "none", expect=2)
    assert "is used without captions, from which a text encoder would learn" in said
    assert not (tmp_path / "run" / "adapter").exists()


def test_the_plan_counts_encoders_that_stay_and_learn(pretrained: Callable[[str], Path]) -> None:
    """Of Stable Diffusion 3: weights that the adapter adds, counted by hand, and all three encoders."""
    planner = MemoryPlanner(model_from_configs(pretrained("StableDiffusion3Pipeline")))
    settings = FineTuning(lora_rank=4, resolution=16)
    usual, learns = (planner.plan(replace(settings, lora_text_encoder=on)) for on in (False, True))
    added = 0
    for encoder in adapted_encoders(planner.model.pipeline).values():
        config: Any = encoder.config
        added += config.num_hidden_layers * 4 * 2 * config.hidden_size * 4
    assert learns.adapter - usual.adapter == 4 * added == learns.gradients - usual.gradients > 0
    encoders = sum(parameter_count(part) for part in text_encoders(planner.model.pipeline).values())
    assert learns.kept == pytest.approx(2 * encoders, rel=0.02) and usual.kept == 0
    assert learns.prompts == 0 and learns.images == usual.images + learns.kept
    lines = planner.lines(replace(settings, lora_text_encoder=True))
    assert any(line.startswith("  text encoders ") for line in lines)
    assert any("without the network: " in line and "prompts" not in line for line in lines)


def test_the_plan_counts_what_an_encoder_keeps_for_its_backward_pass() -> None:
    """Twice as much of two prompts, and at least the inputs of six layers of 16 numbers in each of two blocks."""
    with torch.device("meta"):
        encoder = clip()
    one, two = (encoding_prompts(encoder, "float32", 77, count, learns=True) for count in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.1)
    assert one - encoding_prompts(encoder, "float32", 77) > 2 * 5 * 77 * 16 * 4
