"""The precision that a run takes by itself."""

from __future__ import annotations

import pytest
import torch

from latentflow.training.loop import distributed as precision
from latentflow.training.loop.optimizers import orthogonalise

CPU = torch.device("cpu")


@pytest.mark.parametrize(("fast", "chosen"), [(True, "bf16"), (False, "no")])
def test_auto_is_bfloat16_where_the_device_computes_in_it(
    fast: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda device: fast)
    assert precision.resolve("auto", CPU) == chosen
    assert precision.resolve("no", CPU) == "no" and precision.resolve("bf16", CPU) == "bf16"


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_muon_does_not_emulate_bfloat16(
    fast: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU without it, bfloat16 matrix products take up to 70 times as long as those in float32."""
    monkeypatch.setattr("latentflow.training.loop.optimizers.has_fast_bfloat16", lambda device: fast)
    assert orthogonalise(torch.randn(1, 4, 8)).dtype == dtype


def test_this_machine_is_asked() -> None:
    assert precision.has_fast_bfloat16(CPU) is bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert not precision.has_fast_bfloat16(torch.device("meta"))
