"""Sizes and crops as a condition: the same in every evaluation of every pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from latentflow.errors import UserError
from latentflow.models import DiT
from latentflow.pipeline import LatentFlowPipeline
from latentflow.pipeline.edit import LatentFlowEditPipeline
from latentflow.pipeline.img2img import LatentFlowImg2ImgPipeline
from latentflow.pipeline.inpaint import LatentFlowInpaintPipeline

Assemble = Callable[[Any], LatentFlowPipeline]
STEPS: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent"}


def network(**more: Any) -> DiT:
    return DiT(in_channels=2, width=16, depth=1, heads=2, sample_size=4, size_conditioning=True, **more)


def calls(images: Callable[..., Tensor], asked: dict[str, Any]) -> dict[str, Callable[[Any], Any]]:
    """Every way to use a pipeline, each of 8 x 12 pixels."""
    one, two = images(1, 8, 12), images(2, 8, 12)
    mask = torch.zeros(1, 1, 8, 12)
    mask[..., 2:6] = 1
    size = {"height": 8, "width": 12}
    first = {name: value[:1] for name, value in asked.items()}

    def painted(pipe: Any, **more: Any) -> Any:
        painter = LatentFlowInpaintPipeline.from_pipe(pipe)
        return painter(**first, image=one, mask_image=mask, **STEPS, **more)

    def edited(pipe: Any) -> LatentFlowEditPipeline:
        editor: LatentFlowEditPipeline = LatentFlowEditPipeline.from_pipe(pipe)
        return editor

    ways: dict[str, Callable[[Any], Any]] = {
        "drawn": lambda pipe: pipe(**asked, **size, **STEPS),
        "drawn anew": lambda pipe: LatentFlowImg2ImgPipeline.from_pipe(pipe)(**first, image=one, **STEPS),
        "painted": painted,
        "painted large": lambda pipe: painted(pipe, padding_mask_crop=2, **size),
        "inverted": lambda pipe: edited(pipe).invert(one, num_inference_steps=2, **first),
        "inverted without a condition": lambda pipe: edited(pipe).invert(one, num_inference_steps=2),
        "interpolated": lambda pipe: edited(pipe).interpolate(frames=2, **asked, **size, **STEPS),
        "between images": lambda pipe: edited(pipe).interpolate(image=two, frames=2, **asked, **STEPS),
    }
    if asked:
        ways["edited"] = lambda pipe: edited(pipe)(**first, image=one, **STEPS)
        ways["edited from"] = lambda pipe: edited(pipe)(
            **first, image=one, source_class_labels=[2], method="inversion", **STEPS
        )
    return ways


@pytest.mark.parametrize("classes", [None, 3])
def test_every_evaluation_has_the_size_that_is_drawn(
    classes: int | None, assemble: Assemble, images: Callable[..., Tensor]
) -> None:
    pipe = assemble(network(num_classes=classes))
    heard: list[Tensor | None] = []

    def hear(_: Any, arguments: tuple[Any, ...]) -> None:
        cond = arguments[2]
        heard.append(None if cond is None else cond.sizes)

    pipe.transformer.register_forward_pre_hook(hear)
    asked = {} if classes is None else {"class_labels": [0, 1]}
    for way, use in calls(images, asked).items():
        heard.clear()
        use(pipe)
        assert heard, way
        for sizes in heard:
            assert sizes is not None, way
            assert (sizes == torch.tensor([8.0, 12, 0, 0, 8, 12])).all(), way


def test_half_precision_hears_the_same_sizes(assemble: Assemble) -> None:
    pipe = assemble(network()).to(torch.bfloat16)
    heard: list[Tensor] = []
    pipe.transformer.register_forward_pre_hook(lambda _, arguments: heard.append(arguments[2].sizes))
    pipe(original_size=(1023, 3007), crops_coords_top_left=(0, 1001), **STEPS)
    assert heard[0][0].tolist() == [1023, 3007, 0, 1001, 8, 8]


@pytest.mark.parametrize(
    "wrong", [{"original_size": 512}, {"original_size": (0, 8)}, {"target_size": (8, 8, 8)},
              {"crops_coords_top_left": (-1, 0)}],
)  # fmt: skip
def test_what_is_no_size_is_refused_in_words(wrong: dict[str, Any], assemble: Assemble) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong))} is .*\n.*Give two numbers of pixels"):
        assemble(network())(**wrong, **STEPS)
