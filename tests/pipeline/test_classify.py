"""Generators as classifiers: against the exact posterior of Gaussians, through `classify` and `check --audit`."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from latentflow.data import find_source, pixels_to_images
from latentflow.data.cache import tensors
from latentflow.data.checking import report
from latentflow.errors import UserError
from latentflow.evaluation.classification import Classifier, audit, calibrate, calibration_error
from latentflow.families.latentflow import LatentFlowModel

from .conftest import NAMES, GaussianFlow, tiny_dit

KINDS = [*NAMES.values()]


def photos(folder: Path, count: int = 12, labelled: bool = True) -> Path:
    """Images of random colours, in folders of the three classes."""
    pixels = torch.randint(0, 256, (count, 8, 8, 3), generator=torch.Generator().manual_seed(0))
    for number, image in enumerate(pixels.to(torch.uint8).numpy()):
        place = folder / KINDS[number % 3] if labelled else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number}.png")
    return folder


def exact(model: Any, x1: Tensor) -> Tensor:
    """log p(x1 | class), (N, 3), less that of the best class, of `GaussianFlow`."""
    apart = (x1[:, None] - model.network.means[:, :, None, None]).double().flatten(2).square().sum(2)
    found = -0.5 * apart / GaussianFlow.SPREAD**2
    return found - found.amax(1, keepdim=True)


@torch.no_grad()
@pytest.mark.parametrize("method", ["flow-matching", "likelihood"])
def test_ratios_are_those_of_the_densities(
    method: Any, class_pipe: Any, images: Callable[..., Tensor]
) -> None:
    model, real = class_pipe.model, (images(5) * 255).round().to(torch.uint8)
    rows = model.encode_class(KINDS)
    settings: Any = {"evaluations": 256, "method": method, "halving": False, "seed": 3}
    classifier = Classifier(model=model, weighting="likelihood", **settings)
    ratios, losses = classifier.compare(real, rows)
    truth = exact(model, model.encode(pixels_to_images(real)))
    torch.testing.assert_close(ratios, truth, rtol=0.02, atol=0.1)
    torch.testing.assert_close(losses.amin(1, keepdim=True) - losses, truth, rtol=0.02, atol=0.1)
    each, _ = classifier.compare(real, lambda number: rows)
    torch.testing.assert_close(each, ratios, rtol=1e-3, atol=1e-2)


@torch.no_grad()
def test_errors_near_the_data_do_not_decide(class_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained network errs there most, in units of the noise, which the weighting of likelihoods counts in full."""
    model = class_pipe.model
    latents = model.network.means[0][None, :, None, None] + 0.5 * torch.randn(
        6, 2, 4, 4, generator=torch.Generator().manual_seed(0)
    )
    forward = type(model.network).forward

    def with_an_error(self: Any, x: Tensor, t: Any, cond: Any = None) -> Tensor:
        wrong = (torch.as_tensor(t) > 0.9).expand(len(x)) & (cond.class_labels == 0)
        return forward(self, x, t, cond) + 2.5 * wrong[:, None, None, None]

    monkeypatch.setattr(type(model.network), "forward", with_an_error)
    monkeypatch.setattr(type(model), "encode", lambda _, images: latents)
    for settings, right in (({}, 6), ({"weighting": "likelihood"}, 0)):
        classifier = Classifier(model=model, **settings)  # type: ignore[arg-type]
        ratios, _ = classifier.compare(torch.zeros(6, 3, 8, 8, dtype=torch.uint8), model.encode_class(KINDS))
        assert int((ratios.argmax(1) == 0).sum()) == right


@torch.no_grad()
def test_planted_labels_are_the_first_to_be_doubted(
    class_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, model = find_source(str(photos(tmp_path / "photos", 60))), class_pipe.model
    numbers = [KINDS.index(one.label) for one in source.examples]
    means = model.network.means[numbers][:, :, None, None]
    noise = torch.randn(60, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    latents = means + GaussianFlow.SPREAD * noise
    wrong = {source.examples[place].name for place in (5, 30, 50)}
    for place in (5, 30, 50):
        latents[place] += model.network.means[(numbers[place] + 1) % 3][:, None, None] - means[place]
    monkeypatch.setattr(Classifier, "images", lambda *_: torch.arange(60)[:, None, None, None])
    places = lambda images: ((images + 1) * 127.5).round().long().flatten()  # noqa: E731
    monkeypatch.setattr(type(model), "encode", lambda _, images: latents[places(images)])
    found = audit(Classifier(model=model), source)
    assert {doubt.image for doubt in found[:3]} == wrong
    assert all(doubt.log_ratio < 0 and doubt.rather != doubt.label for doubt in found[:3])
    assert all(doubt.log_ratio > 0 for doubt in found[3:])
    assert {doubt.image for doubt in sorted(found, key=lambda doubt: -doubt.surprise)[:3]} == wrong


def test_captions_are_encoded_as_their_image_is_compared(
    text_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without a graph: those of all images may not fit into memory."""
    data, model, encoded = photos(tmp_path / "photos", 12, labelled=False), text_pipe.model, []
    for number in range(12):
        (data / f"{number}.txt").write_text(["a red apple", "green tree", "a small blue hat"][number % 3])
    encode = type(model).encode_prompt

    def watched(own: Any, prompts: Any) -> Any:
        encoded.append((len(prompts), torch.is_grad_enabled()))
        return encode(own, prompts)

    monkeypatch.setattr(type(model), "encode_prompt", watched)
    found = audit(Classifier(model=model, evaluations=2), find_source(str(data)))
    assert len(found) == 12 and encoded == [(3, False)] * 12
    assert all(doubt.rather == doubt.label or doubt.log_ratio < 0 for doubt in found)


@torch.no_grad()
def test_a_latent_variable_is_that_of_the_image(
    assemble: Callable[[Any], Any], images: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network was trained under what its encoder says of an image, and not under the mean of the prior."""
    settings: dict[str, Any] = {"latent_variable": "image", "latent_variable_dim": 3, "num_classes": 3}
    model: Any = assemble(tiny_dit(**settings)).model
    real, seen = (images(3) * 255).round().to(torch.uint8), []
    predict = type(model).predict
    monkeypatch.setattr(
        type(model),
        "predict",
        lambda own, x, t, given, *rest: seen.append(given.z) or predict(own, x, t, given, *rest),
    )
    rows = model.encode_class(KINDS)
    for given in (rows, lambda number: rows):
        seen.clear()
        ratios, _ = Classifier(model=model, evaluations=2).compare(real, given)
        wanted = model.network.z_encoder(model.encode(pixels_to_images(real))).mean
        torch.testing.assert_close(torch.cat(seen), wanted.repeat_interleave(2 * 3, 0))
        assert ratios.shape == (3, 3)
    with pytest.raises(UserError, match="this checkpoint has a latent variable"):
        Classifier(model=model, method="likelihood")


def test_classes_are_spoken_to_a_checkpoint_of_captions(
    classify: Callable[..., str],
    load_program: Callable[[str], Any],
    dit_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As they were in training; and images are put on the background of the checkpoint's run."""
    for number, name in enumerate(("red_apple", "green_tree")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGBA", (8, 8), (255 * number, 0, 0, 9)).save(tmp_path / "photos" / name / "1.png")
    run = tmp_path / "run"
    shutil.copytree(dit_folder, run / "pipeline")
    (run / "config.yaml").write_text("background: black\n")
    prompts, backgrounds = [], []
    encode, images_of = LatentFlowModel.encode_prompt, Classifier.images
    monkeypatch.setattr(
        LatentFlowModel, "encode_prompt", lambda own, texts: prompts.append([*texts]) or encode(own, texts)
    )
    monkeypatch.setattr(
        Classifier,
        "images",
        lambda own, source, colour: backgrounds.append(colour) or images_of(own, source, colour),
    )
    classify(run / "pipeline", tmp_path / "photos")
    result = json.loads((tmp_path / "classes.json").read_text())
    assert result["classes"] == ["green_tree", "red_apple"]
    load_program("check").main([str(tmp_path / "photos"), "--audit", str(run / "pipeline"), "--json"])
    assert prompts == [["green tree", "red apple"]] * 2 and backgrounds == ["black"] * 2
    classify(run / "pipeline", tmp_path / "photos", "--overwrite", "--background", "white")
    assert backgrounds[2:] == ["white"]


def test_calibration_finds_the_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(torch.softmax(scores, 1), 1, generator=generator)[:, 0].tolist()
    found = calibrate(7.0 * scores, labels)
    assert abs(found.temperature / 7.0 - 1) < 0.1
    assert found.after < 0.03 < 0.2 < found.before
    always_right = torch.tensor([[0.0, -50.0]] * 10)
    assert calibration_error(always_right, [0] * 10) < 1e-9
    assert calibration_error(always_right, [1] * 10) > 1 - 1e-9
    with pytest.raises(UserError, match="3 labelled images"):
        calibrate(scores[:3], labels[:3])


@pytest.fixture
def classify(
    load_program: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> str:
        load_program("classify").main([str(word) for word in (*words, "--device", "cpu", "--evaluations", 4)])
        return str(capsys.readouterr().out)

    return run


def test_the_command_writes_probabilities_and_a_sheet(
    classify: Callable[..., str], class_folder: Path, tmp_path: Path
) -> None:
    data = photos(tmp_path / "photos")
    said = classify(class_folder, data, "--calibrate", data, "-o", "out/found.json")
    result = json.loads((tmp_path / "out/found.json").read_text())
    assert "right: " in said and "calibrated on 12 images" in said
    assert result["right"]["n"] == 12 and result["calibration"]["temperature"] == result["temperature"]
    assert len(result["images"]) == 12 and result["classes"] == KINDS
    for entry in result["images"]:
        values = [*entry["probabilities"].values()]
        assert abs(sum(values) - 1) < 1e-6 and values == sorted(values, reverse=True)
        assert entry["class"] == next(iter(entry["probabilities"]))
    assert Image.open(tmp_path / "out/found.png").width > 300
    with pytest.raises(UserError, match="exists"):
        classify(class_folder, data, "-o", "out/found.json")
    assert "right" not in classify(class_folder, photos(tmp_path / "plain", 3, labelled=False))


def test_captions_are_classes_for_a_checkpoint_of_captions(
    classify: Callable[..., str], dit_folder: Path, tmp_path: Path
) -> None:
    data = photos(tmp_path / "photos", 3)
    classify(dit_folder, data)
    assert json.loads((tmp_path / "classes.json").read_text())["classes"] == KINDS
    plain = photos(tmp_path / "plain", 3, labelled=False)
    with pytest.raises(
        UserError, match='plain has no classes\nGive captions to choose from: --classes "red apple"'
    ):
        classify(dit_folder, plain, "-o", "plain.json")
    classify(dit_folder, plain, "-o", "plain.json", "--classes", "a red apple", "green tree")
    assert json.loads((tmp_path / "plain.json").read_text())["classes"] == ["a red apple", "green tree"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--classes", "apple"), "there is one class to choose from: apple"),
        (("--classes", "apple", "apple"), "names some twice"),
        (("--classes", "apple", "dog"), "dog"),
        (("--calibrate", "plain"), "--calibrate plain has no classes"),
        (("--calibrate", "others"), "has classes that are not among those to choose from: zebra"),
        (("--temperature", "0"), "--temperature is 0"),
        (("--method", "likelihood", "--weighting", "min-snr"), "whose densities have none"),
        (("--temperature", "2", "--calibrate", "plain"), "Give one of the two"),
        (("--weighting", "likelyhood"), "did you mean 'likelihood'"),
        (("-o", "found.txt"), "Did you mean -o found.json"),
    ],
)
def test_bad_input(
    flags: tuple[str, ...], words: str, classify: Callable[..., str], class_folder: Path, tmp_path: Path
) -> None:
    data = photos(tmp_path / "photos", 3)
    photos(tmp_path / "plain", 3, labelled=False)
    (tmp_path / "others").mkdir()
    (photos(tmp_path / "more", 3) / "apple").rename(tmp_path / "others/zebra")
    (tmp_path / "more/hat").rename(tmp_path / "others/hat")
    with pytest.raises(UserError) as caught:
        classify(class_folder, data, *flags)
    assert words in str(caught.value)
    assert not (tmp_path / "classes.json").exists()


def test_images_without_a_class_are_classified_too(
    classify: Callable[..., str], class_folder: Path, tmp_path: Path
) -> None:
    data = photos(photos(tmp_path / "photos", 6), 2, labelled=False)
    with pytest.raises(UserError, match="--condition none"):
        classify(class_folder, data)
    for condition, right in (("none", None), ("class", 6)):
        said = classify(class_folder, data, "--condition", condition, "--overwrite")
        result = json.loads((tmp_path / "classes.json").read_text())
        assert len(result["images"]) == 8 and result.get("right", {}).get("n") == right
        assert ("right: " in said) == (right is not None)
    assert "of 4;" in classify(
        class_folder, photos(tmp_path / "more", 6), "--classes", *KINDS[:2], "--overwrite"
    )


@torch.no_grad()
def test_densities_are_of_as_many_images_at_once_as_is_said(
    class_pipe: Any, images: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, real, seen = class_pipe.model, (images(3) * 255).round().to(torch.uint8), []
    encode = type(model).encode
    monkeypatch.setattr(type(model), "encode", lambda own, rows: seen.append(len(rows)) or encode(own, rows))
    Classifier(model=model, evaluations=2, method="likelihood", batch_size=2).compare(
        real, model.encode_class(KINDS)
    )
    assert seen == [2, 1]


@torch.no_grad()
def test_images_are_read_as_they_are_compared(
    class_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of any size is classified in the memory of one batch."""
    read: list[int] = []
    pick = tensors.LazyTable._pick
    monkeypatch.setattr(
        tensors.LazyTable, "_pick", lambda own, rows, *rest: read.append(len(rows)) or pick(own, rows, *rest)
    )
    classifier = Classifier(model=class_pipe.model, evaluations=2)
    images = classifier.images(find_source(str(photos(tmp_path / "photos", 35))))
    assert not read
    classifier.compare(images, class_pipe.model.encode_class(KINDS))
    assert read == [16, 16, 3]


def test_latents_cannot_be_audited(
    load_program: Callable[[str], Any], class_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "check_data", lambda *_, **__: (report.Report("latents", "class"), None))
    with pytest.raises(UserError, match="holds latents, and no images"):
        load_program("check").main(["latents", "--audit", str(class_folder)])


def test_check_audits_labels(
    load_program: Callable[[str], Any], class_folder: Path, dit_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    data, sheet = photos(tmp_path / "photos", 6), tmp_path / "doubts.png"
    check = load_program("check").main
    page = tmp_path / "page.html"
    check([str(data), "--audit", str(class_folder), "--sheet", str(sheet), "--report", str(page)])
    said = capsys.readouterr().out
    shown = html.unescape(page.read_text())
    count = re.search(r"\d+ of 6 images are likelier with another label", said)
    assert count and count[0] in shown and "Least like the others" in shown
    [first, *_] = re.findall(r"  (\S+): .* \([\d.-]+\)", said.split("least like the others")[1])
    assert first in shown.split("Least like the others")[1]
    assert "images are likelier with another label" in said and "least like the others" in said
    assert Image.open(sheet).height > 100
    photos(data, 1, labelled=False)  # it has no class, and nothing to doubt
    empty = ["--missing-caption", "empty", "--condition", "class"]
    check([str(data), "--audit", str(dit_folder), "--json", *empty])
    found = json.loads(capsys.readouterr().out)["audit"]
    assert len(found) == 6 and {one["label"] for one in found} == {*KINDS}
    ratios = [one["log_ratio"] for one in found]
    assert ratios == sorted(ratios)
