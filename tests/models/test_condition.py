"""Rows of a `Condition` stay together."""

from __future__ import annotations

import pytest
import torch

from latentflow.models import Condition


def test_unconditional_drops_every_row_and_keeps_the_fields() -> None:
    cond = Condition(class_labels=torch.tensor([4, 5]), channels=torch.ones(2, 1, 2, 2))
    out = cond.unconditional()
    assert out.drop.tolist() == [True, True]
    assert out.class_labels is cond.class_labels
    assert out.channels is cond.channels
    with pytest.raises(AttributeError):  # it is frozen
        cond.drop = out.drop  # type: ignore[misc]


def test_cat_keeps_the_order_of_rows_and_fills_what_one_side_left_to_the_default() -> None:
    a = Condition(class_labels=torch.tensor([1, 2]))
    both = Condition.cat(a.unconditional(), a)
    assert both.class_labels.tolist() == [1, 2, 1, 2]
    assert both.drop.tolist() == [True, True, False, False]
    assert both.batch_size == 4


def test_cat_pads_the_shorter_text_and_masks_the_padding() -> None:
    short, long = torch.randn(1, 2, 3), torch.randn(1, 4, 3)
    both = Condition.cat(Condition(text=short), Condition(text=long))
    assert both.text_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert torch.equal(both.text[0, :2], short[0])
    assert torch.equal(both.text[1], long[0])

    with pytest.raises(ValueError, match="only one of the two conditions has text"):
        Condition.cat(Condition(text=short), Condition())


def test_nothing_stays_nothing() -> None:
    assert Condition.cat(Condition(), Condition()) == Condition().unconditional() == Condition()
    assert Condition().batch_size == 0


def test_repeat_interleave_and_rows_keep_what_belongs_to_a_row_together() -> None:
    cond = Condition(class_labels=torch.tensor([7, 8]), drop=torch.tensor([True, False]))
    assert cond.repeat_interleave(2).class_labels.tolist() == [7, 7, 8, 8]
    assert cond.repeat_interleave(2).drop.tolist() == [True, True, False, False]
    for index in (torch.tensor([1, 0]), torch.tensor([1])):
        assert cond.rows(index).class_labels.tolist() == [[7, 8][i] for i in index]
    assert cond.rows(torch.tensor([False, True])).drop.tolist() == [False]


def test_to_casts_numbers_but_not_labels_masks_or_sizes() -> None:
    cond = Condition(
        class_labels=torch.tensor([1]),
        text=torch.zeros(1, 2, 3),
        text_mask=torch.ones(1, 2, dtype=torch.bool),
        sizes=torch.full((1, 6), 1001.0),
    ).to(dtype=torch.bfloat16)
    assert cond.text.dtype == torch.bfloat16
    assert cond.class_labels.dtype == torch.int64 and cond.text_mask.dtype == torch.bool
    assert cond.sizes.tolist() == [[1001.0] * 6]  # bfloat16 would round it
