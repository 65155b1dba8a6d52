"""Prompts that are longer than text encoders read: what they do not see is reported, for every family."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentflow import LatentFlowPipeline
from latentflow.errors import UserError
from latentflow.families.rows import Rows
from latentflow.families.truncation import lost_words, watched_tokenizers

from .test_pretrained import opened, seeded
from .tiny import TINY, checkpoint

#: families that cut nothing off: the first three refuse, draw a plan of the prompt, or read quoted text alone
WHOLE = {
    "Ideogram4Pipeline",
    "GlmImagePipeline",
    "OmniGenPipeline",
    "QwenImage21Pipeline",
    "BriaFibo2Pipeline",
}
TEXT = [name for name in TINY if name not in WHOLE | {"DiTPipeline"}]
LONG = "red green blue apple tree hat house sun " * 160 + "big small over"


def same(one: Rows, other: Rows) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor):
            return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-4)
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))

    return all(equal(value, other.values[name]) for name, value in one.values.items())


@pytest.mark.parametrize("name", TEXT)
@torch.no_grad()
def test_the_lost_words_are_those_that_make_no_difference(name: str) -> None:
    pipe, model, _ = opened(name)
    with watched_tokenizers(pipe) as seen:
        rows = model.encode_prompt([LONG])
    options = {option: model.option(option) for option in model.prompt_options}
    lost = [words for _, words in lost_words(pipe, [LONG], seen, model.kept_tokens(options))]
    assert lost and all(LONG.endswith(words) for words in lost)
    seen_by_none, unseen_by_one = min(lost, key=len), max(lost, key=len)
    if len(lost) == len({entry.part for entry in seen}):
        kept = LONG.removesuffix(seen_by_none)
        assert same(rows, model.encode_prompt([kept + "picture " * len(seen_by_none.split())]))
    kept = LONG.removesuffix(unseen_by_one).split()
    changed = " ".join([*kept[:-1], "picture", unseen_by_one])
    assert not same(rows, model.encode_prompt([changed]))


def test_each_encoder_is_named_and_the_words_quoted(caplog: pytest.LogCaptureFixture) -> None:
    model = opened("StableDiffusion3Pipeline")[1]
    prompt = "big " * 80 + "small over the house"
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(2):
            model.encode_prompt([prompt, "a hat"])
    [record] = [record for record in caplog.records if "too long" in record.getMessage()]
    lost = repr("big " * 5 + "small over the house")
    assert record.getMessage() == (
        f"the prompt is too long: text_encoder (CLIPTextModelWithProjection) does not see {lost}; "
        f"text_encoder_2 (CLIPTextModelWithProjection) does not see {lost}; "
        "text_encoder_3 (T5EncoderModel) sees all of it"
    )


def test_each_pipeline_reports_once(caplog: pytest.LogCaptureFixture) -> None:
    """A second one of the same class reports the same prompt anew; none keeps it."""
    prompt, pipe = "house " * 90, checkpoint("StableDiffusionPipeline")
    first, second = (type(opened("StableDiffusionPipeline")[1])(pipe) for _ in range(2))
    for model in (first, first, second):
        model.encode_prompt([prompt])
    assert len([record for record in caplog.records if "too long" in record.getMessage()]) == 2
    assert all(isinstance(entry, int) for entry in first.reported)


def test_a_prompt_that_fits_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for name in TEXT:
            opened(name)[1].encode_prompt(["a red apple"])
    assert not [record for record in caplog.records if "too long" in record.getMessage()]


def test_the_program_reports_them(
    load_program: Callable[[str], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint("FluxPipeline").save_pretrained(tmp_path / "flux")
    line = ["blue " * 90 + "hat", "--checkpoint", str(tmp_path / "flux"), "-o", str(tmp_path / "out.png")]
    line += ["--steps", "1", "--height", "16", "--width", "16", "-n", "2"]
    load_program("generate").main(line)
    lost = [record.getMessage() for record in caplog.records if "too long" in record.getMessage()]
    assert len(lost) == 1 and "text_encoder (CLIPTextModel) does not see 'blue blue" in lost[0]
    assert "text_encoder_2 (T5EncoderModel) sees all of it" in lost[0]


#: max_sequence_length that the stock call takes at most
LIMITS = {
    "StableDiffusion3Pipeline": 512,
    "FluxPipeline": 512,
    "ChromaPipeline": 512,
    "QwenImagePipeline": 1024,
    "Lumina2Pipeline": 512,
    "OvisImagePipeline": 256,
    "BriaPipeline": 512,
    "BriaFiboPipeline": 3000,
    "Kandinsky5T2IPipeline": 1024,
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_beyond_the_stock_pipeline_s_is_refused(name: str) -> None:
    model = opened(name)[1]
    with pytest.raises(UserError, match=str(LIMITS[name])):
        model.encode_prompt(["a hat"], max_sequence_length=LIMITS[name] + 1)
    call = {**TINY[name].call, "max_sequence_length": 4000}
    with pytest.raises(UserError, match="max_sequence_length=4000"):
        type(model)(model.pipeline, **call).encode_prompt(["a hat"])


def test_a_limit_where_prompts_have_none_is_refused() -> None:
    pipe = LatentFlowPipeline.from_pipe(checkpoint("StableDiffusionPipeline"))
    with pytest.raises(UserError, match=r"max_sequence_length is given.*do not take"):
        pipe("a hat", max_sequence_length=32, num_inference_steps=1, generator=seeded())


def test_a_long_prompt_that_the_stock_pipeline_refuses() -> None:
    with pytest.raises(UserError, match="exceeds max_sequence_length=32"):
        opened("Ideogram4Pipeline")[1].encode_prompt([LONG])
