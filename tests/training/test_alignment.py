"""Features drawn towards those of the weight average, or of a vision model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from latentflow.config import AlignmentConfig, FlowConfig, LoopConfig, RoutingConfig
from latentflow.errors import UserError
from latentflow.models import Condition, DiT, UNet
from latentflow.models.routing import Route
from latentflow.training import fit
from latentflow.training.loop import trained_module
from latentflow.training.loop.checkpoint import list_checkpoints, load_checkpoint
from latentflow.training.loop.data_order import SampleUse
from latentflow.training.loop.trained_module import WeightAverage
from latentflow.training.losses import flow_loss
from latentflow.training.losses.alignment import Routing, make_alignment
from latentflow.training.losses.flow import FlowLoss

from ..models.tiny import perturb, save_dinov2
from .command import TINY, call
from .forking import run_ranks

SIDE, ROWS, WIDTH = 4, 6, 16


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dinov2(tmp_path_factory.mktemp("dinov2"), layers=1)


def stage(config: AlignmentConfig, *, share: float = 0.0) -> FlowLoss:
    torch.manual_seed(0)
    network = DiT(in_channels=2, width=WIDTH, depth=4, heads=2, registers=1)
    perturb(network)
    routing = Routing(RoutingConfig(route_share=share), network, (10**6, 10)) if share else None
    return flow_loss(network, FlowConfig(), 3, routing=routing, alignment=make_alignment(config, network))


def settings(kind: str, encoder: Path, **more: Any) -> AlignmentConfig:
    return AlignmentConfig(
        alignment=kind, alignment_encoder=str(encoder) if kind == "encoder" else None, **more
    )


def batch(rows: int = ROWS, start: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(1, 2, SIDE, SIDE, generator=g).expand(rows, -1, -1, -1),
        "pixels": torch.randint(256, (1, 3, 16, 16), generator=g, dtype=torch.uint8).expand(rows, -1, -1, -1),
        "sample_ids": list(range(start, start + rows)),
    }


def exchanged(one: FlowLoss) -> dict[str, Any]:
    """What the stage's network was called with and returned, by call."""
    calls: dict[str, Any] = {}

    def keep(module: Any, given: Any, asked: Any, out: Any) -> None:
        calls["teacher" if asked.get("only_features") else "student"] = (*given, asked, out)

    one.network.register_forward_hook(keep, with_kwargs=True)
    return calls


def test_the_teacher_is_the_average_on_the_same_pairs_nearer_to_the_data() -> None:
    one = stage(AlignmentConfig(alignment="self"))
    average = WeightAverage(one, 0.9)
    averaged = copy.deepcopy(one.network)
    perturb(one.network)
    live = {name: value.clone() for name, value in one.state_dict().items()}
    one.use_average(average)
    calls = exchanged(one)
    one(batch())
    (x, t, _, _, _), (cleaner, later, _, asked, out) = calls["student"], calls["teacher"]
    assert ((later > t) & (later <= (t + 0.2).clamp(max=1.0))).all() and (later - t).std() > 0.01
    # x = t x1 + (1 - t) x0, for the same x0 and x1.
    x1 = batch()["latents"]
    t, later = (one.view(-1, 1, 1, 1).float() for one in (t, later))
    torch.testing.assert_close(cleaner, later * x1 + (1 - later) * (x - t * x1) / (1 - t))
    assert asked["features"] == 3  # seven in ten of four
    expected = averaged(cleaner, later.flatten(), features=3, only_features=True).features
    torch.testing.assert_close(out.features, expected)
    assert all(torch.equal(value, live[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("kind", ["self", "encoder"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_loss_and_all_gradients_are_there_in_lower_precision_too(
    kind: str, share: float, encoder: Path
) -> None:
    one, plain = stage(settings(kind, encoder), share=share), stage(AlignmentConfig(), share=share)
    one.use_average(WeightAverage(one, 0.9))
    for network in (one.network, plain.network):  # the average is no longer what the weights are
        torch.manual_seed(7)
        perturb(network)
    with torch.autocast("cpu", torch.bfloat16):
        result, without = one(batch()), plain(batch())
    usual = {"self": 0.2, "encoder": 0.5}[kind]
    torch.testing.assert_close(result["per_sample"], without["per_sample"])
    torch.testing.assert_close(result["loss"], without["loss"] + usual * result["alignment"])
    assert result["alignment"] > 0.01
    result["loss"].backward()
    assert [name for name, value in one.named_parameters() if value.grad is None] == []
    assert not one.eval()(batch()).keys() & {"alignment"}
    assert torch.equal(one(batch())["loss"], plain.eval()(batch())["loss"])


def test_the_teacher_is_told_what_the_student_is_told() -> None:
    """The same conditions are dropped, and the same is known of masked images."""
    one = stage(AlignmentConfig(alignment="self"))

    class Told(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor, cond: Condition, **asked: Any) -> Any:
            self.cond = cond
            return SimpleNamespace(features=x)

    one.network = Told()
    labels, drop = torch.tensor([2, 0, 1]), torch.tensor([True, False, True])
    known = torch.randn(3, 5, SIDE, SIDE)
    told = Condition(class_labels=labels, channels=known, drop=drop)
    pair = torch.randn(2, 3, 2, SIDE, SIDE)
    sample = FlowConfig().choices().path.sample(*pair, torch.full((3,), 0.5))
    one.averaged_features({"class_labels": labels}, sample, told, torch.full((3,), 0.6), 2)
    found = one.network.cond
    assert all(
        torch.equal(getattr(found, name), getattr(told, name))
        for name in ("class_labels", "channels", "drop")
    )


@pytest.mark.parametrize("averaged", [True, False])
def test_no_gradient_reaches_the_teacher(averaged: bool) -> None:
    """Neither through the average nor, without one, through the weights themselves."""
    one = stage(AlignmentConfig(alignment="self"))
    if averaged:
        one.use_average(WeightAverage(one, lambda step: 0.9))
    calls, targets = exchanged(one), []
    assert one.alignment is not None
    one.alignment.register_forward_pre_hook(lambda module, given: targets.append(given[1]))
    one(batch())["loss"].backward()
    assert calls["teacher"][-1].features.grad_fn is None and not calls["teacher"][-1].features.requires_grad
    assert calls["student"][-1][1].requires_grad
    assert len(targets) == 1 and not targets[0].requires_grad


@pytest.mark.parametrize("kind", ["self", "encoder"])
def test_routed_tokens_are_compared_with_what_their_own_places_shall_be(kind: str, encoder: Path) -> None:
    one = stage(settings(kind, encoder, alignment_block=2)).alignment
    assert one is not None
    one.head = torch.nn.Identity()
    target = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
    route = Route(torch.tensor([[0, 2, 5], [1, 3, 4]]), first=1, last=3)
    own = torch.stack([target[0, [0, 2, 5]], target[1, [1, 3, 4]]])
    torch.testing.assert_close(one(own, target, route), torch.zeros(2), rtol=0, atol=1e-6)
    apart = one.distance(own.roll(1, dims=1), own).mean(1)
    torch.testing.assert_close(one(own.roll(1, dims=1), target, route), apart)
    assert (apart > 0.1).all()
    # Where all tokens are there, each is compared with its own.
    for everywhere in (None, Route(route.kept, first=2, last=4)):
        torch.testing.assert_close(one(target, target, everywhere), torch.zeros(2), rtol=0, atol=1e-6)


def test_distances_are_those_of_the_papers(encoder: Path) -> None:
    ours, theirs = (
        make_alignment(settings(kind, encoder), stage(AlignmentConfig()).network)
        for kind in ("self", "encoder")
    )
    assert ours is not None and theirs is not None
    a, b = torch.tensor([[[0.02, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    # Smooth L1: d^2 / (2 * 0.05) up to 0.05, then d - 0.025.
    torch.testing.assert_close(ours.distance(a, b), torch.tensor([[(0.02**2 / 0.1 + 0.975) / 2]]))
    torch.testing.assert_close(theirs.distance(a, b), torch.tensor([[1.0]]))
    torch.testing.assert_close(theirs.distance(a, -3 * a), torch.tensor([[2.0]]))


@pytest.mark.parametrize("kind", ["self", "encoder"])
def test_a_target_depends_on_the_running_number_alone(kind: str, encoder: Path) -> None:
    one = stage(settings(kind, encoder), share=0.5)
    together, alone = (one(given)["per_sample"] for given in (batch(), batch(rows=1, start=4)))
    torch.testing.assert_close(together[4:5], alone)
    calls = exchanged(one)
    if kind == "self":
        one(batch())
        times = calls["teacher"][1]
        one(batch(rows=1, start=4))
        assert torch.equal(times[4:5], calls["teacher"][1])


class Latents:
    """A dozen random latents with their images."""

    def __len__(self) -> int:
        return 12

    def __getitems__(self, draws: list[SampleUse]) -> dict[str, Any]:
        rows = [torch.Generator().manual_seed(draw.index) for draw in draws]
        return {
            "latents": torch.stack([torch.randn(2, SIDE, SIDE, generator=row) for row in rows]),
            "pixels": torch.stack(
                [torch.randint(256, (3, 16, 16), generator=row, dtype=torch.uint8) for row in rows]
            ),
        }

    def name(self, index: int) -> str:
        return str(index)


def train(folder: Path, config: AlignmentConfig, steps: int, **changes: Any) -> dict[str, Tensor]:
    """Train, routed as well, and return the last checkpoint's tensors."""
    settings: dict[str, Any] = {
        "max_train_steps": steps, "train_batch_size": 4, "lr_scheduler": "constant", "mixed_precision": "bf16",
        "checkpointing_steps": 3, "validation_steps": 0, "preview_steps": 0, "log_steps": 1, "ema_decay": 0.5,
    }  # fmt: skip
    assert fit({"flow": stage(config, share=0.5)}, Latents(), LoopConfig(**settings | changes), folder)
    return weights(folder)


def weights(folder: Path) -> dict[str, Tensor]:
    last = load_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    return {
        f"{part}/{name}": value
        for part in ("flow-weights", "flow-average")
        for name, value in last[part].items()
    }


@pytest.mark.parametrize("kind", ["self", "encoder"])
def test_a_resumed_run_equals_one_that_never_stopped(kind: str, encoder: Path, tmp_path: Path) -> None:
    config = settings(kind, encoder)
    train(tmp_path / "stopped", config, 3)
    resumed, straight = (train(tmp_path / name, config, 6) for name in ("stopped", "straight"))
    assert any("alignment.head" in name for name in straight)
    assert [name for name, value in straight.items() if not torch.equal(value, resumed[name])] == []
    lines = (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()
    assert "alignment" in json.loads(lines[0])


@pytest.mark.parametrize(("kind", "shard"), [("self", False), ("encoder", True)])
def test_two_processes_learn_what_one_learns(kind: str, shard: bool, encoder: Path, tmp_path: Path) -> None:
    config = settings(kind, encoder)
    alone = train(tmp_path / "alone", config, 3, mixed_precision="no")

    def half(rank: int) -> None:
        train(tmp_path / "pair", config, 3, mixed_precision="no", train_batch_size=2, shard=shard)

    run_ranks(2, half)
    pair = weights(tmp_path / "pair")
    assert alone.keys() == pair.keys()
    for name, one in alone.items():
        torch.testing.assert_close(one, pair[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"alignment": "selv"}, "(?s)'selv'.*'self'"),
        ({"alignment": "encoder"}, "(?s)Give both"),
        ({"alignment": "self", "alignment_encoder": "x"}, "(?s)Give both"),
        ({"alignment": "self", "alignment_weight": 0.0}, "alignment_weight 0.0"),
        ({"alignment_weight": 0.5}, "(?s)without --alignment.*--alignment self"),
        ({"alignment_block": 2}, "(?s)without --alignment.*--alignment self"),
    ],
)
def test_choices_that_cannot_work_are_refused_at_once(choices: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AlignmentConfig(**choices)


def test_what_cannot_be_aligned_is_refused_in_words() -> None:
    with pytest.raises(UserError, match=r"(?s)a DiT.*--network dit"):
        make_alignment(AlignmentConfig(alignment="self"), UNet(channels=(16, 32), head_dim=16))
    for block in (0, 5):
        with pytest.raises(UserError, match="of 4 blocks"):
            stage(AlignmentConfig(alignment="self", alignment_block=block))
    pair: Any = SimpleNamespace(num_processes=2)
    with pytest.raises(UserError, match="--shard"):
        trained_module.TrainedModule(
            "flow", stage(AlignmentConfig(alignment="self")), LoopConfig(shard=True), pair
        )


def test_the_command_routes_and_aligns_and_nothing_of_it_is_in_the_result(
    images: Path, encoder: Path, tmp_path: Path
) -> None:
    line = [images, *TINY, "--depth", 3, "--block", "plain"]
    line += ["--max-train-steps", 2, "--checkpointing-steps", 2]
    choices = ["--route-share", 0.5, "--alignment", "encoder", "--alignment-encoder", encoder]
    call(tmp_path / "cache", *line, "-o", tmp_path / "run", *choices)
    folder = tmp_path / "run" / "pipeline" / "transformer"
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    assert weights.keys() == DiT.from_pretrained(folder).state_dict().keys()
    assert DiT.from_pretrained(folder).config.norm == "layer"
    said = call(tmp_path / "cache", *line, "-o", tmp_path / "run", "--alignment", "self", expect=2)
    assert "alignment" in said and "--allow-changes" in said
