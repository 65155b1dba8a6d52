"""The order of images of several sizes."""

from __future__ import annotations

import pytest
import torch

from latentflow.training.loop.data_order import DataOrder, grouped_permutation, seeded

COUNTS = {
    "usual": (70, 33, 20, 5, 1, 1),
    "one group": (64,),
    "fewer than a batch": (3, 2),
    "nothing fills a batch": (5, 6, 7, 4, 3, 2, 5, 6),
    "nothing is left over": (16, 32, 16),
}
BATCH = 16


def groups_of(name: str) -> torch.Tensor:
    groups = torch.repeat_interleave(torch.arange(len(COUNTS[name])), torch.tensor(COUNTS[name]))
    return groups[torch.randperm(len(groups), generator=seeded(1, 0, 0))]


@pytest.mark.parametrize("name", COUNTS)
def test_every_epoch_uses_each_sample_once_and_most_batches_are_of_one_group(name: str) -> None:
    groups = groups_of(name)
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
    groups = groups_of("usual")
    first, second = (grouped_permutation(groups, 0, BATCH, seeded(0, 0, epoch)) for epoch in range(2))
    assert (first == second).float().mean() < 0.1
    companies = [
        {frozenset(batch.tolist()) for batch in order[:128].view(-1, BATCH)} for order in (first, second)
    ]
    assert not companies[0] & companies[1]


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (4, 1), (1, 4), (2, 2)])
def test_steps_have_the_same_samples_for_any_number_of_processes(processes: int, accumulation: int) -> None:
    groups = groups_of("usual")

    def steps(processes: int, accumulation: int, first: int = 0) -> list[list[tuple[int, int]]]:
        order = DataOrder(
            size=len(groups), batch_size=BATCH // processes // accumulation, accumulation=accumulation,
            processes=processes, seed=3, groups=groups,
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
    assert steps(processes, accumulation, first=17) == alone[17:]  # resumed
    used = [index for step in alone for _, index in step][: 3 * len(groups)]
    assert sorted(used) == sorted(list(range(len(groups))) * 3)  # exact epochs
