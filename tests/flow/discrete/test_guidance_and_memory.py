"""Guidance on log-probabilities, and the memory that a step of a sampler takes beside its logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from latentflow.errors import UserError
from latentflow.flow import tensors
from latentflow.flow.discrete import (
    SAMPLERS,
    LinearKappa,
    Logits,
    MetricPath,
    MixturePath,
    UniformSource,
    guidance,
    guide,
    guide_batched,
    simulate,
)
from latentflow.flow.discrete.categorical import draw_by_rows

from ..closed_forms import seeded

PATH = MixturePath(4, LinearKappa(), UniformSource())


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    generator = seeded()
    conditional, unconditional = (
        torch.randn(3, 2, 4, generator=generator, dtype=torch.float64) for _ in "cu"
    )
    return conditional, unconditional


def guided_pair(pair, scale, interval=(0.0, 1.0), batched=False):
    """The guided posterior, and a list of what was evaluated."""
    calls: list[str] = []

    def posterior(name: str, value: Tensor):
        def evaluate(x: Tensor, t: Tensor) -> Tensor:
            calls.append(name)
            return value

        return evaluate

    c, u = posterior("c", pair[0]), posterior("u", pair[1])
    if not batched:
        return guide(c, u, scale, interval), calls
    return guide_batched(posterior("both", torch.cat(pair)), c, scale, interval), calls


@pytest.mark.parametrize("batched", [False, True])
def test_guided_probabilities_are_powers_of_those_given(pair, batched: bool) -> None:
    x, t = torch.zeros(3, 2, dtype=torch.int64), torch.tensor(0.5, dtype=torch.float64)
    c, u = (value.softmax(-1) for value in pair)
    scales = torch.tensor([1.0, 3.0, 0.5])
    for scale in (3.0, scales):
        posterior, calls = guided_pair(pair, scale, batched=batched)
        w = torch.as_tensor(scale).double().reshape(-1, 1, 1)
        expected = c**w * u ** (1 - w)
        got = posterior(x, t).dense().softmax(-1)
        torch.testing.assert_close(got, expected / expected.sum(-1, keepdim=True), atol=1e-12, rtol=0)
        assert calls == (["both"] if batched else ["c", "u"])
    torch.testing.assert_close(got[0], c[0], atol=1e-12, rtol=0)  # scale 1


def test_outside_of_the_interval_only_the_condition_is_evaluated(pair) -> None:
    posterior, calls = guided_pair(pair, 2.0, (0.2, 0.6))
    x = torch.zeros(3, 2, dtype=torch.int64)
    for t, names in ((0.1, ["c"]), (0.2, ["c", "u"]), (0.6, ["c", "u"]), (0.7, ["c"])):
        calls.clear()
        posterior(x, torch.tensor(t, dtype=torch.float64))
        assert calls == names
    rows = posterior(x, torch.tensor([0.1, 0.3, 0.9], dtype=torch.float64)).dense()
    torch.testing.assert_close(rows[[0, 2]], pair[0][[0, 2]])
    assert not torch.allclose(rows[1], pair[0][1])
    posterior, calls = guided_pair(pair, 1.0)
    posterior(x, torch.tensor(0.5))
    assert calls == ["c"]


def test_an_impossible_token_stays_impossible_and_nothing_becomes_nan() -> None:
    inf = torch.inf
    c = torch.tensor([[[0.0, -inf, 1.0, -inf]]])
    u = torch.tensor([[[1.0, 0.0, -inf, -inf]]])
    rows = Logits(c, u, torch.tensor(2.0)).dense()
    assert rows[0, 0].tolist() == [-2.0, -inf, 1.0, -inf]


@pytest.mark.parametrize("corrector", [0.0, 2.0])
def test_guided_sampling_is_sampling_of_the_guided_logits(pair, corrector: float) -> None:
    x, times = torch.zeros(3, 2, dtype=torch.int64), [0.0, 0.4, 1.0]
    posterior, _ = guided_pair(pair, 2.5)
    logits = pair[0] + 1.5 * (pair[0] - pair[1])
    options = {"path": PATH, "corrector": corrector}
    lazily = simulate(posterior, x, times, generator=seeded(), **options)
    assert torch.equal(lazily, simulate(lambda x, t: logits, x, times, generator=seeded(), **options))


def test_mistakes_are_named(pair) -> None:
    with pytest.raises(UserError, match="guidance scale"):
        guided_pair(pair, float("nan"))
    with pytest.raises(UserError, match="guidance interval"):
        guided_pair(pair, 2.0, (0.5, 0.1))
    posterior, _ = guided_pair(pair, torch.ones(2) * 2)
    with pytest.raises(ValueError, match="one per row"):
        posterior(torch.zeros(3, 2).long(), torch.tensor(0.5))
    with pytest.raises(ValueError, match="one per row"):
        guided_pair(pair, torch.ones(2, 2))


def test_draws_skip_weights_of_0_and_follow_the_others() -> None:
    weights = torch.tensor([[0.0, 2.0, 0.0, 6.0, 0.0]]).expand(1000, -1)
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    u[0], u[-1] = 0.0, 1.0 - 2.0**-53
    drawn = draw_by_rows(lambda rows: weights[rows], torch.arange(1000), 5, u)
    assert torch.bincount(drawn.place, minlength=5).tolist() == [0, 250, 0, 750, 0]
    assert set(drawn.weight.tolist()) == {2.0, 6.0} and set(drawn.total.tolist()) == {8.0}


# --- memory -------------------------------------------------------------------------------------------------------

VOCABULARY, TOKENS, BATCH = 16_384, 64, 8
LOGITS = VOCABULARY * TOKENS * BATCH * 4  # bytes


def peak_bytes(function) -> int:
    """The most memory that was allocated at a time while ``function`` ran, beyond what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def new_logits(x: Tensor, t: Tensor) -> Tensor:
    return torch.zeros(*x.shape, VOCABULARY)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_step_takes_little_more_than_its_logits(sampler: str) -> None:
    masked = SAMPLERS[sampler].masked
    path = MixturePath(VOCABULARY) if masked else MixturePath(VOCABULARY, LinearKappa(), UniformSource())
    x = path.start(torch.rand(BATCH, TOKENS, generator=seeded(), dtype=torch.float64))
    options = {"path": path, "corrector": 1.0, "generator": seeded()}
    plain = peak_bytes(lambda: simulate(new_logits, x, [0.0, 0.5], sampler, **options))
    assert LOGITS <= plain < 1.2 * LOGITS


@pytest.mark.parametrize("sampler", ["exact", "euler"])
def test_a_step_on_a_metric_path_takes_little_more_than_its_logits(sampler: str) -> None:
    generator = seeded()
    path = MetricPath(torch.randn(VOCABULARY, 4, generator=generator))
    x = path.start(torch.rand(BATCH, TOKENS, generator=generator, dtype=torch.float64))
    options = {"path": path, "corrector": 1.0, "generator": generator}
    plain = peak_bytes(lambda: simulate(new_logits, x, [0.2, 0.5], sampler, **options))
    assert LOGITS <= plain < 1.2 * LOGITS


def test_a_guided_step_takes_little_more_than_its_two_logits() -> None:
    path = MixturePath(VOCABULARY)
    x = path.start(torch.rand(BATCH, TOKENS, generator=seeded(), dtype=torch.float64))
    posterior = guide(new_logits, new_logits, 3.0)
    guided = peak_bytes(lambda: simulate(posterior, x, [0.0, 0.5], path=path, generator=seeded()))
    assert 2 * LOGITS <= guided < 2.2 * LOGITS


def test_logits_of_another_layout_are_not_copied() -> None:
    """Of a network whose output is (B, V, ...), as those of convolutions are."""
    generator = seeded()
    channels_first = torch.randn(2, 5, 3, 4, generator=generator)
    index = torch.tensor([0, 7, 23, 11])
    rows = Logits(channels_first.movedim(1, -1)).rows(index)
    assert torch.equal(rows, channels_first.movedim(1, -1).reshape(-1, 5)[index])
    path = MixturePath(VOCABULARY)
    x = path.start(torch.rand(BATCH, TOKENS, generator=generator, dtype=torch.float64))
    network = lambda x, t: torch.zeros(BATCH, VOCABULARY, TOKENS).movedim(1, -1)  # noqa: E731
    assert peak_bytes(lambda: simulate(network, x, [0.0, 0.5], path=path)) < 1.2 * LOGITS


def test_a_device_without_float64_is_given_none(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Apple's MPS is; "meta" stands for it. Numbers below 1 stay below 1."""
    for module in (tensors, guidance):
        monkeypatch.setattr(
            module, "time_dtype", lambda device: torch.float32 if device.type == "meta" else torch.float64
        )
    x = torch.zeros(3, 2, dtype=torch.int64, device="meta")
    for generator in (seeded(), [seeded() for _ in range(3)]):
        drawn = tensors.uniform_like(x, generator, 2)
        assert drawn.shape == (2, 3, 2) and drawn.dtype == torch.float32
    assert float(torch.tensor((1.0 - 2.0**-53) * (1.0 - 2.0**-24), dtype=torch.float64).float()) < 1.0
    posterior, _ = guided_pair(pair, 2.0)
    assert posterior(x, torch.tensor(0.5)).extra.dtype == torch.float32
