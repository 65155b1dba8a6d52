"""The order of samples, also of several sizes."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from latentflow.training.loop.data_order import DataOrder, grouped_permutation, seeded
from latentflow.training.loop.loader import samples_per_epoch


def flat(order: DataOrder, first: int, last: int, process: int = 0) -> list[tuple[int, int]]:
    return [(draw.index, draw.sample_id) for batch in order.batches(first, last, process) for draw in batch]


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = {
        tuple(i for i, _ in flat(DataOrder(size=20, batch_size=20, seed=seed), e, e + 1))
        for seed in (0, 1)
        for e in (0, 1)
    }
    assert len(orders) == 4


def test_islice_of_the_order_is_lazy() -> None:
    endless = DataOrder(size=5, batch_size=2).batches(0, 10**12, 0)
    assert len(list(islice(endless, 3))) == 3


# ---- samples of several groups, such as sizes ----

COUNTS = {
    "usual": (70, 33, 20, 5, 1, 1),
    "one group": (64,),
    "fewer than a batch": (3, 2),
    "nothing fills a batch": (5, 6, 7, 4, 3, 2, 5, 6),
    "nothing is left over": (16, 32, 16),
}
BATCH = 16


def shuffled_groups(name: str) -> torch.Tensor:
    groups = torch.repeat_interleave(torch.arange(len(COUNTS[name])), torch.tensor(COUNTS[name]))
    return groups[torch.randperm(len(groups), generator=seeded(1, 0, 0))]


@pytest.mark.parametrize("name", COUNTS)
def test_every_epoch_uses_each_sample_once_and_most_batches_are_of_one_group(name: str) -> None:
    groups = shuffled_groups(name)
    size, epochs = len(groups), 12
    flat = torch.cat(
        [grouped_permutation(groups, epoch * size, BATCH, seeded(0, 0, epoch)) for epoch in range(epochs)]
    )
    for epoch in flat.view(epochs, size):
        assert torch.equal(epoch.sort().values, torch.arange(size))
    batches = groups[flat[: len(flat) // BATCH * BATCH].view(-1, BATCH)]
    mixed = (batches != batches[:, :1]).any(1).sum().item() / epochs
    left_over = sum(count % BATCH for count in COUNTS[name]) + BATCH
    assert mixed <= left_over / BATCH + 2


def test_order_and_company_change_from_epoch_to_epoch() -> None:
    groups = shuffled_groups("usual")
    first, second = (grouped_permutation(groups, 0, BATCH, seeded(0, 0, epoch)) for epoch in range(2))
    assert (first == second).float().mean() < 0.1
    companies = [
        {frozenset(batch.tolist()) for batch in order[:128].view(-1, BATCH)} for order in (first, second)
    ]
    assert not companies[0] & companies[1]


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (4, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("groups", [torch.zeros(31), shuffled_groups("usual")], ids=["one", "several"])
def test_steps_have_the_same_samples_for_any_number_of_processes(
    processes: int, accumulation: int, groups: torch.Tensor
) -> None:
    """Also when resumed at any step; every epoch has each sample exactly once, and batches run on across its end."""
    size = len(groups)

    def steps(processes: int, accumulation: int, first: int = 0) -> list[list[tuple[int, int]]]:
        order = DataOrder(
            size=size, batch_size=BATCH // processes // accumulation, accumulation=accumulation,
            processes=processes, seed=3, groups=groups if groups.any() else None,
        )  # fmt: skip
        parts = [list(order.batches(first, 30, process)) for process in range(processes)]
        return [
            sorted(
                (draw.sample_id, draw.index)
                for part in parts
                for micro in part[step * accumulation : (step + 1) * accumulation]
                for draw in micro
            )
            for step in range(30 - first)
        ]

    alone = steps(1, 1)
    assert steps(processes, accumulation) == alone
    for first in (1, 17, 29):
        assert steps(processes, accumulation, first) == alone[first:]
    used = [draw for step in alone for draw in step]
    assert [number for number, _ in used] == list(range(30 * BATCH))
    for epoch in range(30 * BATCH // size):
        within = used[epoch * size : (epoch + 1) * size]
        assert sorted(index for _, index in within) == list(range(size))


def test_an_epoch_is_one_use_of_the_users_images() -> None:
    """75 images of the user and 200 others that make up half of every step: 150 samples use each of the 75 once."""

    class Data(list[int]):
        mixin_count, mixin_share = 200, 0.5

    assert samples_per_epoch(Data(range(275))) == 150  # type: ignore[arg-type]
    assert samples_per_epoch(list(range(75))) == 75  # type: ignore[arg-type]
