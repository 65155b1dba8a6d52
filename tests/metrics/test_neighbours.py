"""Feature spaces, retrieval and memorisation, on images whose neighbours are known."""

from __future__ import annotations

import pytest
import torch

from latentflow.errors import UserError
from latentflow.evaluation.feature_figures import combinations
from latentflow.metrics import (
    attribute_groups,
    attribute_retrieval,
    distances,
    features,
    memorisation,
    retrieve,
    split_attributes,
)


def images(n: int, seed: int = 0, side: int = 32) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def flat(*levels: float) -> torch.Tensor:
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 32, 32)


def test_features_are_the_area_mean_pixels_without_aliasing() -> None:
    assert features(images(2, side=64), "pixels-16").shape == (2, 3 * 16 * 16)
    assert torch.equal(features(images(2), "pixels-32"), images(2).flatten(1))
    torch.testing.assert_close(features(flat(0.3, -0.7), "pixels-16")[:, 0], torch.tensor([0.3, -0.7]))
    with pytest.raises(UserError, match="pixels-16"):
        features(images(1), "pixel-16")
    stripes = torch.ones(1, 3, 64, 64)  # of one pixel become grey, not one of the two colours
    stripes[..., ::2] = -1
    inner = features(stripes, "pixels-16").view(3, 16, 16)[:, 2:-2, 2:-2]
    assert inner.abs().max() < 0.1


def test_distances_keep_small_differences() -> None:
    rows = features(images(3))
    assert torch.equal(distances(rows, rows).diagonal(), torch.zeros(3))
    assert distances(rows, rows + 1e-5)[0, 0] == pytest.approx(1e-5 * rows.shape[1] ** 0.5, rel=0.05)


def test_caption_retrieval_counts_the_nearest_captions() -> None:
    data = flat(0.0, 0.1, 0.2, 0.3, 0.9)
    names = ["a", "b", "c", "d", "e"]
    generated = flat(0.01, 0.11, 0.12, 0.01)
    shares = retrieve(generated, ["a", "b", "c", "e"], data, names, tops=(1, 2, 5)).shares
    assert shares == {1: 0.5, 2: 0.75, 5: 1.0}
    assert retrieve(data, names, data, names).shares == {1: 1.0, 5: 1.0}
    several, names = flat(0.0, 0.5, 1.0), ["hat", "shoe", "hat"]  # images of one caption
    assert retrieve(flat(0.9, 0.1, 0.4), ["hat"] * 3, several, names).shares[1] == pytest.approx(2 / 3)


def test_attribute_groups_take_the_longest_attribute_and_need_every_counterpart() -> None:
    tones = ["light tone", "medium-light tone", "dark tone"]
    data = [f"{thing}: {tone}" for thing in ("hand", "ear") for tone in tones] + ["nose: light tone", "apple"]
    asked = ["apple", "hand: medium-light tone", "nose: light tone", "ear: dark tone"]
    assert attribute_groups(asked, tones, data) == [(1, 1, [0, 1, 2]), (3, 2, [3, 4, 5])]
    data = ["red hat", "blue hat", "bored cat", "bobluecat"]  # attributes are whole words
    assert attribute_groups(["red hat", "bored cat"], ["red", "blue"], data) == [(0, 0, [0, 1])]
    spelled = ["café noir", "cafe\u0301 blanc"]  # Unicode's two spellings
    assert attribute_groups(spelled, ["noir", "blanc"], spelled) == [(0, 0, [0, 1]), (1, 1, [0, 1])]
    assert attribute_groups(["cafe\u0301"], ["café", "tea"], ["café", "tea"]) == [(0, 0, [0, 1])]


def test_attribute_retrieval_compares_with_an_images_own_candidates() -> None:
    candidates = torch.stack([flat(0.0, 0.5, 1.0), flat(-1.0, -0.5, 0.4)])
    assert attribute_retrieval(flat(0.45, 0.45), candidates, [1, 2]) == 1.0
    assert attribute_retrieval(flat(0.45, 0.45), candidates, [1, 0]) == 0.5


def test_equal_images_under_several_captions_are_found_under_each() -> None:
    data, names = flat(0.2, 0.2, 0.2, 0.9), ["a", "b", "c", "d"]
    for caption in "abc":
        assert retrieve(flat(0.2), [caption], data, names, tops=(1, 2)).shares == {1: 1.0, 2: 1.0}
    # Three are nearer than the fourth.
    assert retrieve(flat(0.2), ["d"], data, names, tops=(1, 3, 4)).shares == {1: 0.0, 3: 0.0, 4: 1.0}
    assert retrieve(flat(0.2), ["not there"], data, names, tops=(1, 9)).shares == {1: 0.0, 9: 0.0}


def test_chance_is_what_captions_dealt_out_at_random_get() -> None:
    data = flat(*[0.1] * 5, *[0.9] * 5)
    names = ["common"] * 5 + ["rare"] * 5
    asked = ["common"] * 19 + ["rare"]  # and "common" is drawn whatever is asked
    found = retrieve(flat(*[0.1] * 20), asked, data, names)
    assert (found.n, found.hits) == (20, {1: 19, 5: 19})
    assert found.chance == pytest.approx({1: 0.95, 5: 0.95})
    right = retrieve(flat(*[0.1] * 19, 0.9), asked, data, names)
    assert right.hits[1] == 20 and right.chance[1] == pytest.approx(0.95**2 + 0.05**2)


# ---------------------------------------------------------------- memorisation


def test_memorisation_is_one_for_new_images_and_zero_for_copies() -> None:
    train, held_out, new = images(60, 1), images(60, 2), images(60, 3)
    fresh = memorisation(new, train, held_out)
    assert (fresh.new, fresh.compared, fresh.drawn) == ("held out", 60, 60)
    assert fresh.ratio == pytest.approx(1, abs=0.02)
    copied = memorisation(train[:20], train, held_out)
    assert (copied.ratio, copied.copies, copied.copied, copied.generated) == (0.0, 1.0, 20, 0.0)
    assert memorisation(held_out, train, held_out).copies == pytest.approx(0.05, abs=0.02)
    alone = memorisation(new, train, None)  # each training image beside the others
    assert (alone.new, alone.compared) == ("left out", 60)
    assert alone.ratio == pytest.approx(1, abs=0.02)
    assert memorisation(train[:20], train, None).ratio == 0.0


@pytest.mark.parametrize("held_out", [0, 10, 60])
@pytest.mark.parametrize("blur", [0.0, 1e-3])
def test_copies_of_what_is_in_the_data_twice_are_copies(held_out: int, blur: float) -> None:
    """All of it, some of it; also where the held-out images are among the training images."""
    once = images(30, 1)
    for train in (once.repeat(2, 1, 1, 1), torch.cat([once, once[:5], once[:5]])):
        fresh = torch.cat([train[:5], images(held_out, 2)]) if held_out else None
        found = memorisation(train + blur * images(len(train), 3), train, fresh)
        assert (found.copies, found.copied) == (1.0, len(train))
        assert found.ratio < 0.01


@pytest.mark.parametrize("held_out", [10, 50, 500])
def test_new_images_are_copies_as_often_as_is_expected(held_out: int) -> None:
    """Over many draws of everything the mean is the nominal 5 %, and 95 of 100 shares lie where they usually do."""
    generator = torch.Generator().manual_seed(held_out)

    def images(n: int) -> torch.Tensor:  # of few degrees of freedom, as real images are
        return (torch.randn(n, 3, 4, 4, generator=generator) / 4).clamp(-1, 1)

    found = [memorisation(images(100), images(120), images(held_out), space="pixels-16") for _ in range(40)]
    assert {measured.new for measured in found} == {"held out" if held_out >= 50 else "left out"}
    assert all(measured.expected == pytest.approx(0.05) for measured in found)
    assert sum(measured.copies for measured in found) / 40 == pytest.approx(0.05, abs=0.015)
    inside = [measured.usual[0] <= measured.copies <= measured.usual[1] for measured in found]
    assert sum(inside) >= 35  # of 40; 38 are expected
    assert all(measured.usual[1] < 0.25 for measured in found)


def test_very_few_images_say_how_little_they_say() -> None:
    found = memorisation(images(10, 1), images(4, 2), None)
    assert found.expected == 1 / 5  # of 4 new images' distances the smallest is the threshold
    assert found.usual[0] == 0 and found.usual[1] >= 0.6


# ---------------------------------------------------------------- what is no image


def test_numbers_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="2 images for 1 labels"):
        retrieve(flat(0, 1), ["a"], flat(0), ["a"])
    for generated, train in ((flat(0), flat(0, 0)), (flat(0)[:0], flat(0, 1))):
        with pytest.raises(ValueError, match="different training images"):
            memorisation(generated, train, images(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_no_images(value: float) -> None:
    broken = flat(0.0, 0.5, 0.5).clone()
    broken[1, 0, 3, 4] = value
    fine = flat(0.1, 0.2, 0.3)
    for measure in (
        lambda: features(broken),
        lambda: memorisation(broken, fine, None),
        lambda: retrieve(fine, list("abc"), broken, list("abc")),
        lambda: attribute_retrieval(broken, torch.stack([fine, fine], dim=1), [0, 1, 0]),
    ):
        with pytest.raises(UserError, match=r"1 of 3 images .* first number 1"):
            measure()


def test_attributes_are_split_from_captions() -> None:
    found = split_attributes(["flat style: red hat", "hat", "3d style: red hat"], ["flat style", "3d style"])
    assert found[1] is None and found[0] is not None and found[2] is not None
    assert found[0][0] == found[2][0] and (found[0][1], found[2][1]) == (0, 1)
    assert split_attributes(["big hat, big"], ["big"]) != split_attributes(["hat, big"], ["big"])


def test_unseen_combinations_by_hand() -> None:
    """Styles lie 10 apart on the first axis, things 1 apart on the second."""
    styles, things = ["flat", "solid"], ["hat", "cat", "cup", "bow"]
    captions = [f"{style} {thing}" for style in styles for thing in things]
    rows = torch.tensor([[10.0 * style, thing] for style in range(2) for thing in range(4)])
    asked = [0, 5, 3]  # flat hat, solid cat, flat bow
    kept = [row for row in range(8) if row not in asked]
    generated = torch.tensor([[1.0, 0.1], [3.0, 2.2], [2.0, 2.9]])  # right; neither is right; right
    found = combinations(
        generated, rows[asked], [captions[i] for i in asked], rows[kept], [captions[i] for i in kept], styles
    )
    assert found["attribute"]["count"] == 2 and found["attribute"]["real"]["share"] == 1
    assert found["rest"]["count"] == 2 and found["rest"]["n"] == 3 and found["rest"]["real"]["share"] == 1
    assert found["caption"]["count"] == 2
    only_here = combinations(
        rows[:1], rows[:1], ["flat tie"], rows[kept], [captions[i] for i in kept], styles
    )
    assert only_here["rest"]["share"] is None and only_here["caption"]["share"] == 1
