"""Which caption, which image and which factor a training sample gets."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from latentflow.config import FlowConfig
from latentflow.data import FileExample, LatentTable, Source, one_size
from latentflow.models import train_tokenizer
from latentflow.training.data import Captions, conditions_of, mirrored
from latentflow.training.loop.data_order import DataOrder, SampleUse
from latentflow.training.losses.flow import FlowLoss
from latentflow.training.losses.latent_data import BucketData, LatentData, is_flipped

TEXTS = [("one",), ("two", "deux", "zwei"), ("three", "trois")]


def source(**more: Any) -> Source:
    examples = [
        FileExample(str(row), text, texts=tuple(texts), path=Path(str(row)), **more)
        for row, (text, *texts) in enumerate(TEXTS)
    ]
    return Source("numbers", tuple(examples), "text")


def latent_data(source: Source, table: LatentTable) -> LatentData:
    return LatentData(one_size(source, (64, 64)), [BucketData(table)], {})


def test_each_use_draws_one_of_its_images_captions() -> None:
    captions = Captions(source(), seed=7)
    assert list(captions) == [text for texts in TEXTS for text in texts]
    drawn = [captions[place] for place in captions.choose([1] * 3000, list(range(3000)))]
    counts = Counter(drawn)
    assert set(counts) == set(TEXTS[1]) and all(900 < count < 1100 for count in counts.values())
    pairs = Counter(itertools.pairwise(drawn))
    assert len(pairs) == 9 and min(pairs.values()) > 250  # the next draw knows nothing of the last


def test_the_draw_depends_on_the_seed_and_the_running_number_alone() -> None:
    rows, numbers = [2, 1, 0, 1], [11, 5, 6, 900]
    captions = Captions(source(), seed=7)
    whole = captions.choose(rows, numbers)
    assert whole == [captions.choose([row], [number])[0] for row, number in zip(rows, numbers, strict=True)]
    many = [1] * 64
    assert captions.choose(many, list(range(64))) != Captions(source(), seed=8).choose(many, list(range(64)))


def test_tokens_are_those_of_the_drawn_caption() -> None:
    tokenizer = train_tokenizer([text for texts in TEXTS for text in texts])
    numbers, rows = source(), [0, 1, 2] * 8
    batch = conditions_of(numbers, 3, tokenizer)(rows, list(range(24)))
    texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    captions = Captions(numbers, 3)
    assert texts == [captions[place] for place in captions.choose(rows, list(range(24)))]
    assert all(text in TEXTS[row] for text, row in zip(texts, rows, strict=True)) and len(set(texts)) == 6


@pytest.mark.parametrize("processes", [1, 2])
def test_an_epoch_uses_each_image_as_often_as_it_is_repeated(processes) -> None:
    table = LatentTable(torch.arange(3.0).view(3, 1, 1, 1, 1), None)
    data = latent_data(source(repeats=4), table)
    order = DataOrder(size=len(data), batch_size=2, processes=processes)
    draws = [d for p in range(processes) for b in order.batches(0, 12 // (2 * processes), p) for d in b]
    assert Counter(data.__getitems__(draws)["latents"].flatten().tolist()) == {0.0: 4, 1.0: 4, 2.0: 4}
    assert len(latent_data(source(repeats=4).once(), table)) == 3


def test_weights_multiply_the_loss_and_not_what_is_measured() -> None:
    torch.manual_seed(0)
    stage = FlowLoss(Linear(), FlowConfig(), seed=0)
    batch = {"latents": torch.randn(3, 1, 2, 2), "sample_ids": [0, 1, 2]}
    plain, weights = stage(batch), torch.tensor([0.5, 2.0, 0.0])
    weighted = stage(batch | {"weights": weights})
    assert torch.equal(plain["per_sample"], weighted["per_sample"])
    torch.testing.assert_close(weighted["loss"], (plain["per_sample"] * weights).mean())
    table = LatentTable(torch.zeros(3, 1, 1, 1, 1), None)
    assert "weights" not in latent_data(source(), table).__getitems__([SampleUse(0, 0)])
    assert latent_data(source(weight=0.5), table).__getitems__([SampleUse(2, 0)])["weights"].tolist() == [0.5]
    # Each use has its image's, however often those before it are used.
    examples = [
        dataclasses.replace(one, repeats=repeats, weight=weight)
        for one, repeats, weight in zip(source().examples, (3, 1, 2), (1.0, 2.0, 3.0), strict=True)
    ]
    data = latent_data(Source("numbers", tuple(examples), "text"), table)
    told = data.__getitems__([SampleUse(index, index) for index in range(6)])["weights"]
    assert told.tolist() == [1.0, 1.0, 1.0, 2.0, 3.0, 3.0]


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Any = None) -> torch.Tensor:
        return self.slope * x


def test_captions_of_mirrored_images_say_left_for_right() -> None:
    told = {
        "A cat, left of the dog": "A cat, right of the dog",
        "LEFT and Right": "RIGHT and Left",
        "leftovers, upright": "leftovers, upright",
    }
    assert {caption: mirrored(caption) for caption in told} == told
    assert all(mirrored(mirrored(caption)) == caption for caption in told)


@pytest.mark.parametrize("texts", [("left hand",), ("left hand", "hand on the left", "a hand")])
def test_a_use_is_told_of_its_mirror_image_when_it_is_mirrored(texts) -> None:
    example = FileExample("a", texts[0], texts=texts[1:], path=Path("a"))
    hands = Source("hands", (example, example), "text")
    plain, turning = Captions(hands, seed=5), Captions(hands, seed=5, mirror=True)
    numbers = list(range(200))
    told = [turning[place] for place in turning.choose([1] * 200, numbers)]
    expected = [plain[place] for place in plain.choose([1] * 200, numbers)]
    expected = [mirrored(one) if is_flipped(number) else one for number, one in enumerate(expected)]
    assert told == expected and set(told) <= set(turning)
    assert {"left hand", "right hand"} <= set(told)
