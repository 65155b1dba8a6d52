"""Models that draw from images: as their stock pipelines do, and from the images that they are given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latentflow import LatentFlowEditPipeline, LatentFlowInpaintPipeline, LatentFlowPipeline
from latentflow.errors import UserError
from latentflow.families import FAMILIES
from latentflow.flow import integrate

from .tiny import TINY, WITH_REFERENCES, checkpoint

SIDE, STEPS = 32, 3
#: families that draw from images -> the images of one prompt
IMAGES = {
    "Flux2KleinPipeline": 2,
    "Flux2Pipeline": 2,
    "FluxKontextPipeline": 1,
    "QwenImageEditPipeline": 1,
    "QwenImageEditPlusPipeline": 2,
    "LongCatImageEditPipeline": 1,
    "BriaFiboEditPipeline": 2,
}
SEVERAL = [name for name, count in IMAGES.items() if count > 1]
PROMPTS = ["make it a red apple", "a big green tree over the house"]
#: families whose prompts are captions in JSON
IN_JSON = ("BriaFiboEditPipeline",)
each_family = pytest.mark.parametrize("name", IMAGES)


pytestmark = pytest.mark.usefixtures("small_megapixel")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image(seed: int = 0, height: int = 64, width: int = 64) -> Image.Image:
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def prompts(name: str) -> list[str]:
    return [json.dumps({"edit_instruction": text}) for text in PROMPTS] if name in IN_JSON else PROMPTS


def images_of(name: str, seed: int = 0) -> list[Image.Image]:
    return [image(seed + number) for number in range(IMAGES[name])]


def opened(name: str) -> Any:
    options = {**TINY, **WITH_REFERENCES}[name].call
    area = {"max_area": SIDE * SIDE} if "max_area" in options else {}
    return FAMILIES[name](checkpoint(name), **{**options, **area})


def stock(name: str, prompt: str, given: list[Image.Image], seed: int = 0, **options: Any) -> Tensor:
    """Return the stock pipeline's image (1, 3, H, W) in [0, 1]."""
    model = opened(name)
    size = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "output_type": "pt"}
    shown = given if len(given) > 1 else given[0]
    call = {**model.options, **size, **options}
    if "LongCat" in name:  # whose size is always the image's
        del call["height"], call["width"]
    drawn: Tensor = model.pipeline(image=shown, prompt=prompt, generator=seeded(seed), **call).images
    return drawn


def own_guidance(name: str) -> dict[str, Any]:
    return {"negative_prompt": ""} if "Qwen" in name else {}


def drawn(model: Any, velocity: Any, seeds: list[int]) -> Tensor:
    times = model.time_grid(STEPS, SIDE, SIDE)
    noise = model.noise(len(seeds), SIDE, SIDE, [seeded(seed) for seed in seeds])
    return integrate(velocity, model.begin(noise, times), times, "euler")


@each_family
@pytest.mark.parametrize("guided", [False, True])
def test_it_draws_what_the_stock_pipeline_does(name: str, guided: bool) -> None:
    model, given = opened(name), images_of(name)
    scale = None if guided else 1.0
    velocity = model.velocity(model.encode_prompt(prompts(name)[:1], images=given), scale)
    ours = (model.decode(drawn(model, velocity, [0])) / 2.0 + 0.5).clamp(0.0, 1.0)
    options = own_guidance(name) if guided else {model.guidance_argument: 1.0}
    theirs = stock(name, prompts(name)[0], given, **options)
    assert theirs.std() > 0.05, "a flat image hides differences"
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5)


@each_family
def test_what_is_wrong_is_seen(name: str) -> None:
    """The comparison would fail with another image or prompt, without the image, the other sign, reversed time."""
    model, given = opened(name), images_of(name)
    right = model.velocity(model.encode_prompt(prompts(name)[:1], images=given), 1.0)
    expected = drawn(model, right, [0])
    wrong = {
        "image": model.velocity(model.encode_prompt(prompts(name)[:1], images=images_of(name, 7)), 1.0),
        "prompt": model.velocity(model.encode_prompt(prompts(name)[1:], images=given), 1.0),
        "sign": lambda x, t: -right(x, t),
        "time": lambda x, t: right(x, 1.0 - t),
        "guidance": model.velocity(model.encode_prompt(prompts(name)[:1], images=given), 7.5),
    }
    if not model.needs_images:
        wrong["no image"] = model.velocity(model.encode_prompt(prompts(name)[:1]), 1.0)
    if name in SEVERAL:
        wrong["order"] = model.velocity(model.encode_prompt(prompts(name)[:1], images=given[::-1]), 1.0)
    for what, velocity in wrong.items():
        assert (drawn(model, velocity, [0]) - expected).abs().max() > 1e-4, what


@each_family
def test_a_row_is_what_it_is_alone(name: str) -> None:
    """Rows of a batch with their own prompts, of different lengths, and their own images do not see each other."""
    model = opened(name)
    rows = [
        model.encode_prompt([prompt], images=images_of(name, 3 * seed))
        for seed, prompt in enumerate(prompts(name))
    ]
    both = drawn(model, model.velocity(type(rows[0]).cat(rows)), [0, 1])
    for seed, row in enumerate(rows):
        alone = drawn(model, model.velocity(row), [seed])
        torch.testing.assert_close(
            both[seed : seed + 1], alone, rtol=0.0, atol=1e-5 * float(both.abs().max())
        )


@pytest.mark.parametrize("name", [name for name in IMAGES if name in WITH_REFERENCES])
def test_a_negative_prompt_sees_the_images(name: str) -> None:
    model, given = opened(name), images_of(name)
    pipe = LatentFlowEditPipeline(model)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": STEPS, "height": SIDE, "width": SIDE, "generator": seeded()}
    ours = pipe(
        prompts(name)[0],
        given[0],
        reference_images=given[1:] or None,
        negative_prompt="a hat",
        **call,
        output_type="pt",
    ).images
    theirs = stock(name, prompts(name)[0], given, negative_prompt="a hat")
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5)


@each_family
def test_an_edit_draws_what_the_stock_pipeline_does(name: str) -> None:
    """By default: method "reference", the model's own guidance; further images are beside the one that is edited."""
    model, given = opened(name), images_of(name)
    pipe = LatentFlowEditPipeline(model)
    pipe.set_progress_bar_config(disable=True)
    generators = [seeded(0), seeded(1)]
    edited = pipe(
        prompts(name),
        given[0],
        reference_images=given[1:] or None,
        num_inference_steps=STEPS,
        height=SIDE,
        width=SIDE,
        generator=generators,
        output_type="pt",
    ).images
    theirs = [
        stock(name, prompt, given, seed, **own_guidance(name)) for seed, prompt in enumerate(prompts(name))
    ]
    torch.testing.assert_close(edited, torch.cat(theirs), rtol=0.0, atol=1e-5)


@each_family
def test_the_size_is_the_stock_pipeline_s(name: str) -> None:
    """Where nobody asks for one. Kontext's own pipeline draws squares; ours keeps the shape of the image."""
    pipe, given = LatentFlowEditPipeline(opened(name)), image(0, 71, 98)
    pipe.set_progress_bar_config(disable=True)
    edited = pipe(prompts(name)[0], given, num_inference_steps=2, generator=seeded()).images[0]
    if "Kontext" in name:
        assert edited.size == (36, 24)  # of an area that `max_area` bounds
        return
    stock_pipe, options = checkpoint(name), pipe.model.options
    call = {**options, "num_inference_steps": 2, "generator": seeded()}
    assert edited.size == stock_pipe(image=given, prompt=prompts(name)[0], **call).images[0].size


def test_kontext_draws_at_a_size_that_it_was_trained_at() -> None:
    model = FAMILIES["FluxKontextPipeline"](checkpoint("FluxKontextPipeline"))
    assert model.reference_size(image(0, 64, 64)) == (1024, 1024)
    assert model.reference_size(image(0, 50, 100)) == (720, 1456)
    smaller = FAMILIES["FluxKontextPipeline"](checkpoint("FluxKontextPipeline"), max_area=512 * 512)
    assert smaller.reference_size(image(0, 64, 64)) == (512, 512)
    as_it_is = FAMILIES["FluxKontextPipeline"](checkpoint("FluxKontextPipeline"), _auto_resize=False)
    assert as_it_is.reference_size(image(0, 71, 98)) == (68, 96)


def test_fibo_draws_at_a_size_that_it_was_trained_at() -> None:
    model = FAMILIES["BriaFiboEditPipeline"](checkpoint("BriaFiboEditPipeline"))
    assert model.reference_size(image(0, 71, 98)) == (832, 1248)


def test_flux_2_sees_a_large_image_smaller() -> None:
    assert opened("Flux2KleinPipeline").reference_size(image(0, 1000, 4000)) == (512, 2048)


@each_family
def test_an_edit_within_a_mask_keeps_every_other_pixel(name: str) -> None:
    pipe, given = LatentFlowEditPipeline(opened(name)), image(0, 70, 66)
    pipe.set_progress_bar_config(disable=True)
    mask = np.zeros((70, 66), np.uint8)
    mask[10:41, 20:50] = 255
    edited = pipe(
        prompts(name)[0], given, mask_image=Image.fromarray(mask), num_inference_steps=2, generator=seeded()
    ).images[0]
    pixels, kept = np.array(edited), mask == 0
    assert np.array_equal(pixels[kept], np.array(given)[kept])
    assert (pixels[~kept] != np.array(given)[~kept]).mean() > 0.9


@pytest.mark.parametrize("name", ["Flux2KleinPipeline", "FluxKontextPipeline"])
def test_without_images_it_draws_from_prompts(name: str) -> None:
    """And edits as any other model, where another method is asked for."""
    model = opened(name)
    drawing, edit = LatentFlowPipeline(model), LatentFlowEditPipeline(model)
    for pipe in (drawing, edit):
        pipe.set_progress_bar_config(disable=True)
    assert drawing(PROMPTS[0], height=SIDE, width=SIDE, num_inference_steps=1).images[0].size == (SIDE, SIDE)
    edited = edit(PROMPTS[0], image(), source_prompt="a hat", method="flowedit", num_inference_steps=2).images
    assert edited[0].size == (64, 64)


def test_images_as_tensors_are_the_same_images() -> None:
    model, given = opened("Flux2KleinPipeline"), image()
    pixels = torch.from_numpy(np.array(given)).permute(2, 0, 1) / 255.0 * 2.0 - 1.0
    rows = [model.encode_prompt(PROMPTS[:1], images=[each]) for each in (given, pixels)]
    assert torch.equal(rows[0].kept["references"][0], rows[1].kept["references"][0])


def test_the_stock_pipeline_is_left_as_it_was() -> None:
    model = opened("Flux2KleinPipeline")
    before = {**vars(model.pipeline)}
    model.encode_prompt(PROMPTS[:1], images=[image()])
    assert vars(model.pipeline).keys() == before.keys()
    assert not model.network._forward_pre_hooks


# ---------------------------------------------------------------- the command


def flags(name: str, folder: Path) -> list[str]:
    options = [f"{key}={json.dumps(value)}" for key, value in opened(name).options.items()]
    return ["--checkpoint", str(folder), *(["--family-options", *options] if options else []), "--steps", "2"]


@pytest.mark.parametrize("name", ["Flux2KleinPipeline", "FluxKontextPipeline", "QwenImageEditPlusPipeline"])
def test_the_command(
    name: str,
    folders: Callable[[str], Path],
    load_program: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    image(0).save("a.png")
    image(1, 64, 80).save("b.png")
    edit, common = load_program("edit"), flags(name, folders(name))
    edit.main(["a.png", "make it red", "-n", "2", "-o", "out.png", *common])
    first, second = (np.array(Image.open(f"out-{number}.png")) for number in (1, 2))
    assert first.shape == second.shape and not np.array_equal(first, second)
    edit.main(["a.png", "make it red", "--box", "8", "8", "40", "40", "--grid", "-o", "boxed.png", *common])
    assert Image.open("boxed.png").size == (128, 64)
    if name in SEVERAL:
        edit.main(["a.png", "make it red", "--reference", "b.png", "-o", "both.png", *common])
        assert not np.array_equal(np.array(Image.open("both.png")), first)
        with pytest.raises(UserError, match="--method flowedit does not use --reference"):
            edit.main(["a.png", "red", "--reference", "b.png", "--method", "flowedit", *common])
    with pytest.raises(UserError, match=r"source_prompt \(--from\) is given, but method 'reference'"):
        edit.main(["a.png", "make it red", "--from", "a hat", *common])


def test_generate_names_the_command_that_edits(
    folders: Callable[[str], Path], load_program: Callable[[str], Any], tmp_path: Path
) -> None:
    name = "QwenImageEditPipeline"
    line = ["a red apple", "--height", "32", "--width", "32", "-o", str(tmp_path / "out.png")]
    with pytest.raises(UserError, match="latentflow edit IMAGE PROMPT"):
        load_program("generate").main([*line, *flags(name, folders(name))])


# ---------------------------------------------------------------- bad input


def test_bad_images() -> None:
    model = opened("QwenImageEditPipeline")
    with pytest.raises(UserError, match="draws from an image, and there is none"):
        model.encode_prompt(PROMPTS)
    with pytest.raises(UserError, match="edits an image by instruction, and does nothing else"):
        LatentFlowInpaintPipeline(model)(PROMPTS[0], image=image(), mask_image=image().convert("L"))
    with pytest.raises(
        UserError, match=r"2 images are given to a QwenImageEditPipeline\nIt draws from 1 image"
    ):
        model.encode_prompt(PROMPTS, images=[image(), image(1)])
    with pytest.raises(UserError, match=r"a Tensor of shape \(1, 3, 8, 8\)"):
        model.encode_prompt(PROMPTS, images=[torch.zeros(1, 3, 8, 8)])
    with pytest.raises(UserError, match="one of the images is a str"):
        model.encode_prompt(PROMPTS, images=["a.png"])
    klein = opened("Flux2KleinPipeline")
    with pytest.raises(UserError, match="Image too small"):
        klein.encode_prompt(PROMPTS[:1], images=[image(0, 16, 64)])
    rows = [klein.encode_prompt(PROMPTS[:1], images=[image(0, 64, width)]) for width in (64, 80)]
    with pytest.raises(UserError, match="differ in size or number"):
        klein.velocity(type(rows[0]).cat(rows))


def test_bad_edits() -> None:
    text_only = LatentFlowEditPipeline(FAMILIES["FluxPipeline"](checkpoint("FluxPipeline")))
    with pytest.raises(UserError, match="this model does not draw from images"):
        text_only(PROMPTS[0], image(), method="reference")
    with pytest.raises(UserError, match="reference_images are given to method 'flowedit'"):
        text_only(PROMPTS[0], image(), reference_images=[image(1)])
    with pytest.raises(UserError, match="images are given to a FluxModel"):
        text_only.model.encode_prompt(PROMPTS, images=[image()])
    edit = LatentFlowEditPipeline(opened("Flux2KleinPipeline"))
    for name, value in {"strength": 0.5, "source_prompt": "a hat", "draws": 2}.items():
        with pytest.raises(
            UserError, match=rf"{name}.* is given, but method 'reference' has no such setting"
        ):
            edit(PROMPTS[0], image(), **{name: value})
    with pytest.raises(UserError, match="height 66 is not a multiple of 4"):
        edit(PROMPTS[0], image(), height=66)
    with pytest.raises(UserError, match="reference_images is str"):
        edit(PROMPTS[0], image(), reference_images=["a.png"])
    with pytest.raises(UserError, match="feather is given without a mask_image"):
        edit(PROMPTS[0], image(), feather=2)
