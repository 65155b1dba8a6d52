"""Networks that are trained are compiled block by block on a GPU, and run as they are where nothing compiles."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from latentflow.config import FlowConfig, LoopConfig
from latentflow.models import DiT, UNet
from latentflow.models.dit import DiTBlock
from latentflow.models.norms import layer_norm, rms_norm
from latentflow.training.fine_tune import step_memory
from latentflow.training.loop import compiling
from latentflow.training.loop.compiling import as_written, compile_network, compiles
from latentflow.training.loop.distributed import fast_float32, repeated_blocks
from latentflow.training.losses import flow_loss

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def network(**changes: Any) -> DiT:
    return DiT(in_channels=4, width=16, depth=2, heads=2, **changes)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The modules that were compiled, by a backend that takes no compiler."""
    found: list[nn.Module] = []

    def compile_eagerly(self: nn.Module) -> None:
        found.append(self)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    monkeypatch.setattr(compiling, "_can_compile", lambda device: True)
    return found


@pytest.mark.parametrize(
    ("flags", "device", "expected"),
    [
        ({}, CPU, False),
        ({}, GPU, True),
        ({"compile_on_gpu": False}, GPU, False),
        ({"compile": True}, CPU, True),
    ],
)
def test_the_default_compiles_on_a_gpu_alone(
    flags: dict[str, bool], device: torch.device, expected: bool, compiled: list[nn.Module]
) -> None:
    assert compiles(LoopConfig(**flags), device) is expected


def test_blocks_are_compiled_and_networks_without_any_as_a_whole(compiled: list[nn.Module]) -> None:
    dit, unet = network(), UNet(in_channels=4, channels=(8, 16), layers_per_block=1, head_dim=8)
    for net in (dit, unet):
        compile_network(net, LoopConfig(compile=True), CPU)
    assert [type(part) for part in compiled[:2]] == [DiTBlock] * 2
    assert compiled[2:] == (repeated_blocks(unet) or [unet])


def test_without_a_compiler_the_log_says_so_and_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(function: Any) -> Any:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(logging.getLogger("latentflow"), "propagate", True)
    compiling._can_compile.cache_clear()
    net = network()
    for _ in range(2):  # it is said once
        compile_network(net, LoopConfig(compile=True), CPU)
    compiling._can_compile.cache_clear()
    # A program that ran before may have left its handlers: then a record comes twice.
    (record,) = {id(record): record for record in caplog.records}.values()
    assert "Failed to find C compiler" in record.message and "--no-compile-on-gpu" in record.message
    assert not any(part._compiled_call_impl for part in net.modules())


def test_forward_derivatives_go_through_the_network_as_it_is_written(compiled: list[nn.Module]) -> None:
    """Compiled it has none; a mean-flow loss, whose target is one, is the same with compiled blocks."""
    batch = {
        "latents": torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
        "sample_ids": [*range(6)],
    }
    found = []
    for wanted in (False, True):
        torch.manual_seed(0)
        net = network(interval_conditioning=True)
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.1)
        loss = flow_loss(net, FlowConfig(objective="mean-flow"), 0, samples=600, samples_per_step=6)
        compile_network(net, LoopConfig(compile=wanted), CPU)
        found.append(loss(batch)["loss"])
    assert len(compiled) == 2
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    with pytest.raises((RuntimeError, NotImplementedError)):  # why it must be so
        torch.func.jvp(lambda x: net(x, 0.5), (batch["latents"],), (batch["latents"],))
    with as_written(net):
        torch.func.jvp(lambda x: net(x, 0.5), (batch["latents"],), (batch["latents"],))


def test_autocast_widens_no_norm_of_a_network() -> None:
    """As it would on a GPU, whose rules for norms hold here within `_cuda_precision`."""
    net, seen = network(norm="layer", qk_norm=False, position="sincos"), set()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    for part in net.modules():
        if isinstance(part, nn.Linear) and part.in_features == 16:
            part.register_forward_hook(lambda part, given, output: seen.add(given[0].dtype))
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad(), step_memory._cuda_precision(), torch.autocast("cpu", torch.bfloat16):
        assert F.layer_norm(x.bfloat16(), (8,)).dtype == torch.float32  # what it is kept from
        low = net(x, torch.tensor([0.2, 0.7]))
        assert layer_norm(x.bfloat16()).dtype == torch.bfloat16
    assert seen == {torch.bfloat16}
    high = net(x, torch.tensor([0.2, 0.7])).detach()
    assert float((low - high).norm() / high.norm()) < 0.02


@pytest.mark.parametrize(
    ("device", "precision", "within"), [(GPU, "no", "high"), (GPU, "bf16", "highest"), (CPU, "no", "highest")]
)
def test_float32_runs_multiply_as_tensorfloat32_on_a_gpu_alone(
    device: torch.device, precision: str, within: str
) -> None:
    run: Any = SimpleNamespace(device=device, mixed_precision=precision)
    with pytest.raises(KeyError), fast_float32(run):
        assert torch.get_float32_matmul_precision() == within
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_norms_on_a_gpu_keep_their_type_and_sum_in_float32(norm: Any) -> None:
    x = (100 * torch.randn(4, 300, device="cuda")).bfloat16().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad((y.float() * torch.arange(300, device="cuda")).sum(), x)
    exact = norm(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=2**-7)
    assert gradient.dtype == torch.bfloat16 and bool(gradient.isfinite().all())


@pytest.mark.gpu
def test_compiled_blocks_learn_what_plain_ones_do() -> None:
    """On the GPU: the loss and its gradients agree to the rounding of bfloat16."""
    batch = {"latents": torch.randn(6, 4, 8, 8).cuda(), "sample_ids": [*range(6)]}
    results = []
    for wanted in (False, True):
        torch.manual_seed(0)
        net = network()
        for parameter in net.parameters():
            nn.init.normal_(parameter, std=0.1)
        loss = flow_loss(net, FlowConfig(), 0).cuda()
        compile_network(net, LoopConfig(compile_on_gpu=wanted), GPU)
        with torch.autocast("cuda", torch.bfloat16):
            value = loss(batch)["loss"]
        value.backward()
        gradients = [parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None]
        results.append((value.detach(), torch.cat(gradients)))
    (plain, first), (fast, second) = results
    torch.testing.assert_close(fast, plain, rtol=1e-2, atol=1e-3)
    assert float(torch.cosine_similarity(first, second, dim=0)) > 0.999
