"""Checkpoints of tokens in the house's pipelines, against the law of a network whose posterior is known."""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import VQModel
from torch import Tensor

from latentflow import LatentFlowImg2ImgPipeline, LatentFlowInpaintPipeline, LatentFlowPipeline
from latentflow.autoencoder import tokenize
from latentflow.errors import UserError
from latentflow.evaluation.data import ImageSet
from latentflow.evaluation.figures import validation_loss
from latentflow.evaluation.sampler import Sampler
from latentflow.families import FlowModel
from latentflow.families.tokens import TokenModel
from latentflow.flow.discrete import SAMPLERS
from latentflow.flow.discrete.table import mixture_path
from latentflow.inference.memory import kept_whole
from latentflow.inference.sample import model_capabilities, read_capabilities
from latentflow.models import Condition, TokenDiT
from latentflow.pipeline.edit import LatentFlowEditPipeline
from latentflow.pipeline.jumps import check_solver
from latentflow.web.inference_server import InferenceServer

from .test_offload import by_group, by_model, sequential

V, SIDE = 5, 8
PATHS = {
    "mask": {"source": "mask", "kappa": "linear", "kappa_options": {}},
    "uniform": {"source": "uniform", "kappa": "polynomial", "kappa_options": {"degree": 2.0}},
}
TINY: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "num_classes": 2, "sample_size": SIDE}
#: log p of each token: under the classes 0 and 1, and under the null
LOG_P = torch.tensor([[4.0, 2.0, 2.0, 1.0, 1.0], [1.0, 1.0, 2.0, 2.0, 4.0], [1.0] * 5])
LOG_P = (LOG_P / LOG_P.sum(1, keepdim=True)).log()


class Known(TokenDiT):
    """A network whose logits are those of the row's class alone."""

    def forward(self, x: Tensor, t: Tensor | float, cond: Condition | None = None) -> Tensor:
        assert cond is not None and cond.class_labels is not None and cond.drop is not None
        rows = LOG_P[torch.where(cond.drop, 2, cond.class_labels)]
        return rows[:, None, None].expand(*x.shape, V)


def tokenizer(codes: int = V) -> VQModel:
    torch.manual_seed(0)
    vae = VQModel(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, num_vq_embeddings=codes, latent_channels=3,
    )  # fmt: skip
    vae.quantize.embedding.weight.data.normal_()
    return vae.eval()


def pipeline(kind: Any = LatentFlowPipeline, source: str = "mask", network: type[TokenDiT] = Known) -> Any:
    torch.manual_seed(0)
    states = mixture_path(V, **PATHS[source]).states
    built = network(V, states, embedding_width=8, transformer=TINY)
    names = {0: "apple", 1: "hat"}
    pipe = kind(tokenizer(), built.eval(), id2label=names, token_path=PATHS[source])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + number) for number in range(count)]


def frequencies(tokens: Tensor) -> Tensor:
    return torch.bincount(tokens.flatten(), minlength=V) / tokens.numel()


def drawn(pipe: Any, count: int = 100, **settings: Any) -> Tensor:
    asked = {"class_labels": "apple", "num_images_per_prompt": count, "num_inference_steps": 4}
    tokens: Tensor = pipe(**asked | {"output_type": "latent"} | settings, generator=generators(count)).images
    assert tokens.shape == (count, SIDE, SIDE) and tokens.dtype == torch.int64 and int(tokens.max()) < V
    return tokens


@pytest.mark.parametrize("source", PATHS)
@pytest.mark.parametrize(
    ("settings", "power", "scale"),
    [
        ({"guidance_scale": 1.0}, 1.0, 1.0),
        ({}, 1.0, 2.0),
        ({"guidance_scale": 3.0, "temperature": 1.5}, 1 / 1.5, 3.0),
        ({"guidance_scale": 1.0, "corrector": 3.0}, 1.0, 1.0),
        ({"guidance_scale": 3.0, "guidance_interval": (1.0, 1.0)}, 1.0, 1.0),
    ],
    ids=["plain", "guided by default", "temperature", "corrector", "outside the interval"],
)
def test_the_tokens_have_the_law_of_the_logits(
    source: str, settings: dict[str, Any], power: float, scale: float
) -> None:
    """p_cond (p_cond / p_null)^(scale - 1), to the power of 1 / temperature; 6,400 independent tokens."""
    expected = (power * (LOG_P[2] + scale * (LOG_P[0] - LOG_P[2]))).softmax(0)
    distance = 0.5 * (frequencies(drawn(pipeline(source=source), **settings)) - expected).abs().sum()
    assert float(distance) < 0.02
    other = 0.5 * (LOG_P[1].exp() - expected).abs().sum()
    assert float(other) > 0.2


@pytest.mark.parametrize("solver", SAMPLERS)
def test_each_generator_alone_decides_its_image(solver: str) -> None:
    pipe = pipeline()
    together = drawn(pipe, 4, solver=solver, corrector=1.0)
    alone = pipe(
        class_labels=[0], num_inference_steps=4, solver=solver, corrector=1.0, output_type="latent",
        generator=generators(1, first=2),
    ).images  # fmt: skip
    assert torch.equal(alone[0], together[2])
    assert not torch.equal(together[0], together[1])


def test_images_are_the_tokens_decoded_and_a_start_may_be_given() -> None:
    pipe = pipeline()
    tokens = drawn(pipe, 2)
    images = pipe(
        class_labels=[0, 0], num_inference_steps=4, output_type="pt", generator=generators(2)
    ).images
    assert torch.equal(images, (pipe.model.decode(tokens) / 2 + 0.5).clamp(0, 1))
    half = torch.full((1, SIDE, SIDE), V)
    half[:, :4] = 3
    kept = pipe(class_labels=0, num_inference_steps=4, latents=half, output_type="latent").images
    assert (kept[:, :4] == 3).all() and not (kept[:, 4:] == 3).all()
    asked: dict[str, Any] = {"class_labels": 0, "num_inference_steps": 4, "output_type": "latent"}
    same = [
        pipe(**asked, latents=half.to(kind), generator=generators(1)).images
        for kind in (torch.int16, torch.int64)
    ]
    assert torch.equal(*same)
    with pytest.raises(UserError, match=r"float32\n.*or to a checkpoint of tokens whole numbers \(B, h, w\)"):
        pipe(**asked, latents=half.float())
    with pytest.raises(UserError, match=r"latents have shape \(1, 1, 8, 8\)\n.*\(1, 8, 8\), tokens \(whole"):
        pipe(**asked, latents=half[:, None].float())


def test_tokens_are_no_latents_of_other_checkpoints(class_pipe: Any) -> None:
    tokens = torch.zeros(1, 4, 4, dtype=torch.int32)
    for call in (
        partial(class_pipe, class_labels=0, latents=tokens),
        partial(class_pipe.decode_latents, tokens),
    ):
        with pytest.raises(UserError, match=r"latents that are tokens have shape \(1, 4, 4\)"):
            call()


def image(count: int = 1, height: int = 2 * SIDE, width: int = 2 * SIDE) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("source", PATHS)
def test_what_is_known_is_kept_to_the_token_and_to_the_pixel(source: str) -> None:
    pipe, images = pipeline(LatentFlowInpaintPipeline, source), image(2)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 3:12, 5:] = 1.0  # cells 1 to 5, 2 to 7
    asked: dict[str, Any] = {
        "class_labels": 0,
        "image": images,
        "mask_image": mask,
        "num_images_per_prompt": 30,
    }
    asked |= {"num_inference_steps": 4, "guidance_scale": 1.0, "corrector": 1.0, "generator": generators(60)}
    tokens = pipe(**asked, output_type="latent").images.view(2, 30, SIDE, SIDE)
    hole = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    hole[1:6, 2:] = True
    known = pipe.model.known_tokens(2 * images - 1, mask.expand(2, -1, -1, -1))
    assert torch.equal(tokens[:, :, ~hole], known[:, None].expand_as(tokens)[:, :, ~hole])
    assert float(0.5 * (frequencies(tokens[:, :, hole]) - LOG_P[0].exp()).abs().sum()) < 0.05
    changed = images.clone()
    changed[:, :, 3:12, 5:] = 0.3  # no pixel under the mask counts
    assert torch.equal(pipe.model.known_tokens(2 * changed - 1, mask.expand(2, -1, -1, -1)), known)
    for more in ({}, {"padding_mask_crop": 2}, {"strength": 0.5}):
        pixels = pipe(**asked | {"generator": generators(60)}, **more, output_type="pt").images
        kept = (pixels * (1 - mask)).view(2, 30, 3, 16, 16)
        assert torch.equal(kept, (images * (1 - mask))[:, None].expand_as(kept))
    given = pipe(**asked, masked_image_latents=torch.full_like(known, 4), output_type="latent").images
    assert (given[:, ~hole] == 4).all()


def test_an_image_is_varied() -> None:
    pipe, images = pipeline(LatentFlowImg2ImgPipeline), image()
    own = tokenize(pipe.vae, 2 * images - 1)
    asked: dict[str, Any] = {
        "class_labels": 0,
        "image": images,
        "num_inference_steps": 10,
        "output_type": "latent",
    }
    asked["num_images_per_prompt"] = 40
    same = pipe(**asked, strength=0.0).images
    assert torch.equal(same, own.expand_as(same))
    third = pipe(**asked, strength=0.3, guidance_scale=1.0, generator=generators(40)).images
    # 0.7 of the tokens are the image's, and of the others those that are drawn so.
    expected = 0.7 + 0.3 * float(LOG_P[0].exp()[own].mean())
    assert abs(float((third == own).float().mean()) - expected) < 0.03


def test_a_callback_sees_replaces_and_interrupts() -> None:
    pipe, seen = pipeline(), []

    def look(pipe: Any, i: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((i, float(timestep), (tensors["latents"] == V).float().mean(), tensors["prediction"]))
        pipe.to_images(tensors["prediction"], "pt")
        if i == 1:
            pipe._interrupt = True
        return {"latents": torch.where(tensors["latents"] == V, V, 1)}

    names = ["latents", "prediction"]
    tokens = drawn(pipe, 3, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    assert [entry[:2] for entry in seen] == [(0, 1000.0), (1, 750.0)]
    assert seen[0][2] > seen[1][2] > 0
    assert {*tokens.unique().tolist()} == {
        0,
        1,
    }  # what was put there, and the likeliest in the place of masks
    with pytest.raises(UserError, match="latents that the callback returned after step 1"):
        drawn(pipe, 3, callback_on_step_end=lambda *_: {"latents": torch.zeros(3, 2, 2)})
    with pytest.raises(UserError, match="holds tokens from 9 to 9"):
        drawn(pipe, 3, callback_on_step_end=lambda *_: {"latents": torch.full((3, SIDE, SIDE), 9)})


def test_a_folder_opens_as_it_was_saved(tmp_path: Path) -> None:
    for source in PATHS:
        pipe = pipeline(source=source, network=TokenDiT)
        with torch.no_grad():
            for parameter in pipe.transformer.parameters():
                parameter.normal_(std=0.2)
        pipe.save_pretrained(tmp_path / source)
        again = LatentFlowPipeline.from_pretrained(tmp_path / source)
        again.set_progress_bar_config(disable=True)
        model = FlowModel.from_pretrained(tmp_path / source)
        assert isinstance(model, TokenModel) and isinstance(again.model, TokenModel)
        assert again.model.token_path == pipe.model.token_path
        assert again.model.classes == ("apple", "hat") and again.model.native_size == (16, 16)
        settings = {
            "class_labels": "hat",
            "num_images_per_prompt": 3,
            "output_type": "latent",
            "solver": "euler",
        }
        first, second = (one(**settings, generator=generators(3)).images for one in (pipe, again))
        assert torch.equal(first, second)
        narrow = LatentFlowPipeline.from_pretrained(tmp_path / source, dtype=torch.bfloat16)
        narrow.set_progress_bar_config(disable=True)
        assert narrow(class_labels="hat", output_type="pt").images.isfinite().all()
        shared = LatentFlowInpaintPipeline.from_pipe(again)
        assert isinstance(copy.copy(model), TokenModel)
        assert isinstance(shared.model, TokenModel) and shared.transformer is again.transformer


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    pipe = pipeline(network=TokenDiT)
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    index = json.loads(file.read_text())
    for value, what in (
        (None, "TokenDiT with token_path None"),
        ({"source": "mask"}, "token_path is"),
        (PATHS["mask"] | {"kappa": "lienar"}, r"unknown kappa 'lienar'"),
        (PATHS["mask"] | {"source": "masks"}, r"unknown token source 'masks'"),
        (PATHS["mask"] | {"source": ["mask"]}, "token_path: source is "),
        (PATHS["mask"] | {"kappa_options": None}, "token_path: kappa_options is None"),
        (PATHS["uniform"] | {"kappa_options": {"degree": [2]}}, "option 'degree' of kappa"),
        ("mask", "token_path is 'mask'"),
    ):
        changed = {key: entry for key, entry in index.items() if key != "token_path"}
        file.write_text(json.dumps(changed if value is None else changed | {"token_path": value}))
        with pytest.raises(UserError, match=what):
            LatentFlowPipeline.from_pretrained(tmp_path)
    file.write_text(json.dumps(index))
    tokenizer(codes=7).save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match=r"vocabulary is 5, the codes of the autoencoder are 7"):
        LatentFlowPipeline.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="knows no mask"):
        LatentFlowPipeline(tokenizer(), TokenDiT(V, V, transformer=TINY), token_path=PATHS["mask"])


def test_what_tokens_cannot_do_is_said() -> None:
    pipe = pipeline()
    for settings, what in (
        ({"solver": "heun"}, r"unknown sampler of tokens 'heun'"),
        ({"solver": "tuned"}, r"unknown sampler of tokens 'tuned'"),
        ({"sigmas": [1.0, 0.5]}, "no levels of noise"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"corrector": -1.0}, "corrector"),
        ({"latents": torch.zeros(1, 3, SIDE, SIDE)}, r"latents have shape \(1, 3, 8, 8\)"),
        ({"latents": torch.full((1, SIDE, SIDE), V + 1)}, "holds tokens from 6"),
    ):
        with pytest.raises(UserError, match=what):
            drawn(pipe, 1, **settings)
    with pytest.raises(UserError, match="lifted next, but"):
        drawn(pipeline(source="uniform"), 1, solver="confidence")
    for refused in (
        lambda: pipe.model.velocity(pipe.model.null(1)),
        lambda: LatentFlowEditPipeline.from_pipe(pipe)(image=image(), class_labels=0, source_class_labels=1),
    ):
        with pytest.raises(UserError, match="this checkpoint draws tokens"):
            refused()
    with pytest.raises(UserError, match="method 'repaint' with a checkpoint of tokens"):
        fill = LatentFlowInpaintPipeline.from_pipe(pipe)
        fill(class_labels=0, image=image(), mask_image=torch.ones(1, 1, 16, 16), method="repaint")


def test_the_bound_of_independent_tokens_is_their_entropy() -> None:
    """-log2 p of each token, on average: for masks and a posterior that does not look at the others it is exact."""
    pipe = pipeline()
    images = 2 * image(40) - 1
    sampler = Sampler(
        model=pipe.model, pipeline=pipe, condition_kind="class_labels", settings={}, seed=0, batch_size=16
    )
    found = validation_loss(sampler, ImageSet(images=images, captions=["hat"] * 40))
    expected = -LOG_P[1][tokenize(pipe.vae, images)].mean() / math.log(2)
    assert found["unit"] == "bits per token" and found["images"] == 40
    assert abs(found["value"] - float(expected)) < 5 * found["standard_error"]
    assert found["standard_error"] < 0.05 * found["value"]


def test_a_folder_says_what_it_can_without_being_opened(tmp_path: Path) -> None:
    pipe = pipeline(source="uniform", network=TokenDiT)
    for guidance in (None, 3.5):
        pipe.register_to_config(usual_guidance=guidance)
        pipe.save_pretrained(tmp_path)
        read = read_capabilities(str(tmp_path))
        assert read == model_capabilities(pipe.model)
        assert read is not None and read.guidance == (guidance or 2.0) == read.edit_guidance
    assert read.labels == ("apple", "hat") and not read.has_velocity
    # what the page offers: no sampler that this source, which has no masks, refuses
    assert InferenceServer(str(tmp_path), "cpu").choices["solver"] == ["exact", "euler", "tau-leaping"]
    with pytest.raises(UserError, match="lifted next, but"):
        check_solver(pipe.model, "halton")


def in_groups(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    by_group(offload_type="leaf_level", exclude_modules=kept_whole(pipe))(pipe, monkeypatch)


@pytest.mark.parametrize("offload", [sequential, by_model, in_groups])
def test_offloaded_weights_draw_and_fill_the_same(offload: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, mask = pipeline(network=TokenDiT), torch.zeros(1, 1, 16, 16)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.normal_(std=0.2)
    mask[..., 4:12, 4:12] = 1.0
    asked: dict[str, Any] = {"class_labels": 0, "num_inference_steps": 3, "output_type": "pt"}

    def draw() -> tuple[Tensor, Tensor]:
        fill = LatentFlowInpaintPipeline.from_pipe(pipe)
        fill.set_progress_bar_config(disable=True)
        drawn = pipe(**asked, generator=generators(1)).images
        return drawn, fill(**asked, image=image(), mask_image=mask, generator=generators(1)).images

    expected = draw()
    offload(pipe, monkeypatch)
    assert all(map(torch.equal, draw(), expected))


def test_other_checkpoints_take_no_settings_of_tokens(class_pipe: Any) -> None:
    for name, value in (("temperature", 0.5), ("corrector", 1.0)):
        with pytest.raises(UserError, match=rf"{name} is {value:g}, and this checkpoint draws no tokens"):
            class_pipe(class_labels=0, **{name: value})
    with pytest.raises(UserError, match="halton"):
        class_pipe(class_labels=0, solver="halton")


def test_a_misspelt_sampler_is_guessed_among_those_of_tokens(class_pipe: Any) -> None:
    with pytest.raises(UserError, match="did you mean 'halton'"):
        pipeline()(class_labels="apple", solver="halto")
    with pytest.raises(UserError, match="solver 'halton' is of checkpoints of tokens"):
        class_pipe(class_labels="apple", solver="halton")
