"""The held-out set depends on content and seed only."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from latentflow.data import Source, find_source, split
from latentflow.errors import UserError

from .images import save_all


@pytest.fixture
def source(tmp_path: Path) -> Source:
    save_all(tmp_path, [f"{i:02}.png" for i in range(40)])
    return find_source(str(tmp_path))


def keys(source: Source, rows: list[int]) -> set[str]:
    return {source.examples[row].content_key() for row in rows}


def test_sizes_and_partition(source: Source) -> None:
    train, held_out = split(source, 0.25)
    assert len(held_out) == 10 and sorted(train + held_out) == list(range(40))
    assert train == sorted(train) and held_out == sorted(held_out)
    assert len(split(source, 7)[1]) == 7
    assert split(source, 0) == (list(range(40)), []) == split(source, 0.0)
    assert len(split(source, 0.001)[1]) == 1  # a share of something is never nothing


def test_order_and_names_do_not_matter(source: Source, tmp_path: Path) -> None:
    wanted = keys(source, split(source, 10)[1])
    backwards = dataclasses.replace(source, examples=source.examples[::-1])
    assert keys(backwards, split(backwards, 10)[1]) == wanted
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for index, example in enumerate(source.examples):
        shutil.copy(tmp_path / example.name, renamed / f"{39 - index}.png")
    again = find_source(str(renamed))
    assert keys(again, split(again, 10)[1]) == wanted


def test_the_seed_matters_and_a_larger_share_contains_the_smaller(source: Source) -> None:
    assert split(source, 10, seed=0) == split(source, 10, seed=0) != split(source, 10, seed=1)
    assert set(split(source, 5)[1]) < set(split(source, 12)[1])


def test_copies_stay_on_one_side(source: Source, tmp_path: Path) -> None:
    for index in range(40):
        shutil.copy(tmp_path / f"{index:02}.png", tmp_path / f"copy{index:02}.png")
    doubled = find_source(str(tmp_path))
    train, held_out = split(doubled, 0.25)
    assert len(held_out) == 20 and not keys(doubled, train) & keys(doubled, held_out)


@pytest.mark.parametrize("validation", [40, 1.0, -1, -0.5, 41])
def test_impossible(source: Source, validation: float) -> None:
    with pytest.raises(UserError, match=f"cannot hold out {validation} of 40 images"):
        split(source, validation)
