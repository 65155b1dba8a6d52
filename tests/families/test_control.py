"""Families whose network takes an image in extra channels: with its mask, or as control."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latentflow import FlowModel, LatentFlowEditPipeline, LatentFlowInpaintPipeline, LatentFlowPipeline
from latentflow.errors import UserError
from latentflow.families import family_of
from latentflow.families.diffusion import DiffusionModel, StableDiffusionModel
from latentflow.flow import INPAINTING, integrate

from .test_pretrained import PROMPTS, STEPS, seeded
from .tiny import WITH_EXTRA_CHANNELS, checkpoint

SIDE = 16
MASKED = [name for name in WITH_EXTRA_CHANNELS if "Fill" in name or "Inpaint" in name]
CONTROLLED = [name for name in WITH_EXTRA_CHANNELS if name not in MASKED]
each = pytest.mark.parametrize("name", WITH_EXTRA_CHANNELS)
Program = Callable[[str], Any]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@cache
def opened(name: str) -> Any:
    family: Any = family_of(name)
    return family(checkpoint(name), **WITH_EXTRA_CHANNELS[name].call)


def images(seed: int = 0, count: int = 2) -> Tensor:
    """Return images (P, 3, H, W) in [0, 1]."""
    return torch.rand(count, 3, SIDE, SIDE, generator=seeded(seed))


def masks(shift: int = 0, count: int = 2) -> Tensor:
    """Return masks (P, 1, H, W), whose holes end within cells of the latent and differ."""
    found = torch.zeros(count, 1, SIDE, SIDE)
    for row in range(count):
        found[row, :, 1 + 3 * row : 10, 3 : 12 - row + shift] = 1.0
    return found


def arrays(values: Tensor) -> Any:
    return values.permute(0, 2, 3, 1).numpy()


def rows_of(name: str, prompts: list[str] = PROMPTS, seed: int = 0, shift: int = 0) -> Any:
    rows, count = opened(name).encode_prompt(prompts), len(prompts)
    given = 2.0 * images(seed, count) - 1.0
    return rows.with_known(given, masks(shift, count)) if name in MASKED else rows.with_control(given)


def off(name: str) -> float | None:
    return None if opened(name).embeds_guidance else 1.0


def stock(name: str, scale: float | None) -> Tensor:
    """Return the stock pipeline's images (B, 3, H, W) in [0, 1]; each alone, since CogView4 pads a batch."""
    pipe, model, drawn = checkpoint(name), opened(name), []
    call: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "output_type": "pt",
        **WITH_EXTRA_CHANNELS[name].call,
    }
    call |= {} if scale is None else {"guidance_scale": scale}
    if name != "StableDiffusionInstructPix2PixPipeline":
        call |= {"height": SIDE, "width": SIDE}
    for row, prompt in enumerate(PROMPTS):
        noise = model.noise(1, SIDE, SIDE, seeded(row))
        given = arrays(images())[row : row + 1]
        if name in MASKED:
            level = (masks()[row, 0] * 255).byte().numpy()
            asked = {"image": given, "mask_image": Image.fromarray(level), "strength": 1.0}
        else:
            asked = {"image" if "Pix2Pix" in name else "control_image": given}
        latents = model.pack(noise) if "Flux" in name else noise
        drawn.append(pipe(prompt=[prompt], latents=latents, **asked, **call).images)
    return torch.cat(drawn)


def latents_of(name: str, rows: Any, scale: float | None, negative: Any = None) -> Tensor:
    """Return latents (B, C, h, w) by Euler's method on the scheduler's own times, from the noise of `stock`."""
    model = opened(name)
    times = model.time_grid(STEPS, SIDE, SIDE)
    if isinstance(model, DiffusionModel):  # DDIM ends with a rest of noise
        times = torch.cat([times[:-1], model.time_of(torch.zeros(1))])
    noise = model.noise(len(rows), SIDE, SIDE, [seeded(row) for row in range(len(rows))])
    velocity = model.velocity(rows, scale, negative, times=times)
    x1 = integrate(velocity, model.begin(noise, times), times, "euler")
    return x1 / model._norm(times[-1]) if isinstance(model, DiffusionModel) else x1


@each
@pytest.mark.parametrize("guided", [False, True])
def test_it_draws_what_the_stock_pipeline_does(name: str, guided: bool) -> None:
    """And it would be seen if it took another image, another mask or the other prompt."""
    scale = None if guided else off(name)
    theirs = stock(name, scale)
    assert theirs.std() > 0.05, "a flat image hides differences"

    def ours(rows: Any) -> Tensor:
        return (opened(name).decode(latents_of(name, rows, scale)) / 2.0 + 0.5).clamp(0.0, 1.0)

    torch.testing.assert_close(ours(rows_of(name)), theirs, rtol=0.0, atol=1e-5)
    wrong = {"image": rows_of(name, seed=1), "prompt": rows_of(name, [*reversed(PROMPTS)])}
    if name in MASKED:
        wrong["mask"] = rows_of(name, shift=4)
    for what, rows in wrong.items():
        assert (ours(rows) - theirs).abs().max() > 1e-3, what


@each
def test_a_row_is_what_it_is_alone(name: str) -> None:
    """Two prompts of different lengths with two images are each drawn as alone."""
    both, model = rows_of(name), opened(name)
    x, t = model.noise(2, SIDE, SIDE, seeded()), torch.tensor([0.3, 0.6])
    together = model.velocity(both)(x, t)
    for row in range(2):
        alone = model.velocity(both[row])(x[row : row + 1], t[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@each
def test_it_computes_in_half_precision(name: str) -> None:
    exact = opened(name)
    model = type(exact)(deepcopy(checkpoint(name)).to(dtype=torch.bfloat16), **WITH_EXTRA_CHANNELS[name].call)
    rows, given = model.encode_prompt(PROMPTS), 2.0 * images() - 1.0
    rows = rows.with_known(given, masks()) if name in MASKED else rows.with_control(given)
    x, t = model.noise(2, SIDE, SIDE, seeded()), torch.tensor(0.5)
    v, expected = model.velocity(rows)(x, t), exact.velocity(rows_of(name))(x, t)
    assert v.dtype == torch.float32
    assert float((v - expected).norm() / expected.norm()) < 0.3


@each
def test_rows_share_an_image(name: str) -> None:
    """Row b is of image b * P // B."""
    rows, given = opened(name).encode_prompt([*PROMPTS, *PROMPTS]), 2.0 * images() - 1.0
    kept = (rows.with_known(given, masks()) if name in MASKED else rows.with_control(given)).kept
    for value in kept.values():
        assert torch.equal(value[0], value[1]) and torch.equal(value[2], value[3])
        assert not torch.equal(value[0], value[2])
    with pytest.raises(UserError, match="3 images for 4 rows"):
        given = images(count=3)
        _ = rows.with_known(given, masks(count=3)) if name in MASKED else rows.with_control(given)


@each
def test_rows_without_the_image_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="rows have no images"):
        opened(name).velocity(opened(name).encode_prompt(PROMPTS))
    with pytest.raises(UserError, match="images of"):
        rows = rows_of(name)
        opened(name).velocity(rows)(opened(name).noise(2, 32, SIDE), torch.tensor(0.5))


def test_masks_of_another_size_are_refused() -> None:
    rows = opened("FluxFillPipeline").encode_prompt(PROMPTS)
    with pytest.raises(UserError, match=r"masks have shape \(2, 1, 8, 16\)"):
        rows.with_known(images(), masks()[:, :, :8])
    with pytest.raises(UserError, match="no known images"):
        opened("FluxFillPipeline").known_latents(rows)


@pytest.mark.parametrize("name", [name for name in CONTROLLED if "Pix2Pix" in name])
def test_two_guidance_scales(name: str) -> None:
    """v = none + s (prompted - image) + s_i (image - none), Brooks et al. 2022, equation 3."""
    family: Any = family_of(name)
    model = family(checkpoint(name), image_guidance_scale=2.5)
    rows, null = rows_of(name), model.null(2)
    x, t = model.noise(2, SIDE, SIDE, seeded()), torch.tensor([0.3, 0.6])
    prompted, image = (
        model.velocity(part.with_control(2.0 * images() - 1.0), 1.0)(x, t) for part in (rows, null)
    )
    blind = {"control": torch.zeros_like(rows.kept["control"])}
    none = model.velocity(type(rows)(model, null.values, blind), 1.0)(x, t)
    expected = none + 7.0 * (prompted - image) + 2.5 * (image - none)
    torch.testing.assert_close(model.velocity(rows, 7.0)(x, t), expected, rtol=1e-4, atol=1e-4)
    still = model.velocity(rows, 7.0)(x, torch.tensor(0.4))  # one time for all
    torch.testing.assert_close(
        still, model.velocity(rows, 7.0)(x, torch.full((2,), 0.4)), rtol=1e-4, atol=1e-4
    )
    outside = model.velocity(rows, 7.0, interval=(0.5, 0.55))(x, t)
    torch.testing.assert_close(outside, prompted, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="3 negative rows for 2 rows"):
        model.velocity(rows, 7.0, model.null(3))


# ---------------------------------------------------------------- our pipelines


def over(kind: Any, name: str) -> Any:
    pipe = kind(opened(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("method", [None, *INPAINTING])
@pytest.mark.parametrize("name", MASKED)
def test_kept_pixels_are_kept(name: str, method: str | None) -> None:
    filled = over(LatentFlowInpaintPipeline, name)(
        PROMPTS, image=images(), mask_image=masks(), method=method, num_inference_steps=2, generator=seeded(),
        output_type="pt",
    ).images  # fmt: skip
    kept = (masks() == 0).expand_as(filled)
    assert torch.equal(filled[kept], images()[kept]) and not torch.equal(filled, images())


@pytest.mark.parametrize("name", MASKED)
def test_a_call_fills_as_the_model_does(name: str) -> None:
    """By default with the model's own solver, steps and guidance under the mask: as its stock pipeline."""
    pipe, model = over(LatentFlowInpaintPipeline, name), opened(name)
    noise = [seeded(row) for row in range(2)]
    latents = pipe(
        PROMPTS,
        image=images(),
        mask_image=masks(),
        num_inference_steps=STEPS,
        generator=noise,
        output_type="latent",
    ).images
    times = model.time_grid(STEPS, SIDE, SIDE)
    x0 = model.begin(model.noise(2, SIDE, SIDE, [seeded(row) for row in range(2)]), times)
    expected = integrate(model.velocity(rows_of(name)), x0, times, "euler")
    torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONTROLLED)
def test_a_call_draws_under_a_control_image(name: str) -> None:
    pipe, model = over(LatentFlowPipeline, name), opened(name)
    asked = {"height": SIDE, "width": SIDE, "num_inference_steps": 2, "output_type": "latent"}

    def drawn(prompt: Any, control: Any, count: int = 1) -> Tensor:
        noise = [seeded(row) for row in range(2)]
        found: Tensor = pipe(
            prompt, control_image=control, generator=noise, num_images_per_prompt=count, **asked
        ).images
        return found

    times = model.time_grid(2, SIDE, SIDE)
    x0 = model.begin(model.noise(2, SIDE, SIDE, [seeded(row) for row in range(2)]), times)
    expected = integrate(model.velocity(rows_of(name)), x0, times, "euler")
    torch.testing.assert_close(drawn(PROMPTS, images()), expected, rtol=1e-5, atol=1e-5)
    shared = drawn(PROMPTS[0], images()[:1], 2)  # one image for both
    torch.testing.assert_close(shared[:1], expected[:1], rtol=1e-4, atol=1e-5)
    large = torch.nn.functional.interpolate(images(), scale_factor=2.0)
    assert drawn(PROMPTS, arrays(large)).isfinite().all()  # resized to what is drawn


@pytest.mark.parametrize("name", CONTROLLED)
def test_the_size_is_the_stock_pipeline_s(name: str) -> None:
    """Stable Diffusion's InstructPix2Pix keeps the image's; the others have the size of their training."""
    pipe, photo = over(LatentFlowPipeline, name), Image.new("RGB", (27, 37), "red")
    if name != "StableDiffusionInstructPix2PixPipeline":
        assert pipe.image_size(control_image=photo) == pipe.model.native_size
        return
    drawn = pipe(PROMPTS[0], control_image=photo, num_inference_steps=1).images[0]
    stock_pipe = checkpoint(name)
    assert drawn.size == stock_pipe(PROMPTS[0], image=photo, num_inference_steps=1).images[0].size
    assert drawn.size[0] < drawn.size[1]
    for named in ({"image": photo}, [{"image": photo}]):  # as --control image=FILE gives it
        assert pipe(PROMPTS[0], control_image=named, num_inference_steps=1).images[0].size == drawn.size
    with pytest.raises(UserError, match="each kind differ in number"):
        pipe(PROMPTS, control_image=[{"image": photo}, {"image": photo, "labels": photo}])
    assert pipe.image_size(32, None, control_image=photo) == (32, 24)
    assert pipe.image_size(32, 16, control_image=photo) == (32, 16)
    assert pipe.image_size(control_image=Image.new("RGB", (1, 1)))[0] == pipe.model.size_multiple
    with pytest.raises(UserError, match="several sizes"):
        pipe(PROMPTS, control_image=[photo, photo.transpose(Image.Transpose.ROTATE_90)])


# ---------------------------------------------------------------- what opens, and what is refused


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_the_network_s_channels_choose(name: str) -> None:
    """One pipeline class of diffusers has networks with and without a mask; its name does not say which."""
    kind = getattr(diffusers, name.replace("Pipeline", "InpaintPipeline"))
    plain: Any = family_of(kind.__name__)
    base = plain(kind(**checkpoint(name).components))
    assert not base.takes_masks and base.image_input == "none" and type(base.pipeline).__name__ == name
    trained = opened(kind.__name__)
    assert trained.takes_masks and trained.image_input == "mask" and type(trained.pipeline) is kind
    assert trained.usual_guidance == 7.5 and trained.native_size == base.native_size
    with pytest.raises(UserError, match="9 channels, 4 of them"):
        plain(getattr(diffusers, name)(**{**checkpoint(name).components, "unet": trained.network}))


def test_saved_weights_of_inpainting_open(tmp_path: Path) -> None:
    opened("StableDiffusionInpaintPipeline").save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "model_index.json").read_text())["_class_name"]
        == "StableDiffusionInpaintPipeline"
    )
    model = FlowModel.from_pretrained(tmp_path)
    assert type(model) is StableDiffusionModel and model.takes_masks
    assert model.network_alone().takes_masks


@pytest.mark.parametrize("name", MASKED)
def test_negative_prompts(name: str) -> None:
    call = {
        "image": images()[:1],
        "mask_image": masks()[:1],
        "num_inference_steps": 1,
        "negative_prompt": "a hat",
    }
    pipe = over(LatentFlowInpaintPipeline, name)
    if not opened(name).embeds_guidance:
        assert pipe(PROMPTS[0], **call).images
        return
    with pytest.raises(UserError, match="has no negative prompts"):
        pipe(PROMPTS[0], **call)


def test_calls_that_cannot_use_such_a_model_say_so() -> None:
    fill, control = "FluxFillPipeline", "FluxControlPipeline"
    with pytest.raises(UserError, match=r"fills the hole(.|\n)*latentflow inpaint"):
        over(LatentFlowPipeline, fill)(PROMPTS[0], height=SIDE, width=SIDE)
    with pytest.raises(UserError, match=r"none is given(.|\n)*--control"):
        over(LatentFlowPipeline, control)(PROMPTS[0], height=SIDE, width=SIDE)
    with pytest.raises(UserError, match=r"none is given(.|\n)*--control"):
        over(LatentFlowInpaintPipeline, control)(PROMPTS[0], image=images(), mask_image=masks())
    for name in (fill, control):
        pipe, words = over(LatentFlowEditPipeline, name), {"prompt": PROMPTS[0], "source_prompt": PROMPTS[1]}
        for method in ("flowedit", "inversion"):
            with pytest.raises(UserError, match="this checkpoint"):
                pipe(**words, image=images()[:1], method=method)
        with pytest.raises(UserError, match="this checkpoint"):
            pipe(**words, image=images()[:1], mask_image=masks()[:1])
        with pytest.raises(UserError, match="this checkpoint"):
            pipe.interpolate(prompt=PROMPTS, height=SIDE, width=SIDE)
        with pytest.raises(UserError, match="this checkpoint"):
            opened(name).check_image_input()


def test_numbers_of_control_images() -> None:
    pipe = over(LatentFlowPipeline, "FluxControlPipeline")
    with pytest.raises(UserError, match="2 prompts or classes for 3 images"):
        pipe(PROMPTS, control_image=images(count=3), height=SIDE, width=SIDE)
    with pytest.raises(UserError, match="image is str"):
        pipe(PROMPTS, control_image="edges.png", height=SIDE, width=SIDE)


# ---------------------------------------------------------------- the programs


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray[Any, Any]:
    """Write a.png, b.png and mask.png into the working folder; return the pixels of the first."""
    monkeypatch.chdir(tmp_path)
    pixels = (arrays(images()) * 255).astype(np.uint8)
    for name, image in zip(("a.png", "b.png"), pixels, strict=True):
        Image.fromarray(image).save(name)
    Image.fromarray((masks()[0, 0] * 255).byte().numpy()).save("mask.png")
    return pixels[0]


def common(name: str, folder: Path) -> list[str]:
    options = [f"{key}={json.dumps(value)}" for key, value in WITH_EXTRA_CHANNELS[name].call.items()]
    return ["--checkpoint", str(folder), *(["--family-options", *options] if options else []), "--steps", "2"]


@pytest.mark.parametrize("name", ["FluxFillPipeline", "StableDiffusionInpaintPipeline"])
def test_inpaint(
    name: str, folders: Callable[[str], Path], load_program: Program, files: np.ndarray[Any, Any]
) -> None:
    line = ["a.png", "mask.png", "red apple", "-o", "filled.png", *common(name, folders(name))]
    load_program("inpaint").main(line)
    filled, kept = np.array(Image.open("filled.png")), masks()[0, 0].numpy() == 0
    assert np.array_equal(filled[kept], files[kept]) and not np.array_equal(filled, files)
    with pytest.raises(UserError, match="latentflow inpaint"):
        load_program("generate").main(["red apple", *common(name, folders(name))])


def test_generate_with_control(
    folders: Callable[[str], Path], load_program: Program, files: np.ndarray[Any, Any]
) -> None:
    name = "FluxControlPipeline"
    line = [*common(name, folders(name)), "--height", "16", "--width", "16", "-o", "out.png"]
    main = load_program("generate").main
    main(["a red apple", "a green hat", "--control", "a.png", "b.png", *line])
    main(["a green hat", "--control", "b.png", "--seed", "1", *line])
    first, second = (np.array(Image.open(file)).astype(int) for file in ("out-2.png", "out.png"))
    assert np.abs(first - second).max() <= 1  # each has its own
    with pytest.raises(UserError, match="--control: 2 files for 3 prompts"):
        main(["a", "red", "hat", "--control", "a.png", "b.png", *line])
    with pytest.raises(UserError, match="none is given"):
        main(["a red apple", *line])
    with pytest.raises(UserError, match="no-such"):
        main(["a red apple", "--control", "no-such.png", *line])
    with pytest.raises(UserError, match="takes no control image"):
        main(["red apple", "--control", "a.png", "-o", "out.png"])


def test_the_command_keeps_the_size_of_the_photo(
    folders: Callable[[str], Path], load_program: Program, files: np.ndarray[Any, Any]
) -> None:
    name = "StableDiffusionInstructPix2PixPipeline"
    Image.new("RGB", (24, 40), "red").save("photo.png")
    line = ["make it snow", "--control", "photo.png", "-o", "out.png", *common(name, folders(name))]
    load_program("generate").main(line)
    assert Image.open("out.png").size == (24, 40)
    load_program("generate").main([*line, "--width", "48", "--overwrite"])
    assert Image.open("out.png").size == (48, 80)


@pytest.mark.parametrize("name", ["FluxFillPipeline", "FluxControlPipeline"])
def test_programs_that_cannot_use_such_a_model_say_so(
    name: str, folders: Callable[[str], Path], load_program: Program, files: np.ndarray[Any, Any]
) -> None:
    from latentflow.web.inference_server import InferenceServer

    line = common(name, folders(name))
    with pytest.raises(UserError, match="this checkpoint"):
        load_program("edit").main(["a.png", "red apple", "--from", "green hat", *line])
    with pytest.raises(UserError, match="this checkpoint"):
        load_program("interpolate").main(["red apple", "green hat", *line])
    with pytest.raises(UserError, match="this checkpoint"):
        load_program("evaluate").main([str(folders(name)), ".", "--features", "pixels-16", "-n", "2"])
    InferenceServer(
        str(folders(name)), "cpu"
    )  # the page has a tab for what fills a hole, and for control images
