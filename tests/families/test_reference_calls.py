"""Edits by models that draw from images: images of every kind, sizes, rows, and errors whose advice works."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latentflow import (
    LatentFlowEditPipeline,
    LatentFlowImg2ImgPipeline,
    LatentFlowInpaintPipeline,
    LatentFlowPipeline,
)
from latentflow.errors import UserError
from latentflow.families import FAMILIES, family_of
from latentflow.families.sizes import fit_size
from latentflow.families.truncation import Tokenized, report_lost_words
from latentflow.pipeline.inpaint_batch import read_batch

from .test_references import PROMPTS, SEVERAL, SIDE, each_family, flags, image, opened, prompts, seeded
from .tiny import WITH_EXTRA_CHANNELS, checkpoint

NEEDY = ["QwenImageEditPipeline", "QwenImageEditPlusPipeline", "LongCatImageEditPipeline"]
pytestmark = pytest.mark.usefixtures("small_megapixel")


def over(kind: Any, name: str) -> Any:
    pipe = kind(opened(name))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def references(name: str, given: Any) -> Tensor:
    found: Tensor = opened(name).encode_prompt(prompts(name)[:1], images=[given]).kept["references"][0]
    return found


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "RGBA", "LA", "1", "CMYK"])
def test_an_image_of_any_mode_is_what_a_call_reads(mode: str) -> None:
    """The rows of the model are those of the image as RGB on white ground."""
    given = image().convert("L")
    if mode == "I;16":
        given = Image.fromarray(np.array(given).astype(np.uint16) * 257)
        expected = image().convert("L").convert("RGB")
    else:
        given = given.convert(mode)
        expected = given.convert("RGB")
    if "A" in mode:
        given.putalpha(Image.fromarray(np.full((64, 64), 64, np.uint8)))
        levels = np.array(expected) / 255.0 * 64 / 255 + (1 - 64 / 255)
        expected = Image.fromarray(np.rint(levels * 255).astype(np.uint8))
    for name in ("Flux2KleinPipeline", "LongCatImageEditPipeline"):
        found, wanted = references(name, given), references(name, expected)
        torch.testing.assert_close(found, wanted, rtol=0.0, atol=0.02 * float(wanted.abs().max()))


@each_family
def test_exif_turns_an_image(name: str) -> None:
    upright = image(0, 64, 96)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be turned by 90 degrees clockwise
    assert torch.equal(references(name, turned), references(name, upright))
    assert opened(name).reference_size(turned) == opened(name).reference_size(upright)


# ---------------------------------------------------------------- sizes


@pytest.fixture
def mask() -> Image.Image:
    """The mask of an image of 160 x 128 pixels (height, width)."""
    hole = np.zeros((160, 128), np.uint8)
    hole[20:90, 30:100] = 255
    return Image.fromarray(hole)


@each_family
def test_a_large_image_with_a_mask_is_drawn_at_the_size_that_suits(
    name: str, mask: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, given = over(LatentFlowEditPipeline, name), image(0, 160, 128)
    monkeypatch.setattr(type(pipe.model), "size_for", lambda self, image: (80, 64))
    call = {"mask_image": mask, "num_inference_steps": 1, "generator": seeded()}
    latents = pipe(prompts(name)[0], given, output_type="latent", **call).images
    assert tuple(latents.shape[1:]) == pipe.model.latent_shape(80, 64)
    edited = np.array(pipe(prompts(name)[0], given, **call).images[0])
    kept = np.array(mask) == 0
    assert np.array_equal(edited[kept], np.array(given)[kept])
    assert (edited[~kept] != np.array(given)[~kept]).mean() > 0.9
    latents = pipe(prompts(name)[0], given, output_type="latent", width=96, **call).images
    assert tuple(latents.shape[1:]) == pipe.model.latent_shape(120, 96)
    small = pipe(prompts(name)[0], image(0, 70, 66), output_type="latent", **call).images
    assert tuple(small.shape[1:]) == pipe.model.latent_shape(*pipe.canvas_size((70, 66)))


def test_an_image_that_suits_the_model_is_not_resized(mask: Image.Image) -> None:
    """Rounding to what the network can draw does not count: the image is padded, as for other methods."""
    pipe, given = over(LatentFlowEditPipeline, "Flux2KleinPipeline"), image(0, 70, 66)
    assert pipe.model.reference_size(given) == (68, 64)
    call = {"mask_image": mask, "num_inference_steps": 1, "generator": seeded(), "output_type": "latent"}
    assert tuple(pipe(PROMPTS[0], given, **call).images.shape[1:]) == pipe.model.latent_shape(72, 68)


def test_what_is_drawn_is_resized_into_the_hole() -> None:
    """The network sees all of the image at the size that is drawn; what it draws lands where it was."""
    ramp = torch.linspace(0.0, 1.0, 64)[None, None, None].expand(1, 3, 48, 64)
    hole = torch.zeros(1, 1, 48, 64)
    hole[..., 10:30, 20:50] = 1.0
    pipe = over(LatentFlowEditPipeline, "Flux2KleinPipeline")
    batch = read_batch(pipe, ramp, hole, None, None, None, 0.0, False).drawn_at((24, 32))
    seen = batch.network_view()
    assert seen.shape == (1, 3, 24, 32)
    pasted = batch.paste_back(seen / 2.0 + 0.5)
    torch.testing.assert_close(pasted, ramp, rtol=0.0, atol=0.01)
    assert torch.equal(pasted[(hole == 0).expand_as(ramp)], ramp[(hole == 0).expand_as(ramp)])


def test_a_side_follows_from_the_other() -> None:
    assert fit_size((100, 200), 64, None, 16) == (64, 128)
    assert fit_size((100, 200), None, 100, 16) == (48, 100)
    assert fit_size((100, 200), 10, 30, 16) == (10, 30)
    assert fit_size((1, 200), None, 16, 16) == (16, 16)
    pipe, given = over(LatentFlowEditPipeline, "Flux2KleinPipeline"), image(0, 64, 128)
    call = {"num_inference_steps": 1, "generator": seeded()}
    assert pipe(PROMPTS[0], given, height=32, **call).images[0].size == (64, 32)
    assert pipe(PROMPTS[0], given, width=32, **call).images[0].size == (32, 16)


def test_kontext_does_not_report_a_size_that_nobody_draws(caplog: pytest.LogCaptureFixture) -> None:
    for options in ({}, {"max_area": 64 * 48}, {"max_area": 3}):
        logging.getLogger("diffusers").addHandler(caplog.handler)
        model = FAMILIES["FluxKontextPipeline"](
            checkpoint("FluxKontextPipeline"), _auto_resize=False, **options
        )
        model.encode_prompt(PROMPTS[:1], images=[image()])
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert not [record for record in caplog.records if "adjusted" in record.getMessage()]


# ---------------------------------------------------------------- rows


@each_family
def test_rows_draw_from_their_own_images(name: str) -> None:
    pipe = over(LatentFlowEditPipeline, name)
    rows = pipe.model.encode_prompt(prompts(name)[:1], images=[image(1)])
    call = {"num_inference_steps": 2, "height": SIDE, "width": SIDE, "output_type": "pt"}
    expected = pipe(prompts(name)[0], image(1), generator=seeded(), **call).images
    drawn = pipe(image=image(2), prompt_embeds=rows, generator=seeded(), **call).images
    torch.testing.assert_close(drawn, expected, rtol=0.0, atol=1e-5)
    again = over(LatentFlowPipeline, name)(prompt_embeds=rows, generator=seeded(), **call).images
    torch.testing.assert_close(again, expected, rtol=0.0, atol=1e-5)


def test_rows_that_cannot_be_edited_by() -> None:
    pipe = over(LatentFlowEditPipeline, "Flux2KleinPipeline")
    bare = pipe.model.encode_prompt(PROMPTS[:1])
    with pytest.raises(UserError, match=r"draw from no images\nEncode the prompts with them"):
        pipe(image=image(), prompt_embeds=bare)
    rows = pipe.model.encode_prompt(PROMPTS[:1], images=[image()])
    with pytest.raises(UserError, match="reference_images are given beside prompt_embeds"):
        pipe(image=image(), prompt_embeds=rows, reference_images=[image(1)])
    pipe = over(LatentFlowEditPipeline, "QwenImageEditPipeline")
    rows = pipe.model.encode_prompt(PROMPTS[:1], images=[image()])
    with pytest.raises(UserError, match="negative_prompt is given beside prompt_embeds"):
        pipe(image=image(), prompt_embeds=rows, negative_prompt="a hat")
    with pytest.raises(UserError, match="as a tensor"):
        pipe(image=image(), prompt_embeds=torch.zeros(1, 4, 8))
    unguided = pipe.model.encode_prompt(PROMPTS[:1], images=[image()], guided=False)
    with pytest.raises(UserError, match="encoded for use without guidance"):
        pipe.model.velocity(unguided, 4.0)


@pytest.mark.parametrize("name", NEEDY)
def test_the_empty_prompt_is_encoded_once_and_only_where_guidance_needs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, encoded = over(LatentFlowEditPipeline, name), []
    own = type(pipe.model).network_inputs

    def watched(self: Any, prompt: str, *args: Any) -> Any:
        encoded.append(prompt)
        return own(self, prompt, *args)

    monkeypatch.setattr(type(pipe.model), "network_inputs", watched)
    call = {"num_inference_steps": 1, "height": SIDE, "width": SIDE}
    pipe(PROMPTS, image(), **call)
    assert encoded == [*PROMPTS, ""]
    encoded.clear()
    pipe(PROMPTS, image(), guidance_scale=1.0, **call)
    assert encoded == PROMPTS
    encoded.clear()
    pipe(PROMPTS, image(), negative_prompt="a hat", **call)
    assert encoded == [*PROMPTS, "a hat"]

    def switch_on(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        pipe._guidance_scale = 4.0
        return {}

    call["num_inference_steps"] = 2
    assert pipe(PROMPTS, image(), guidance_scale=1.0, callback_on_step_end=switch_on, **call).images


# ---------------------------------------------------------------- prompts


def test_longcat_refuses_a_prompt_that_is_too_long() -> None:
    model = opened("LongCatImageEditPipeline")
    with pytest.raises(UserError, match="80 tokens, more than the 32"):
        model.encode_prompt(["red apple " * 40], images=[image()])
    with pytest.raises(
        UserError, match="tokens, more than the 32"
    ):  # quoted text has a token for each letter
        model.encode_prompt([f"write '{'a' * 40}'"], images=[image()])


@pytest.mark.parametrize("name", NEEDY)
def test_no_lost_words_are_reported_where_none_are(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The templates, which hold these words too, and the images have more tokens than a prompt may have."""
    with caplog.at_level(logging.WARNING):
        for prompt in ("image", "user", "big small red apple house " * 6):
            opened(name).encode_prompt([prompt], images=[image(0, 96, 96)])
    assert not [record for record in caplog.records if "too long" in record.getMessage()]


def test_an_encoder_that_has_no_name_is_none(caplog: pytest.LogCaptureFixture) -> None:
    """LongCat's processor belongs to no component that is called after it."""
    model: Any = opened("LongCatImageEditPipeline")
    text = "red green blue apple"
    seen = [Tokenized("text_processor", text, 2, False), Tokenized("tokenizer", text, None, False)]
    report_lost_words(model, [text], seen, {})
    encoder = "text_encoder (Qwen2_5_VLForConditionalGeneration)"
    assert caplog.messages == [
        f"the prompt is too long: the text encoder does not see 'blue apple'; {encoder} sees all of it"
    ]


def test_fibo_says_what_its_prompts_are() -> None:
    with pytest.raises(UserError, match=r"takes captions in JSON\n.*edit_instruction"):
        opened("BriaFiboEditPipeline").encode_prompt(["make it red"], images=[image()])


def test_another_fault_of_a_prompt_may_be_meant() -> None:
    with pytest.raises(UserError, match="refuses the prompt, the images or an option: Image too small"):
        opened("Flux2KleinPipeline").encode_prompt(PROMPTS[:1], images=[image(0, 16, 64)])


# ---------------------------------------------------------------- advice


@pytest.mark.parametrize("name", NEEDY)
def test_every_other_call_of_a_model_that_needs_an_image_names_the_edit(name: str) -> None:
    words = {"prompt": PROMPTS[0], "image": image()}
    advice = r"does nothing else\n.*latentflow edit IMAGE PROMPT.*--mask or --box.*LatentFlowEditPipeline"
    for method in ("flowedit", "inversion", "direct"):
        with pytest.raises(UserError, match=advice):
            over(LatentFlowEditPipeline, name)(**words, method=method, source_prompt="a hat")
    with pytest.raises(UserError, match=advice):
        over(LatentFlowEditPipeline, name).invert(image())
    with pytest.raises(UserError, match=advice):
        over(LatentFlowEditPipeline, name).interpolate(PROMPTS, height=SIDE, width=SIDE)
    with pytest.raises(UserError, match=advice):
        over(LatentFlowImg2ImgPipeline, name)(**words)
    with pytest.raises(UserError, match=advice):
        over(LatentFlowInpaintPipeline, name)(**words, mask_image=image().convert("L"))
    with pytest.raises(UserError, match=advice):
        over(LatentFlowPipeline, name)(PROMPTS[0], height=SIDE, width=SIDE)
    with pytest.raises(UserError, match=advice):
        opened(name).check_image_input()
    for option in ({"strength": 0.5}, {"source_prompt": "a hat"}):
        with pytest.raises(UserError, match=r"has no such setting\nLeave it out\.$"):
            over(LatentFlowEditPipeline, name)(**words, **option)


@pytest.mark.parametrize("name", WITH_EXTRA_CHANNELS)
def test_models_with_a_mask_or_a_control_image_are_not_sent_to_another_method(name: str) -> None:
    family: Any = family_of(name)
    pipe = LatentFlowEditPipeline(family(checkpoint(name)))
    advice = "latentflow (inpaint|generate --control)"
    for method in (None, "reference", "flowedit"):
        with pytest.raises(UserError, match=advice):
            pipe(PROMPTS[0], image(), method=method, reference_images=[image(1)])
    with pytest.raises(UserError, match=advice):
        pipe.model.encode_prompt(PROMPTS, images=[image()])


def test_reference_images_lead_in_no_circle(load_program: Callable[[str], Any], tmp_path: Path) -> None:
    """A model that draws from no images says so; one that does names the method."""
    image(0).save(tmp_path / "a.png")
    files = [str(tmp_path / "a.png"), "red apple", "--reference", str(tmp_path / "a.png")]
    with pytest.raises(UserError, match=r"Leave them out: this model does not draw from images"):
        load_program("edit").main(files)
    with pytest.raises(UserError, match=r"Use method 'flowedit'"):
        load_program("edit").main([*files[:2], "--method", "reference"])
    with pytest.raises(UserError, match=r"given to method 'flowedit'\nUse method 'reference'"):
        over(LatentFlowEditPipeline, SEVERAL[0])(
            PROMPTS[0], image(), method="flowedit", reference_images=[image(1)]
        )


def test_the_programs_name_the_edit(
    folders: Callable[[str], Path],
    load_program: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    image(0).save("a.png")
    common = flags("QwenImageEditPipeline", folders("QwenImageEditPipeline"))
    advice = r"latentflow edit IMAGE PROMPT.*--mask or --box"
    size = ["--height", "32", "--width", "32"]
    for program, line in {
        "edit": ["a.png", "red", "--method", "flowedit"],
        "inpaint": ["a.png", "red", "--box", "0", "0", "8", "8"],
        "generate": ["red", "--control", "a.png", *size],
    }.items():
        with pytest.raises(UserError, match=advice):
            load_program(program).main([*line, *common])
    with pytest.raises(UserError, match=advice):
        load_program("edit").main(["a.png", "red", "--method", "image-to-image", *common])
    with pytest.raises(UserError, match=r"source_prompt \(--from\) is given.*\nLeave it out\.$"):
        load_program("edit").main(["a.png", "red", "--from", "a hat", *common])
    line = flags("FluxKontextPipeline", folders("FluxKontextPipeline"))
    with pytest.raises(UserError, match=r"takes no control image\n.*latentflow edit IMAGE PROMPT"):
        load_program("generate").main(["red", "--control", "a.png", *size, *line])


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("name", "options", "advice"),
    [
        ("FluxKontextPipeline", {"max_area": "big"}, "Give a whole number"),
        ("FluxKontextPipeline", {"max_area": 0}, "at least 1"),
        ("FluxKontextPipeline", {"_auto_resize": 1}, "Give true or false"),
        ("FluxPipeline", {"true_cfg_scale": "much"}, "Give a number"),
        ("FluxPipeline", {"max_sequence_length": 0}, "at least 1"),
        ("Flux2KleinPipeline", {"text_encoder_out_layers": 3}, r"Give a list, such as \[9, 18, 27\]"),
        ("Flux2KleinPipeline", {"text_encoder_out_layers": ["a"]}, "Give a list"),
        ("LongCatImageEditPipeline", {"enable_cfg_renorm": True}, "It has no options"),
        ("StableDiffusionInstructPix2PixPipeline", {"image_guidance_scale": "much"}, "Give a number"),
        ("StableDiffusionXLInstructPix2PixPipeline", {"image_guidance_scale": 0.9}, "Give at least 1"),
    ],
)
def test_an_option_of_another_kind_than_its_default_is_refused(
    name: str, options: dict[str, Any], advice: str
) -> None:
    family: Any = family_of(name)
    with pytest.raises(UserError, match=rf"{next(iter(options))} is (.|\n)*{advice}"):
        family(checkpoint(name), **options)


def test_options_that_fit_are_taken() -> None:
    family: Any = family_of("FluxPipeline")
    assert family(checkpoint("FluxPipeline"), true_cfg_scale=2).true_guidance(1.0) == 2.0
    with pytest.raises(UserError, match="max_sequence_length is 'many'"):
        family(checkpoint("FluxPipeline")).encode_prompt(PROMPTS, max_sequence_length="many")
    family = family_of("StableDiffusionInstructPix2PixPipeline")
    assert family(checkpoint("StableDiffusionInstructPix2PixPipeline"), image_guidance_scale=1)
    family = family_of("StableDiffusionPipeline")
    assert family(checkpoint("StableDiffusionPipeline"), clip_skip=None)  # None has no kind


def test_the_command_refuses_them(folders: Callable[[str], Path], load_program: Callable[[str], Any]) -> None:
    line = ["red apple", "--checkpoint", str(folders("FluxPipeline"))]
    for option in ("true_cfg_scale=much", f"max_sequence_length={json.dumps([1])}"):
        with pytest.raises(UserError, match=rf"{option.split('=')[0]} is "):
            load_program("generate").main([*line, "--family-options", option])
