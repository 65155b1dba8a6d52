"""The random numbers of samples: published vectors, distributions, and what they may depend on."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from latentflow.config import LoopConfig
from latentflow.errors import UserError
from latentflow.training.data import generator_as_begun
from latentflow.training.loop import random_numbers
from latentflow.training.loop.random_numbers import (
    RANDOM_NUMBERS,
    CounterRandom,
    MakeRandom,
    TwisterRandom,
    box_muller,
    middles,
    philox,
)

# Counter, key and output of Philox4x32-10 in the known answers of Random123, the authors' library.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
every_generator = pytest.mark.parametrize("make", RANDOM_NUMBERS.values(), ids=RANDOM_NUMBERS)


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("library", [np.array, torch.tensor])
@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_philox_gives_the_published_words(library, counter: str, key: str, output: str) -> None:
    first, second = words(key)
    found = philox(tuple(library([word]) for word in words(counter)), (first, second))
    assert [int(word[0]) for word in found] == words(output)


@every_generator
def test_a_row_depends_on_seed_and_sample_alone(make: MakeRandom) -> None:
    """Not on the batch, the order of its rows, or how the process came to it."""
    ids = [4, 2**40 + 5, 6]
    together, reordered = make(0, ids, "cpu"), make(0, ids[::-1], "cpu")
    numbers = [draw(together) for draw in DRAWS]
    for found, other in zip(numbers, [draw(reordered) for draw in DRAWS], strict=True):
        assert torch.equal(found, other.flip(0))
    for row, number in enumerate(ids):
        alone = make(0, [number], "cpu")
        assert all(
            torch.equal(draw(alone)[0], found[row]) for draw, found in zip(DRAWS, numbers, strict=True)
        )
    for seed, number in ((1, 4), (0, 5)):
        other = make(seed, [number], "cpu")
        assert not any(
            torch.equal(draw(other)[0], found[0]) for draw, found in zip(DRAWS, numbers, strict=True)
        )


DRAWS = (
    lambda random: random.uniform(),
    lambda random: random.normal((2, 3)),
    lambda random: random.uniform(),
    lambda random: random.uniform(),
    lambda random: random.normal((5,)),
    lambda random: random.uniforms((2, 3)),
    lambda random: random.uniforms((3,)),
)


def test_the_kinds_of_numbers_do_not_disturb_each_other() -> None:
    """The n-th normal draw is the same however many uniform ones came before, and of however many numbers."""
    plain, mixed = CounterRandom(3, [1, 2]), CounterRandom(3, [1, 2])
    first, second = plain.normal((7,)), plain.normal((7,))
    mixed.uniform(), mixed.uniform(), mixed.uniform()
    assert torch.equal(mixed.normal((9,))[:, :7], first)
    mixed.uniform()
    mixed.uniforms((4,))
    assert torch.equal(mixed.normal((3,)), second[:, :3])
    assert not torch.isclose(mixed.uniforms((4,)), CounterRandom(3, [1, 2]).uniforms((4,))).any()
    assert torch.equal(CounterRandom(3, [1, 2]).uniforms((5,))[:, :3], plain.uniforms((3,)))


def test_seeds_of_more_than_32_bits_count() -> None:
    draws = [CounterRandom(seed, [0]).uniform().item() for seed in (5, 5 + 2**32, 5 - 2**63)]
    assert len({*draws}) == 3


@every_generator
def test_distributions_over_samples_and_within_them(make: MakeRandom) -> None:
    """Kolmogorov and Smirnov's test, moments and correlations within 4.5 standard errors, for a fixed seed."""
    random = make(7, list(range(4000)), "cpu")
    drawn, uniform = random.normal((64,)).double(), torch.stack([random.uniform() for _ in range(4)], 1)
    assert uniform.dtype == torch.float64 and uniform.min() > 0 and uniform.max() < 1
    tokens = random.uniforms((3, 3)).flatten(1)
    assert tokens.dtype == torch.float64 and tokens.min() > 0 and tokens.max() < 1
    for numbers, name in ((drawn, "norm"), (uniform, "uniform"), (tokens, "uniform")):
        for part in (numbers[:, 0], numbers[:, -1], numbers.flatten()):
            assert stats.kstest(part.numpy(), name).pvalue > 1e-3
    size = drawn.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float(drawn.pow(power).mean()) - moment) < 4.5 * math.sqrt(variance / size), power
    for numbers in (drawn, *(torch.from_numpy(stats.norm.ppf(part.numpy())) for part in (uniform, tokens))):
        places = torch.corrcoef(numbers.T)
        places.fill_diagonal_(0)  # of the numbers of a sample with one another
        assert float(places.abs().max()) < 4.5 / math.sqrt(len(numbers))
        neighbours = float((numbers[:-1] * numbers[1:]).mean())  # of samples that follow one another
        assert abs(neighbours) < 4.5 / math.sqrt(numbers[1:].numel())


def test_uniform_numbers_never_reach_an_end() -> None:
    for library in (np.array, torch.tensor):
        ends = middles(library([0, 2**32 - 1]), library([0, 2**32 - 1]))
        assert ends.tolist() == [2.0**-53, 1 - 2.0**-53]


@every_generator
def test_a_device_without_float64_gets_float32_that_reaches_no_end(
    make: MakeRandom, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = list(range(64))
    usual = [make(7, ids, "cpu").uniform(), make(7, ids, "cpu").uniforms((5,))]
    monkeypatch.setattr(random_numbers, "time_dtype", lambda device: torch.float32)
    found = [make(7, ids, "cpu").uniform(), make(7, ids, "cpu").uniforms((5,))]
    for numbers, exact in zip(found, usual, strict=True):
        assert numbers.dtype == torch.float32 and exact.dtype == torch.float64
        torch.testing.assert_close(numbers.double(), exact, atol=2.0**-23, rtol=0)
    ends = middles(torch.tensor([0, 2**32 - 1]), torch.tensor([0, 2**32 - 1]))
    assert float(ends[0]) > 0 and float(ends[1]) < 1


def test_neighbouring_seeds_are_independent() -> None:
    drawn = torch.stack([CounterRandom(seed, list(range(200))).normal((50,)).flatten() for seed in range(8)])
    correlation = torch.corrcoef(drawn.double())
    correlation.fill_diagonal_(0)
    assert float(correlation.abs().max()) < 4.5 / 100


def test_the_tails_of_normal_numbers_end_where_it_is_said() -> None:
    """The smallest and the largest words: no infinity, no NaN, and nothing beyond 6.77."""
    for library in (np.array, torch.tensor):
        first, second = (library([0, 0, 1, 2**32 - 1, 2**32 - 1]), library([0, 2**31, 2**32 - 1, 0, 2**30]))
        pairs = torch.stack([torch.as_tensor(part) for part in box_muller(first, second)])
        assert pairs.dtype == torch.float32 and bool(pairs.isfinite().all())
        assert 6.7 < float(pairs.abs().max()) <= 6.77


def test_numbers_in_float64_agree_with_those_of_the_formula() -> None:
    """What rounding to float32 leaves: below 1e-6 in the mean; most where the radius is next to 0, below 1e-4."""
    a, b = (np.random.default_rng(0).integers(0, 2**32, 10**5) for _ in range(2))
    radius, angle = np.sqrt(-2 * np.log((a + 0.5) / 2**32)), 2 * np.pi * b / 2**32
    for kind in (a, b), (torch.from_numpy(a), torch.from_numpy(b)):
        cosines, sines = (torch.as_tensor(part).double().numpy() for part in box_muller(*kind))
        for errors in (cosines - radius * np.cos(angle), sines - radius * np.sin(angle)):
            assert np.sqrt((errors**2).mean()) < 1e-6 and np.abs(errors).max() < 1e-4


@pytest.mark.gpu
def test_a_gpu_draws_the_same_numbers() -> None:
    ids = [0, 7, 2**33, 2**62]
    here, there = CounterRandom(11, ids), CounterRandom(11, ids, "cuda")
    assert torch.equal(here.uniform(), there.uniform().cpu())
    normal = there.normal((4, 32, 32))
    assert normal.is_cuda
    torch.testing.assert_close(normal.cpu(), here.normal((4, 32, 32)), rtol=0, atol=4e-6)
    counter = tuple(torch.randint(2**32, (1000,)) for _ in range(4))
    for word, other in zip(
        philox(counter, (1, 2)), philox(tuple(part.cuda() for part in counter), (1, 2)), strict=True
    ):
        assert torch.equal(word, other.cpu())


def test_runs_of_before_keep_their_generator(tmp_path: Path) -> None:
    config, file = LoopConfig(), tmp_path / "config.yaml"
    assert generator_as_begun(config, tmp_path, []).random_numbers == "philox"  # nothing was begun
    file.write_text("data: cats\n")  # by a version that knew no other
    begun = generator_as_begun(config, tmp_path, [])
    assert begun == dataclasses.replace(config, random_numbers="mersenne-twister")
    assert generator_as_begun(config, tmp_path, ["random_numbers"]) == config  # asked for
    file.write_text("random_numbers: philox\n")
    assert generator_as_begun(begun, tmp_path, []) == config
    file.write_text("random_numbers: dice\n")
    with pytest.raises(UserError, match="dice"):
        generator_as_begun(config, tmp_path, [])


UNIFORM = [0.49998434070375763, 0.22531551228919933]
NORMAL = [-0.28038445115089417, -1.9519009590148926, 0.6055848598480225, 0.47405606508255005]
COUNTED_UNIFORM = [0.47929232265043653, 0.9957937774093163]
COUNTED_NORMAL = [0.16142624616622925, 0.3146352469921112, 1.0607932806015015, -0.11093154549598694]


def test_numbers_of_before_are_what_they_were() -> None:
    """Recorded in November 2026: resumed runs go on with them."""
    random = TwisterRandom(3, [5, 6])
    assert random.uniform().tolist() == pytest.approx(UNIFORM, abs=0)
    assert random.normal((2,)).flatten().tolist() == pytest.approx(NORMAL, abs=1e-6)


def test_numbers_of_now_stay_what_they_are() -> None:
    random = CounterRandom(3, [5, 6])
    assert random.uniform().tolist() == pytest.approx(COUNTED_UNIFORM, abs=0)
    assert random.normal((2,)).flatten().tolist() == pytest.approx(COUNTED_NORMAL, abs=2e-6)
