"""What a trained network knows: features of its blocks, and the density of images."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentflow import LatentFlowPipeline
from latentflow.errors import UserError
from latentflow.evaluation import probing
from latentflow.evaluation.data import ImageSet
from latentflow.evaluation.lines import _known
from latentflow.evaluation.probing import auroc, likelihood, linear_probe, probe
from latentflow.evaluation.sampler import Sampler
from latentflow.models import UNet

from .conftest import NAMES, GaussianFlow, quiet, tiny_dit, tiny_vae
from .test_classify import photos

KINDS = [*NAMES.values()]


def test_densities_are_those_of_the_gaussians(class_pipe: Any, images: Callable[..., Tensor]) -> None:
    model, real = class_pipe.model, images(12) * 2 - 1
    own = [KINDS[number % 3] for number in range(12)]
    sampler = Sampler(
        model=model, pipeline=class_pipe, condition_kind="class_labels", settings={}, seed=0, batch_size=5
    )
    report = likelihood(sampler, {"train": ImageSet(images=real, captions=own)}, 12)
    with torch.no_grad():
        x1 = model.encode(real).double()
        mean = model.network.means[[number % 3 for number in range(12)]][:, :, None, None]
        normal = torch.distributions.Normal(mean.double(), GaussianFlow.SPREAD)
        exact = -normal.log_prob(x1).flatten(1).mean(1) / math.log(2)
    assert abs(report["train"]["bits_per_dim"] - float(exact.mean())) < 1e-3
    assert abs(report["train"]["standard_error"] - float(exact.std()) / 12**0.5) < 1e-3
    assert report["train"]["n"] == 12


class UnderZ(GaussianFlow):
    """`GaussianFlow` whose mean z moves along a direction; and q(z | x), which is exact, or as wide as the prior."""

    ALONG = (1.0, -2.0)
    exact = True

    class Encoder(nn.Module):
        kind, dim = "image", 1

        def __init__(self, flow: UnderZ) -> None:
            super().__init__()
            self.place, self.flow = nn.Parameter(torch.zeros(())), (flow,)

        def forward(self, x1: Tensor) -> tuple[Tensor, Tensor]:
            apart = (x1 - self.flow[0].null[:, None, None]).flatten(2).sum(2) @ torch.tensor(UnderZ.ALONG)
            precision = 1.0 + 5.0 * x1[0, 0].numel() / GaussianFlow.SPREAD**2
            mean = apart[:, None] / GaussianFlow.SPREAD**2 / precision
            log_variance = torch.full_like(mean, -math.log(precision))
            return (mean, log_variance) if self.flow[0].exact else (mean, log_variance + 2.0)

    def __init__(self) -> None:
        super().__init__()
        self.z_encoder = UnderZ.Encoder(self)

    def mean(self, cond: Any, rows: int) -> Tensor:
        return super().mean(cond, rows) + cond.z * torch.tensor(self.ALONG)


@pytest.mark.parametrize("exact", [True, False])
def test_of_a_latent_variable_there_is_a_lower_bound(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the density itself where q is exact, and by KL(q || exact q) less where it is wider."""
    network = UnderZ()
    network.exact = exact
    pipe: Any = quiet(LatentFlowPipeline(tiny_vae(), network))
    along = torch.tensor(UnderZ.ALONG)[:, None, None].expand(2, 4, 4).flatten()
    covariance = along[:, None] * along + GaussianFlow.SPREAD**2 * torch.eye(32)
    normal = torch.distributions.MultivariateNormal(network.null.detach().repeat_interleave(16), covariance)
    torch.manual_seed(0)
    draws = normal.sample((300,)).view(300, 2, 4, 4)
    monkeypatch.setattr(type(pipe.model), "encode", lambda _, places: draws[places.long().flatten()])
    sampler = Sampler(
        model=pipe.model, pipeline=pipe, condition_kind="nothing", settings={}, seed=0, batch_size=100
    )
    images = ImageSet(images=torch.arange(300.0)[:, None, None, None], captions=[""] * 300)
    found = likelihood(sampler, {"train": images}, 300)["train"]
    order = probing.metrics.in_proportion(images.captions, 0)
    density = -float(normal.log_prob(draws[order].flatten(1)).mean()) / 32 / math.log(2)
    beyond = 0.0 if exact else 0.5 * (math.exp(2.0) - 1.0 - 2.0) / 32 / math.log(2)
    assert found["at_most"] and abs(found["bits_per_dim"] - density - beyond) < (1e-3 if exact else 0.02)
    assert "at most" in "".join(_known({"likelihood": {"train": found}}))


def test_images_of_another_kind_are_told_by_the_density(
    class_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = class_pipe.model
    draws = GaussianFlow.SPREAD * torch.randn(30, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    draws = draws + model.network.null.detach()[:, None, None]
    draws[20:] += 3.0
    monkeypatch.setattr(type(model), "encode", lambda _, places: draws[places.long().flatten()])
    places = torch.arange(30.0)[:, None, None, None]
    sets = {
        name: ImageSet(images=places[part], captions=[KINDS[0]] * 10)
        for name, part in {"train": slice(10), "held_out": slice(10, 20), "other": slice(20, 30)}.items()
    }
    sampler = Sampler(
        model=model, pipeline=class_pipe, condition_kind="class_labels", settings={}, seed=0, batch_size=10
    )
    report = likelihood(sampler, sets, 10)
    assert report["other"]["auroc"] == report["other"]["auroc_of_typicality"] == 1.0
    assert report["train"]["bits_per_dim"] < report["other"]["bits_per_dim"] - 5


def test_sets_have_noises_of_their_own_and_all_classes(
    class_folder: Path, class_pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one noise for both sets an image would be nearest to the one with its noise, whatever they show."""
    seen: list[Tensor] = []

    def features(model: Any, images: Tensor, block: int, t: float, generator: torch.Generator) -> Tensor:
        seen.append(torch.cat([torch.randn(len(images), 4, generator=generator), images.flatten(1)], 1))
        return seen[-1]

    pipe: Any = LatentFlowPipeline.from_pretrained(class_folder)
    monkeypatch.setattr(type(pipe.model), "features", features)
    monkeypatch.setattr(probing, "_MOST", 20)
    places = torch.arange(39.0)[:, None, None, None]
    train = ImageSet(images=places, captions=[KINDS[number // 13] for number in range(39)])
    options: dict[str, Any] = {"condition_kind": "class_labels", "settings": {}, "seed": 0, "batch_size": 50}
    probe(Sampler(model=pipe.model, pipeline=pipe, **options), train, train)
    for ours, theirs in zip(seen[::2], seen[1::2], strict=True):
        assert len(ours) == 20 and len(theirs) == 39 and not torch.isclose(ours[:, :4], theirs[:20, :4]).any()
        assert min(torch.bincount((ours[:, 4] // 13).long(), minlength=3).tolist()) >= 5
    model, encoded = class_pipe.model, []
    monkeypatch.setattr(
        type(model), "encode", lambda _, rows: encoded.append(rows) or torch.zeros(len(rows), 2, 4, 4)
    )
    likelihood(Sampler(model=model, pipeline=class_pipe, **options), {"train": train}, 24)
    assert min(torch.bincount((torch.cat(encoded).flatten() // 13).long(), minlength=3).tolist()) >= 6


def test_block_and_time_are_chosen_without_the_images_whose_classes_are_read(
    class_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At t = 0.6 alone training images tell each other's classes; unseen ones are read best at another."""
    kinds = torch.arange(300) % 3

    def features(model: Any, images: Tensor, block: int, t: float, generator: torch.Generator) -> Tensor:
        numbers = images.flatten().long()
        told = kinds[numbers].clone()
        new = numbers >= 200
        wrong = (numbers % 4 == 0) & new if t == 0.6 else (torch.arange(len(numbers)) >= 160) & ~new
        told[wrong] = (told[wrong] + 1) % 3
        return torch.eye(3)[told]

    pipe: Any = LatentFlowPipeline.from_pretrained(class_folder)
    monkeypatch.setattr(type(pipe.model), "features", features)
    places = torch.arange(300.0)[:, None, None, None]
    all_of = ImageSet(images=places, captions=[KINDS[kind] for kind in kinds.tolist()])
    options: dict[str, Any] = {"condition_kind": "class_labels", "settings": {}, "seed": 0, "batch_size": 500}
    sets = all_of.rows([*range(200)]), all_of.rows([*range(200, 300)])
    found = probe(Sampler(model=pipe.model, pipeline=pipe, **options), *sets)
    assert found["best"]["t"] == 0.6
    assert found["best"]["chosen_by"]["share"] == 1.0 and found["best"]["chosen_by"]["n"] == 40
    assert found["best"]["linear"]["share"] == found["best"]["nearest"]["share"] == 0.75
    assert max(entry["linear"]["share"] for entry in found["table"]) == 1.0
    assert "set aside (100.0%" in " ".join("".join(_known({"probe": found})).split())


def test_a_checkpoint_without_a_null_has_no_features_without_a_condition(
    class_folder: Path, images: Callable[..., Tensor]
) -> None:
    pipe: Any = LatentFlowPipeline.from_pretrained(class_folder, trained_null=False)
    some = ImageSet(images=images(4) * 2 - 1, captions=[*KINDS[:2]] * 2)
    options: dict[str, Any] = {"condition_kind": "class_labels", "settings": {}, "seed": 0, "batch_size": 5}
    found = probe(Sampler(model=pipe.model, pipeline=pipe, **options), some, some)
    assert found["best"] is None and "which the checkpoint has not learnt" in found["best_reason"]


def test_one_class_is_no_choice(class_folder: Path, images: Callable[..., Tensor]) -> None:
    pipe: Any = LatentFlowPipeline.from_pretrained(class_folder)
    some = ImageSet(images=images(3) * 2 - 1, captions=[KINDS[0]] * 3)
    options: dict[str, Any] = {"condition_kind": "class_labels", "settings": {}, "seed": 0, "batch_size": 5}
    found = probe(Sampler(model=pipe.model, pipeline=pipe, **options), some, some)
    assert found["best"] is None and "one class" in found["best_reason"]


def test_a_figure_that_cannot_be_given_says_why() -> None:
    lines = "".join(
        _known({"probe": {"best": None, "best_reason": "features are those of a DiT of our own"}})
    )
    assert "unknown: features are those of a DiT of our own" in " ".join(lines.split())


def test_auroc_counts_pairs() -> None:
    assert auroc([3.0, 4.0], [1.0, 2.0]) == 1.0
    assert auroc([1.0, 2.0], [3.0, 4.0]) == 0.0
    assert auroc([1.0, 3.0], [2.0]) == 0.5
    assert auroc([1.0], [1.0]) == 0.5


def test_the_probe_is_a_logistic_regression_at_its_optimum() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (200,), generator=generator)
    rows = torch.eye(3)[labels] * 2 + torch.randn(200, 3, generator=generator)
    layer = linear_probe(rows, labels, 3).requires_grad_(True)
    value = nn.functional.cross_entropy(layer(rows), labels) + 0.5e-3 * layer.weight.square().sum()
    value.backward()
    assert layer.weight.grad is not None and float(layer.weight.grad.abs().max()) < 1e-3
    assert 0.6 < float((layer(rows).argmax(1) == labels).float().mean()) < 0.95


def test_features_are_the_tokens_behind_a_block(class_folder: Path, images: Callable[..., Tensor]) -> None:
    model: Any = LatentFlowPipeline.from_pretrained(class_folder).model
    real = images(2) * 2 - 1
    seen: list[Tensor] = []
    model.network.blocks[0].register_forward_hook(lambda *given: seen.append(given[2]))
    found = model.features(real, 1, 0.5, torch.Generator().manual_seed(1))
    assert torch.equal(found, seen[0].float().mean(1)) and found.shape == (2, 16)
    first, second = (model.features(real, 1, 1.0, torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert torch.equal(first, second) and not torch.allclose(first, found)
    under: Any = tiny_dit(latent_variable="image", latent_variable_dim=3)
    own: Any = LatentFlowPipeline(model.vae, under).model
    given: list[Any] = []
    under.register_forward_pre_hook(lambda *call: given.append(call[1][2].z))
    own.features(real, 1, 0.5)
    with torch.no_grad():
        torch.testing.assert_close(given[0], under.z_encoder(own.encode(real)).mean)
    for block in (0, 2):
        with pytest.raises(UserError, match="Use 1 to 1"):
            model.features(real, block, 0.5)


def test_a_network_without_tokens_has_no_features(
    assemble: Callable[[Any], LatentFlowPipeline], images: Callable[..., Tensor]
) -> None:
    unet = UNet(in_channels=2, channels=(32, 32), layers_per_block=1, sample_size=4)
    with pytest.raises(UserError, match="a UNet has no blocks of tokens"):
        quiet(assemble(unet)).model.features(images() * 2 - 1, 1, 0.5)


def test_the_command_measures_both(
    load_program: Callable[[str], Any], class_folder: Path, dit_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    data, other = photos(tmp_path / "photos", 30), photos(tmp_path / "plain", 6, labelled=False)

    def evaluate(*words: object) -> str:
        given = (*words, "-n", 4, "--steps", 2, "--validation", 0.3, "--features", "pixels-16")
        load_program("evaluate").main([str(word) for word in given])
        return str(capsys.readouterr().out)

    report = tmp_path / "report.json"
    density = ("--likelihood", "--likelihood-images", 4, "--other", other)
    said = evaluate(class_folder, data, "-o", report, "--probe", *density)
    assert "by a linear probe behind block 1" in said and "bits per dimension" in said and "AUROC" in said
    assert "without a condition" in " ".join(said.split())
    measured = json.loads(report.read_text())
    assert {entry["t"] for entry in measured["probe"]["table"]} == {0.3, 0.6, 0.9}
    assert measured["likelihood"]["other"]["n"] == 4
    for file in other.iterdir():
        file.rename(data / f"unlabelled-{file.name}")
    evaluate(
        class_folder, data, "-o", tmp_path / "part.json", "--missing-caption", "empty", "--condition", "class"
    )
    kinds = json.loads((tmp_path / "part.json").read_text())["data"]["images"]
    assert sum(kinds.values()) == sum(
        measured["data"]["images"].values()
    )  # those without a class are not measured
    photos(other, 6, labelled=False)
    with pytest.raises(UserError, match="plain has no classes to read"):
        evaluate(dit_folder, other, "-o", tmp_path / "more.json", "--probe")
    capsys.readouterr()
    for flags, words in (
        (("--temperature", 0.5), "this checkpoint draws no tokens"),
        (("--solver", "halton"), "solver 'halton' is of checkpoints of tokens"),
    ):
        with pytest.raises(UserError, match=words):
            evaluate(class_folder, data, "-o", tmp_path / "none.json", *flags)
        assert "images" not in capsys.readouterr().out  # before anything is measured
    for flags in (("--other", other), ("--likelihood-images", 4)):
        with pytest.raises(UserError, match=f"{flags[0]} without --likelihood"):
            evaluate(class_folder, data, *flags)
