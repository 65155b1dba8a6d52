"""Real images beside generated ones: in the data's proportions, and apart from the reference."""

from __future__ import annotations

from collections import Counter

import pytest

from latentflow.metrics import in_proportion, real_split

LABELS = {
    "two classes": ["common"] * 950 + ["rare"] * 50,
    "ten classes": [f"class {number}" for number in range(10) for _ in range(10 * (number + 1))],
    "one class": ["all"] * 100,
    "captions": [f"caption {number}" for number in range(500)],
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS.keys())
def test_every_beginning_has_the_data_s_proportions(labels: list[str]) -> None:
    order, total = in_proportion(labels, seed=3), Counter(labels)
    assert sorted(order) == list(range(len(labels)))
    for k in (1, 20, 100, len(labels) // 2, len(labels)):
        met = Counter(labels[index] for index in order[:k])
        assert all(abs(met[label] - k * n / len(labels)) <= 2 for label, n in total.items())
    assert order == in_proportion(labels, seed=3)
    assert len(labels) < 2 or order != in_proportion(labels, seed=4)


def test_captions_of_two_images_come_no_earlier_than_captions_of_one() -> None:
    labels = [f"single {n}" for n in range(900)] + [f"pair {n}" for n in range(50)] * 2
    pairs = sum(
        labels[index].startswith("pair") for seed in range(30) for index in in_proportion(labels, seed)[:100]
    )
    assert pairs / 3000 == pytest.approx(0.1, abs=0.02)  # their own share of all images


@pytest.mark.parametrize(
    ("data", "generated", "beside"),
    [(1000, 200, 200), (400, 200, 200), (60, 200, 30), (3, 200, 1), (0, 5, 0)],
)
def test_the_reference_is_all_other_images(data: int, generated: int, beside: int) -> None:
    split = real_split(range(data), generated)
    assert len(split.beside) == beside
    assert sorted(split.beside + split.reference) == list(range(data))  # none is in both
