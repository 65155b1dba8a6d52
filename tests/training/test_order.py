"""Which sample is used when, and which random numbers go with it."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch
from scipy import stats

from latentflow.training.loop.data_order import DataOrder, SampleRandom


def flat(order: DataOrder, first: int, last: int, process: int = 0) -> list[tuple[int, int]]:
    return [(draw.index, draw.sample_id) for batch in order.batches(first, last, process) for draw in batch]


def test_every_epoch_uses_every_sample_exactly_once() -> None:
    order = DataOrder(size=10, batch_size=4, seed=3)  # 10 is no multiple of 4: batches run across epoch ends
    draws = flat(order, 0, 25)  # 100 draws = 10 epochs
    assert [number for _, number in draws] == list(range(100))
    assert set(Counter(index for index, _ in draws).values()) == {10}
    for epoch in range(10):
        assert sorted(index for index, number in draws if number // 10 == epoch) == list(range(10))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = {
        tuple(i for i, _ in flat(DataOrder(size=20, batch_size=20, seed=seed), e, e + 1))
        for seed in (0, 1)
        for e in (0, 1)
    }
    assert len(orders) == 4


def test_resuming_at_any_step_continues_the_same_order() -> None:
    order = DataOrder(size=7, batch_size=3, accumulation=2, seed=1)
    whole = flat(order, 0, 9)
    for step in range(9):
        assert flat(order, step, 9) == whole[step * order.global_batch :]


@pytest.mark.parametrize(("processes", "batch", "accumulation"), [(2, 6, 1), (3, 4, 1), (2, 3, 2), (1, 4, 3)])
def test_a_step_covers_the_same_samples_whatever_the_processes(
    processes: int, batch: int, accumulation: int
) -> None:
    single = DataOrder(size=31, batch_size=12, seed=5)
    shared = DataOrder(size=31, batch_size=batch, accumulation=accumulation, processes=processes, seed=5)
    for step in range(6):
        parts = [draw for process in range(processes) for draw in flat(shared, step, step + 1, process)]
        assert sorted(parts, key=lambda draw: draw[1]) == flat(single, step, step + 1)
        assert len(set(parts)) == 12


def test_random_numbers_depend_on_the_draw_alone() -> None:
    together = SampleRandom(0, [4, 5, 6])
    uniform, normal = together.uniform(), together.normal((2, 3))
    for row, number in enumerate([4, 5, 6]):
        alone = SampleRandom(0, [number])
        assert torch.equal(alone.uniform()[0], uniform[row])
        assert torch.equal(alone.normal((2, 3))[0], normal[row])
    assert not torch.equal(SampleRandom(1, [4]).uniform(), uniform[:1])


def test_random_numbers_are_uniform_and_normal_across_draws() -> None:
    # Neighbouring seeds must not give related streams: Kolmogorov-Smirnov over 4,000 draws, one number each.
    random = SampleRandom(7, list(range(4000)))
    assert stats.kstest(random.uniform().numpy(), "uniform").pvalue > 1e-3
    normal = random.normal((1,)).flatten()
    assert stats.kstest(normal.numpy(), "norm").pvalue > 1e-3
    assert abs(float(torch.corrcoef(torch.stack([normal[:-1], normal[1:]]))[0, 1])) < 0.06  # 3.8 sigma


def test_islice_of_the_order_is_lazy() -> None:
    endless = DataOrder(size=5, batch_size=2).batches(0, 10**12, 0)
    assert len(list(islice(endless, 3))) == 3
