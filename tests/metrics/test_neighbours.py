"""Feature spaces, retrieval and memorisation, on pictures whose neighbours are known."""

from __future__ import annotations

import pytest
import torch

from latentflow.errors import UserError
from latentflow.metrics import (
    attribute_groups,
    attribute_retrieval,
    caption_retrieval,
    distances,
    features,
    memorisation,
)


def pictures(n: int, seed: int = 0, side: int = 32) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def flat(*levels: float) -> torch.Tensor:
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 32, 32)


def test_features_are_the_area_mean_pixels() -> None:
    assert features(pictures(2, side=64), "pixels-16").shape == (2, 3 * 16 * 16)
    assert torch.equal(features(pictures(2), "pixels-32"), pictures(2).flatten(1))
    torch.testing.assert_close(features(flat(0.3, -0.7), "pixels-16")[:, 0], torch.tensor([0.3, -0.7]))
    with pytest.raises(UserError, match="pixels-16"):
        features(pictures(1), "pixel-16")


def test_features_do_not_alias() -> None:
    """Stripes of one pixel become grey, not one of the two colours."""
    stripes = torch.ones(1, 3, 64, 64)
    stripes[..., ::2] = -1
    inner = features(stripes, "pixels-16").view(3, 16, 16)[:, 2:-2, 2:-2]
    assert inner.abs().max() < 0.1


def test_distances_keep_small_differences() -> None:
    rows = features(pictures(3))
    assert torch.equal(distances(rows, rows).diagonal(), torch.zeros(3))
    assert distances(rows, rows + 1e-5)[0, 0] == pytest.approx(1e-5 * rows.shape[1] ** 0.5, rel=0.05)


def test_caption_retrieval_counts_the_nearest_captions() -> None:
    data = flat(0.0, 0.1, 0.2, 0.3, 0.9)
    names = ["a", "b", "c", "d", "e"]
    generated = flat(0.01, 0.11, 0.12, 0.01)
    shares = caption_retrieval(generated, ["a", "b", "c", "e"], data, names, tops=(1, 2, 5))
    assert shares == {1: 0.5, 2: 0.75, 5: 1.0}
    assert caption_retrieval(data, names, data, names) == {1: 1.0, 5: 1.0}


def test_one_caption_may_belong_to_several_pictures() -> None:
    data, names = flat(0.0, 0.5, 1.0), ["hat", "shoe", "hat"]
    assert caption_retrieval(flat(0.9, 0.1, 0.4), ["hat", "hat", "hat"], data, names)[1] == pytest.approx(
        2 / 3
    )


def test_attribute_groups_take_the_longest_attribute_and_need_every_counterpart() -> None:
    tones = ["light tone", "medium-light tone", "dark tone"]
    data = [f"{thing}: {tone}" for thing in ("hand", "ear") for tone in tones] + ["nose: light tone", "apple"]
    asked = ["apple", "hand: medium-light tone", "nose: light tone", "ear: dark tone"]
    assert attribute_groups(asked, tones, data) == [(1, 1, [0, 1, 2]), (3, 2, [3, 4, 5])]


def test_attribute_retrieval_compares_with_a_pictures_own_candidates() -> None:
    candidates = torch.stack([flat(0.0, 0.5, 1.0), flat(-1.0, -0.5, 0.4)])
    assert attribute_retrieval(flat(0.45, 0.45), candidates, [1, 2]) == 1.0
    assert attribute_retrieval(flat(0.45, 0.45), candidates, [1, 0]) == 0.5


def test_memorisation_is_one_for_new_pictures_and_zero_for_copies() -> None:
    train, held_out, new = pictures(40, 1), pictures(40, 2), pictures(40, 3)
    fresh = memorisation(new, train, held_out)
    assert fresh.ratio == pytest.approx(1, abs=0.02)
    copied = memorisation(train[:20], train, held_out)
    assert (copied.ratio, copied.copies, copied.generated) == (0.0, 1.0, 0.0)
    assert memorisation(held_out, train, held_out).copies == pytest.approx(0.05, abs=0.03)
    alone = memorisation(new, train, None)  # each training picture beside the others
    assert alone.ratio == pytest.approx(1, abs=0.02)
    assert memorisation(train[:20], train, None).ratio == 0.0


def test_numbers_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="2 images for 1 labels"):
        caption_retrieval(flat(0, 1), ["a"], flat(0), ["a"])
    with pytest.raises(ValueError, match="empty"):
        memorisation(flat(0), flat(0), pictures(0))
