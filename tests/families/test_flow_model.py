"""The flow model of latentflow's own checkpoints, and a foreign family of 30 lines: both are sampled by one loop."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

import latentflow
from latentflow import FlowModel, LatentFlowInpaintPipeline, LatentFlowPipeline
from latentflow.autoencoder import mask_channels
from latentflow.errors import UserError
from latentflow.families import FAMILIES, Rows
from latentflow.flow import CondOT, integrate
from latentflow.utils.files import pipeline_folder

from ..pipeline.conftest import NAMES, quiet, tiny_dit, tiny_text, tiny_vae

pytestmark = pytest.mark.usefixtures("no_grad")

SIDE = 8
PROMPTS = ["a red apple", "green tree"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def checkpoint(kind: Any = LatentFlowPipeline, *, settings: Any = None, **config: Any) -> Any:
    """Return a pipeline and the flow model in it."""
    parts = tiny_text() if config.get("text_dim") else {}
    names = NAMES if config.get("num_classes") else None
    pipe = quiet(kind(tiny_vae(), tiny_dit(**config), id2label=names, **parts, **(settings or {})))
    return pipe, pipe.model


def sample(
    model: FlowModel, rows: Rows, steps: int | None = None, solver: str | None = None, **options: Any
) -> Tensor:
    """Return images in [-1, 1], sampled as the docstring of ``families/model.py`` has it, or by a named solver."""
    times = (model.usual_grid if solver is None else model.time_grid)(steps, SIDE, SIDE)
    velocity = model.velocity(rows, times=times, **options)
    return model.decode(
        integrate(velocity, model.noise(len(rows), SIDE, SIDE, seeded()), times, solver or model.usual_solver)
    )


def as_called(pipe: Any, **call: Any) -> Tensor:
    """Return the images of a pipeline's call in [-1, 1], not clipped."""
    images: Tensor = pipe.decode_latents(pipe(**call, generator=seeded(), output_type="latent").images)
    return images


@pytest.mark.parametrize(
    ("config", "settings", "ask", "call"),
    [
        ({"text_dim": 16}, {}, lambda m: m.encode_prompt(PROMPTS), {"prompt": PROMPTS}),
        ({"text_dim": 16}, {}, lambda m: m.encode_prompt([""]), {"prompt": ""}),
        ({"num_classes": 3}, {}, lambda m: m.encode_class(["hat", 2]), {"class_labels": ["hat", 2]}),
        ({}, {}, lambda m: m.null(2), {"num_images_per_prompt": 2}),
        (
            {"num_classes": 3, "text_dim": 16},
            {},
            lambda m: m.encode_prompt(PROMPTS, class_labels=[0, 1]),
            {"prompt": PROMPTS, "class_labels": [0, 1]},
        ),
        (
            {"text_dim": 16, "size_conditioning": True},
            {},
            lambda m: m.encode_prompt(PROMPTS),
            {"prompt": PROMPTS},
        ),
        (
            {"text_dim": 16},
            {"path": "variance-preserving", "path_options": {"beta_max": 12.0}, "prediction": "noise"},
            lambda m: m.encode_prompt(PROMPTS),
            {"prompt": PROMPTS},
        ),
        (
            {"num_classes": 3},
            {"path": "trigonometric", "prediction": "data"},
            lambda m: m.encode_class([1]),
            {"class_labels": 1},
        ),
        (
            {"num_classes": 3, "interval_conditioning": True},
            {"average": True},
            lambda m: m.encode_class([1]),
            {"class_labels": 1},
        ),
        (
            {"num_classes": 3, "interval_conditioning": True},
            {"average": True, "folded_guidance": 2.0, "step_counts": [1, 2]},
            lambda m: m.encode_class([1]),
            {"class_labels": 1},
        ),
    ],
    ids=["text", "empty", "class", "plain", "both", "sizes", "noise", "data", "average", "folded"],
)
def test_it_samples_what_the_pipeline_does(config: Any, settings: Any, ask: Any, call: Any) -> None:
    """To the last bit, with the model's own steps, solver and guidance."""
    pipe, model = checkpoint(settings=settings, **config)
    assert torch.equal(sample(model, ask(model)), as_called(pipe, **call))
    assert (model.path, model.prediction) == (pipe.path, pipe.config.prediction)


def test_a_consistency_model_is_bound_to_the_end_of_the_grid() -> None:
    settings = {"average": True, "consistency": True}
    _, model = checkpoint(settings=settings, num_classes=3, interval_conditioning=True)
    ends: list[float] = []
    model.network.register_forward_pre_hook(
        lambda _, args, named: ends.append(float(named["end"][0])), with_kwargs=True
    )
    times = model.time_grid(None, SIDE, SIDE)
    velocity = model.velocity(model.encode_class(["hat"]), 1.0, times=times)
    noise = model.noise(1, SIDE, SIDE, seeded())
    integrate(velocity, noise, times, model.usual_solver, generator=seeded())
    assert ends == [1.0] * 4


def test_guidance_has_one_meaning() -> None:
    pipe, model = checkpoint(text_dim=16)
    rows, negative = model.encode_prompt(PROMPTS), model.encode_prompt(["a small blue hat"] * 2)
    for scale in (None, 1.0, 2.5):
        for against, name in ((None, None), (negative, "a small blue hat")):
            called = as_called(pipe, prompt=PROMPTS, guidance_scale=scale, negative_prompt=name)
            assert torch.equal(sample(model, rows, guidance_scale=scale, negative=against), called)
    x, t = model.noise(2, SIDE, SIDE, seeded()), torch.tensor(0.3)
    given, without = (model.velocity(asked, 1.0)(x, t) for asked in (rows, model.null(2)))
    guided = model.velocity(rows, 3.0)(x, t)
    torch.testing.assert_close(guided, without + 3.0 * (given - without))
    with pytest.raises(UserError, match="2 negative rows for 3 rows"):
        model.velocity(rows[[0, 1, 1]], 2.0, negative=rows)


def test_rows_are_indexed_and_joined_like_a_batch() -> None:
    _, model = checkpoint(text_dim=16)
    rows = model.encode_prompt(["a red apple", "hat", "big yellow sun over a house"])
    x = model.noise(1, SIDE, SIDE, seeded()).expand(3, -1, -1, -1)

    def velocity(rows: Rows) -> Tensor:
        return model.velocity(rows, 1.0)(x[: len(rows)], torch.tensor(0.4))

    every = velocity(rows)
    assert len(rows) == 3 and len(rows[0]) == 1 and len(rows[1:]) == 2
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    for index in ([1, 0], slice(1, 3), 2, torch.tensor([True, False, True])):
        close(velocity(rows[index]), every[index].reshape(-1, *every.shape[1:]))
    close(velocity(rows[[1]].repeat(2)), every[[1, 1]])
    apart = [
        model.encode_prompt(["hat"]),
        model.encode_prompt(["big yellow sun over a house"]),
        model.null(1),
    ]
    joined = velocity(Rows.cat(apart))
    close(joined, torch.cat([velocity(part) for part in apart]))
    with pytest.raises(ValueError, match="cannot be joined"):
        Rows.cat([rows, Rows(model, {"class_labels": torch.zeros(1)})])


def test_known_images_are_part_of_the_rows() -> None:
    """Trained inpainting: guided too, since what is known belongs to the negative rows as well."""
    channels = mask_channels(tiny_vae())
    pipe, model = checkpoint(LatentFlowInpaintPipeline, text_dim=16, condition_channels=channels)
    images = torch.rand(2, 3, SIDE, SIDE, generator=seeded(1))
    masks = torch.zeros(2, 1, SIDE, SIDE)
    masks[:, :, :, 3:] = 1.0
    rows = model.encode_prompt(PROMPTS).with_known(2.0 * images - 1.0, masks)
    called = as_called(
        pipe,
        prompt=PROMPTS,
        image=images,
        mask_image=masks,
        method="trained",
        solver="heun",
        negative_prompt="a small blue hat",
    )
    negative = model.encode_prompt(["a small blue hat"] * 2)
    assert torch.equal(sample(model, rows, 20, "heun", negative=negative), called)
    assert torch.equal(rows[[1, 0]].kept["channels"], rows.kept["channels"][[1, 0]])  # type: ignore[index]
    with pytest.raises(ValueError, match="cannot be joined"):
        Rows.cat([rows, model.encode_prompt(PROMPTS)])
    with pytest.raises(UserError, match="2 images and 1 masks for 2 rows"):
        rows.with_known(images, masks[:1])


def test_images_and_latents() -> None:
    pipe, model = checkpoint()
    images = torch.rand(2, 3, SIDE, SIDE, generator=seeded(1)) * 2 - 1
    latents = model.encode(images)
    assert torch.equal(latents, pipe.encode_images(images))
    assert model.decode(latents).shape == images.shape
    assert tuple(latents.shape[1:]) == model.latent_shape(SIDE, SIDE)
    rows = [seeded(4), seeded(5)]
    assert torch.equal(model.noise(2, SIDE, SIDE, rows)[1:], model.noise(1, SIDE, SIDE, seeded(5)))


def test_it_refuses_what_it_does_not_take() -> None:
    _, model = checkpoint(num_classes=3)
    assert (model.takes_text, model.takes_classes, model.takes_masks) == (False, True, False)
    with pytest.raises(UserError, match=r"does not take prompt\nIt takes class_labels: apple, hat, tree"):
        model.encode_prompt(["hat"])
    with pytest.raises(UserError, match="unknown class 'hatt'"):
        model.encode_class(["hatt"])
    with pytest.raises(UserError, match="not trained with masks"):
        model.null(1).with_known(torch.zeros(1, 3, SIDE, SIDE), torch.zeros(1, 1, SIDE, SIDE))


@pytest.mark.parametrize(
    ("config", "kind", "classes", "text", "arguments"),
    [
        ({"text_dim": 16}, "text", (), "a hat", {"prompt": ["a hat"]}),
        ({"num_classes": 3}, "class", tuple(NAMES.values()), "hat", {"class_labels": [1]}),
        ({}, "unconditional", (), "", {"num_images_per_prompt": 1}),
    ],
)
def test_it_says_what_it_was_trained_on(
    config: Any, kind: str, classes: Any, text: str, arguments: Any
) -> None:
    _, model = checkpoint(**config, size_conditioning=kind == "class")
    assert (model.condition_kind, model.classes, model.call_arguments([text])) == (kind, classes, arguments)
    assert (model.takes_sizes, model.native_side) == (kind == "class", SIDE)
    model.network.to(torch.bfloat16)
    alone = model.network_alone()
    assert alone.network.dtype == torch.bfloat16 and model.vae.dtype == torch.float32
    assert alone.network is model.network and alone.vae is None and alone.path == model.path


def test_it_is_saved_and_opened_with_the_pipeline_inside(tmp_path: Path) -> None:
    _, model = checkpoint(num_classes=3)
    model.save_pretrained(tmp_path)
    opened = FlowModel.from_pretrained(tmp_path)
    assert torch.equal(sample(opened, opened.encode_class([1]), 2), sample(model, model.encode_class([1]), 2))
    assert type(model) is type(opened) is FAMILIES["LatentFlowPipeline"]
    assert type(opened.pipeline) is LatentFlowPipeline and opened.network is opened.pipeline.transformer
    assert "FlowModel" in latentflow.__all__


def test_a_hub_id_is_opened_by_the_class_that_its_index_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = checkpoint(num_classes=3)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda name: {"_class_name": "LatentFlowPipeline"})
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(tmp_path))
    assert type(FlowModel.from_pretrained("someone/emoji")) is type(model)


def test_what_is_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a pipeline folder"):
        FlowModel.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        FlowModel.from_pretrained(tmp_path / "missing")
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixelPipeline"}')
    with pytest.raises(UserError, match="is a PixelPipeline, which is none of the"):
        FlowModel.from_pretrained(tmp_path)


# ------------------------------------------------------------------ a family of another kind


class PackedNetwork(ModelMixin, nn.Module):
    """sigma = 1 is noise; (B, h w, C) tokens, a list of ragged embeddings and embedded guidance -> noise - data."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, tokens: Tensor, sigma: Tensor, embeds: list[Tensor], guidance: Tensor) -> Tensor:
        mean = torch.stack([row.mean() for row in embeds]) * guidance
        t, m = (1.0 - sigma)[:, None, None], mean[:, None, None]
        return -(m + (t * 0.25 - (1 - t)) / ((0.5 * t) ** 2 + (1 - t) ** 2) * (tokens - t * m))


class PackedPipeline(DiffusionPipeline):  # type: ignore[misc]
    vae_scale_factor = 2

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.register_modules(vae=vae)
        self.transformer = PackedNetwork()

    def encode_prompt(self, prompts: list[str]) -> list[Tensor]:
        return [torch.tensor([float(len(word)) for word in text.split()] or [0.0]) for text in prompts]


class PackedModel(FlowModel):
    embeds_guidance = True
    usual_guidance = 0.5

    def encode_prompt(self, prompts: Any, **options: Any) -> Rows:
        return Rows(self, {"embeds": self.pipeline.encode_prompt(prompts)})

    def shift(self, steps: int, height: int, width: int) -> float:
        return 1.0 + height * width / 64 + 1 / steps

    def predict(
        self, x: Tensor, t: Tensor, condition: Any, end: Tensor | None, guidance_scale: float
    ) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        guidance = torch.full_like(t, guidance_scale)
        out: Tensor = self.network(tokens, 1.0 - t, condition.values["embeds"], guidance)
        return -out.transpose(1, 2).unflatten(2, x.shape[2:])


def test_a_foreign_family_is_a_class_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "PackedPipeline", PackedModel)
    monkeypatch.setattr("diffusers.PackedPipeline", PackedPipeline, raising=False)
    PackedPipeline(tiny_vae()).save_pretrained(tmp_path)
    model = FlowModel.from_pretrained(tmp_path)
    assert isinstance(model, PackedModel) and model.path == CondOT() and not model.few_steps
    assert (model.condition_kind, model.classes, model.native_side) == ("text", (), None)
    rows = Rows.cat([model.encode_prompt(["a bb"]), model.encode_prompt(["cccc dd e"]), model.null(1)])
    lengths = torch.tensor([1.5, 7 / 3, 0.0])
    evaluated: list[int] = []
    model.network.register_forward_pre_hook(lambda _, args: evaluated.append(len(args[0])))
    x0, times = model.noise(3, SIDE, SIDE, seeded()), model.time_grid(60, SIDE, SIDE)
    assert len(times) == 61 and times[30] < 0.4  # shifted by size and number of steps
    for asked, order in ((rows, [0, 1, 2]), (rows[[1, 0]], [1, 0])):
        for scale, factor in ((None, 0.5), (1.0, 1.0), (2.0, 2.0)):
            x1 = integrate(model.velocity(asked, scale), x0[: len(order)], times, "heun")
            expected = factor * lengths[order].view(-1, 1, 1, 1) + 0.5 * x0[: len(order)]
            torch.testing.assert_close(x1, expected, rtol=5e-3, atol=5e-3)
    assert set(evaluated) == {2, 3}  # embedded guidance never doubles a batch
    assert model.decode(x1).shape == (2, 3, SIDE, SIDE)
    with pytest.raises(UserError, match="does not take classes"):
        model.encode_class([1])
    with pytest.raises(UserError, match="not trained with masks"):
        rows.with_known(torch.zeros(3, 3, SIDE, SIDE), torch.zeros(3, 1, SIDE, SIDE))


def test_a_folder_of_runs_names_them(tmp_path: Path) -> None:
    for name in ("hats", "shoes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("data: cats")
    with pytest.raises(UserError, match=f"Give one of the folders in it: {tmp_path}/hats, {tmp_path}/shoes."):
        pipeline_folder(tmp_path)
    (tmp_path / "shoes" / "config.yaml").unlink()
    with pytest.raises(UserError, match=f"Did you mean '{tmp_path}/hats'?"):
        pipeline_folder(tmp_path)


@pytest.mark.parametrize("name", ["shose", "nothing"])
def test_a_missing_folder_names_the_nearest(name: str, tmp_path: Path) -> None:
    (tmp_path / "shoes").mkdir()
    with pytest.raises(UserError) as refused:
        pipeline_folder(tmp_path / name)
    assert (f"Did you mean '{tmp_path}/shoes'? " in str(refused.value)) == (name == "shose")
