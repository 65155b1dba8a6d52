"""`latentflow evaluate` from a checkpoint to a report."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from latentflow import DiT, LatentFlowPipeline
from latentflow.autoencoder import AutoencoderConfig, build_autoencoder, downscale_factor, latent_channels
from latentflow.data import Source, find_source, to_pil, to_tensor
from latentflow.errors import UserError
from latentflow.models import small_text_encoder, train_tokenizer
from latentflow.training.fine_tune.teacher_samples import TeacherSample

COLOURS = ["red", "lime", "blue", "yellow", "white", "black"]
THINGS = ["hat", "shoe"]


@pytest.fixture(scope="module")
def program(repository: Path) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(
        "evaluate_program", repository / "pipelines" / "evaluate.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # its dataclasses look their types up there
        spec.loader.exec_module(module)
        yield module


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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    shape = {"autoencoder_widths": (8, 16), "encoder_layers": (0, 1), "decoder_layers": (1, 1)}
    vae = build_autoencoder(AutoencoderConfig(latent_channels=4, **shape), 32)
    channels, side = latent_channels(vae), 32 // downscale_factor(vae)
    tokenizer = train_tokenizer([f"{colour} {thing}" for colour in COLOURS for thing in THINGS])
    encoder = small_text_encoder(tokenizer, width=16, depth=1, heads=2)
    network = DiT(in_channels=channels, width=16, depth=1, heads=2, text_dim=16, sample_size=side).eval()
    folder = tmp_path_factory.mktemp("run") / "pipeline"
    pipe = LatentFlowPipeline(vae.eval(), network, text_encoder=encoder.eval(), tokenizer=tokenizer)
    pipe.save_pretrained(folder)
    return folder


def evaluate(program: ModuleType, *argv: object) -> None:
    program.main([str(word) for word in argv])


def test_the_report_is_complete_and_repeatable(
    program: ModuleType, images: Path, checkpoint: Path, tmp_path: Path
) -> None:
    reports = []
    for name, batch in (("a.json", 4), ("b.json", 3)):
        flags = ["-n", 4, "--steps", 1, "--validation", 0.25, "--batch-size", batch, "--device", "cpu"]
        evaluate(program, checkpoint, images, "-o", tmp_path / name, *flags, "--attributes", *COLOURS)
        reports.append(json.loads((tmp_path / name).read_text()))
    first, second = reports
    assert Image.open(tmp_path / "a.png").size == (70, 70)  # 2 x 2 images with margins
    # Nine training images: four real ones stand beside the four generated, five are the reference of both.
    distance = first["frechet_distance"]
    assert (distance["generated"], distance["real"], distance["reference"]) == (4, 4, 5)
    assert distance["value"] > 0 and distance["floor"] > 0
    assert any("Frechet distance of 4 images says little" in note for note in first["notes"])
    assert first["reconstruction"]["held_out"]["images"] == 3
    assert first["validation_loss"]["held_out"]["standard_error"] > 0
    top_1, top_5 = (first["caption_retrieval"][name] for name in ("top_1", "top_5"))
    assert 0 <= top_1["count"] <= top_5["count"] <= top_1["n"] == 4
    assert top_1["share"] == top_1["count"] / 4
    assert first["memorisation"]["ratio"] > 0 and first["memorisation"]["new"] == "left out"
    assert first["memorisation"]["copies"]["usual"][0] == 0
    assert first["attributes"]["right"]["n"] == 3
    # What is needed to repeat it.
    assert first["settings"]["seed"] == 0 and first["settings"]["steps"] == 1
    assert set(first["versions"]) >= {"latentflow", "torch", "diffusers", "python"}
    assert first["data"]["images"] == {"training": 9, "held_out": 3}
    assert first["data"]["fingerprint"] == find_source(str(images)).fingerprint()
    assert set(first["checkpoint"]) == {"transformer", "vae", "text_encoder"}
    assert first["asked"]["with"] == "prompt" and first["asked"]["different"] == 4
    # A network that was never trained predicts zero: its loss is E|x1 - x0|^2, at least the noise's variance.
    assert first["validation_loss"]["held_out"]["value"] > 0.9
    for report in reports:
        for key in ("seconds", "settings"):
            del report[key]
    assert flat(first) == pytest.approx(flat(second), rel=1e-3)


def flat(value: Any, prefix: str = "") -> dict[str, float]:
    if isinstance(value, dict):
        return {name: x for key, item in value.items() for name, x in flat(item, f"{prefix}/{key}").items()}
    return {prefix: value} if isinstance(value, int | float) else {}


def test_a_run_lends_its_settings(program: ModuleType, tmp_path: Path) -> None:
    config = program.EvaluateConfig(checkpoint=str(tmp_path / "pipeline"), data="d", background="black")
    defaults = program.as_trained(config)
    assert (defaults.validation, defaults.condition, defaults.background) == (0.02, "auto", "black")
    (tmp_path / "config.yaml").write_text(
        "validation: 0.3\nseed: 7\nbackground: grey\nmissing_caption: skip\nmasks: alpha\n"
    )
    lent = program.as_trained(config)
    # Without these, other images would be found, and others held out.
    assert (lent.missing_caption, lent.masks) == ("skip", "alpha")
    # Nor would these be the colours that the run, of before profiles were converted, was trained on.
    assert (defaults.colours, lent.colours) == ("srgb", "stored")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (example,) = program.found(str(tmp_path), dataclasses.replace(lent, masks="auto")).examples
    assert example.colours == "stored"
    (tmp_path / "config.yaml").write_text("colours: srgb\n")
    assert program.as_trained(config).colours == "srgb"
    assert (lent.validation, lent.validation_seed, lent.background) == (0.3, 7, "black")


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
    torch.manual_seed(0)
    shape = {"autoencoder_widths": (8, 16), "encoder_layers": (0, 1), "decoder_layers": (0, 1)}
    vae = build_autoencoder(AutoencoderConfig(latent_channels=4, **shape), 16)
    side = 16 // downscale_factor(vae)
    network = DiT(in_channels=4, width=16, depth=1, heads=1, num_classes=2, sample_size=side).eval()
    folder = tmp_path_factory.mktemp("classes-run") / "pipeline"
    LatentFlowPipeline(vae.eval(), network, id2label={0: "common", 1: "rare"}).save_pretrained(folder)
    return folder


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
    program: ModuleType, classes: Path, class_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Reports of three generators that need no network, and what they were asked."""
    folder, found = tmp_path_factory.mktemp("reports"), {}
    for kind in ("new images", "the data", "one class"):
        perfect, file = Perfect(kind, classes), folder / f"{kind}.json"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LatentFlowPipeline, "__call__", lambda pipe, one=perfect, **given: one(**given))
            flags = ["-n", 160, "--validation", 0.05, "--device", "cpu"]
            evaluate(program, class_checkpoint, classes, "-o", file, *flags)
        found[kind] = json.loads(file.read_text()) | {"asked for": Counter(perfect.asked)}
    return found


def test_classes_are_asked_for_as_often_as_the_data_have_them(played: dict[str, Any]) -> None:
    report = played["the data"]
    assert 6 <= report["asked for"]["rare"] <= 10  # 5 % of 160
    told = report["asked"]["proportions"]["rare"]
    assert told["asked"] == report["asked for"]["rare"] / 160
    assert told["training"] == pytest.approx(0.05, abs=0.01)


def test_a_perfect_generator_is_at_the_floor_which_is_none_of_its_own_reference(
    program: ModuleType, classes: Path, played: dict[str, Any]
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
    train = program.Part(images=every, captions=["common"] * 380 + ["rare"] * 20)
    split = program.metrics.real_split(program.metrics.in_proportion(train.captions, 0), 160)
    # Half of the images are 0.8 darker in 768 numbers; of the reference 5 % are: the means alone are this far apart.
    assert program.frechet(balanced, train, split)["value"] > 768 * (0.45 * 0.8) ** 2


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
def test_a_checkpoint_is_asked_with_what_it_takes(
    program: ModuleType, kind: Any, takes: str, asks: str | None
) -> None:
    pipe = SimpleNamespace(
        takes_text=takes in ("text", "both"),
        takes_classes=takes in ("classes", "both"),
        labels={"cat": 0, "dog": 1},
        get_label_ids=lambda names: [{"cat": 0, "dog": 1}[name] for name in names],
    )
    example = TeacherSample("1", text="a cat", label="cat")
    source = Source("d", (example,), kind, ("cat",) if kind == "class" else ())
    if asks is None:
        with pytest.raises(UserError, match="takes classes"):
            program.asked_with(pipe, source)
        return
    assert program.asked_with(pipe, source) == asks
    config = program.EvaluateConfig(checkpoint="c", data="d")
    split = program.metrics.real_split(range(400), 200)
    notes = "\n".join(program.remarks(pipe, source, config, asks, split, {}))
    assert ("dog" in notes) == (asks == "class_labels")  # a class that DATA has not
    assert ("takes captions, and DATA has none" in notes) == (asks == "prompt" and kind != "text")
    assert ("takes no condition" in notes) == (asks == "nothing" and kind != "unconditional")


def test_a_checkpoint_of_captions_and_classes_is_asked_for_the_classes_of_its_data(
    program: ModuleType, classes: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    shape = {"autoencoder_widths": (8, 16), "encoder_layers": (0, 1), "decoder_layers": (0, 1)}
    vae = build_autoencoder(AutoencoderConfig(latent_channels=4, **shape), 16)
    tokenizer = train_tokenizer(["common", "rare"])
    encoder = small_text_encoder(tokenizer, width=16, depth=1, heads=2)
    side = 16 // downscale_factor(vae)
    network = DiT(in_channels=4, width=16, depth=1, heads=1, num_classes=2, text_dim=16, sample_size=side)
    pipe = LatentFlowPipeline(
        vae.eval(), network.eval(), encoder.eval(), tokenizer, id2label={0: "common", 1: "rare"}
    )
    pipe.save_pretrained(tmp_path / "pipeline")
    flags = ["-n", 2, "--steps", 1, "--validation", 0.05, "--device", "cpu"]
    evaluate(program, tmp_path / "pipeline", classes, "-o", tmp_path / "x.json", *flags)
    report = json.loads((tmp_path / "x.json").read_text())
    assert report["asked"]["with"] == "class_labels"
    assert report["validation_loss"]["held_out"]["value"] > 0.9


# ---------------------------------------------------------------- the report, and mistakes


def test_what_is_no_number_is_null_with_its_reason(program: ModuleType) -> None:
    report = {"a": {"psnr": float("inf"), "ssim": 0.5}, "b": [float("nan"), 1]}
    told = json.loads(json.dumps(program.strict(report), allow_nan=False))
    assert told == {"a": {"psnr": None, "psnr_reason": "it came out as inf", "ssim": 0.5}, "b": [None, 1]}


@torch.no_grad()
def test_an_exact_copy_does_not_make_the_mean_infinite(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "encode", lambda vae, images: images)
    images = torch.zeros(3, 3, 16, 16)
    part = program.Part(images=images, captions=[""] * 3)
    errors = torch.tensor([0.0, 0.2, 0.2])[:, None, None, None]
    monkeypatch.setattr(program, "decode", lambda vae, latents: latents + errors[: len(latents)])
    found = program.reconstruction(SimpleNamespace(vae=None), part, 3)
    assert (found["exact_copies"], found["images"]) == (1, 3)
    assert found["psnr"] == pytest.approx(20, abs=0.01)  # 0.1 of 1
    monkeypatch.setattr(program, "decode", lambda vae, latents: latents)
    found = program.reconstruction(SimpleNamespace(vae=None), part, 3)
    assert (found["psnr"], found["psnr_reason"]) == (None, "every image is reproduced exactly")
    monkeypatch.setattr(program, "decode", lambda vae, latents: latents / errors)
    with pytest.raises(
        UserError, match="1 of 3 reconstructions hold values that are not finite, first number 0"
    ):
        program.reconstruction(SimpleNamespace(vae=None), part, 3)
    monkeypatch.setattr(program, "decode", lambda vae, latents: latents)
    tiny = program.Part(images=images[:, :, :8, :8], captions=[""] * 3)
    assert "fewer than 11 pixels" in program.reconstruction(SimpleNamespace(vae=None), tiny, 3)["ssim_reason"]


def test_counterparts_that_are_one_image_are_left_out(
    program: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = torch.tensor([-0.5, 0.5, 0.1, 0.1])[:, None, None, None]
    names = ["light hat", "dark hat", "light shoe", "dark shoe"]
    part = program.Part(images=levels.expand(4, 3, 16, 16), captions=names)
    none = program.Part(images=part.images[:0], captions=[])
    config = program.EvaluateConfig(checkpoint="c", data="d", attributes=("light", "dark"))
    found = program.attributes_of(none, {"held_out": part}, "prompt", config)
    assert (found.captions, found.own, found.equal) == (names[:2], [0, 1], 2)
    monkeypatch.setattr(program, "draw", lambda *rest: part.images[[0, 0]])
    right = program.attributes_right(None, found, (16, 16), "prompt", config)["right"]
    assert (right["count"], right["n"]) == (1, 2)  # both light
    with pytest.raises(UserError, match="no held-out caption has a counterpart"):
        program.attributes_of(none, {"held_out": program.Part(images=part.images[2:], captions=names[2:])}, "prompt",
                              config)  # fmt: skip


def test_images_that_are_not_finite_are_not_measured(
    program: ModuleType, images: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, prompt: list[str], height: int, width: int, **settings: Any) -> Any:
        drawn = torch.full((len(prompt), 3, height, width), 0.5)
        drawn[1, 0, 0, 0] = float("nan")
        return SimpleNamespace(images=drawn)

    monkeypatch.setattr(LatentFlowPipeline, "__call__", broken)
    flags = ["-n", 4, "--validation", 0.25, "--device", "cpu"]
    with pytest.raises(UserError, match=r"1 of 4 generated images .* not finite, first number 1"):
        evaluate(program, checkpoint, images, "-o", tmp_path / "x.json", *flags)
    assert not (tmp_path / "x.json").exists()


def test_mistakes_are_told_before_anything_is_computed(
    program: ModuleType, images: Path, checkpoint: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    report.write_text("{}")
    with pytest.raises(UserError, match="--overwrite"):
        evaluate(program, checkpoint, images, "-o", report)
    with pytest.raises(UserError, match=r"report\.json"):
        evaluate(program, checkpoint, images, "-o", tmp_path / "report.txt")
    with pytest.raises(UserError, match="--test FOLDER"):
        evaluate(program, checkpoint, images, "-o", tmp_path / "x.json", "--validation", 0)
    assert report.read_text() == "{}"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["-n", 1], "-n is 1"),
        (["-n", 10**9], "at most 1,000,000"),
        (["--seed", 2**70], "--seed is"),
        (["--seed", -1], "--seed is -1"),
        (["--guidance", "nan"], "--guidance is nan"),
        (["--validation", "nan"], "--validation is nan"),
        (["--validation", 2], "cannot hold out 2"),
        (["--attributes", "red"], "at least two, all different"),
        (["--attributes", "red", "red"], "at least two, all different"),
        (["-o", "{tmp}/file/report.json"], "file is no folder"),
        (["-o", "{tmp}/folder.json", "--overwrite"], "folder.json is a folder"),
        (["-o", "/proc/report.json"], "cannot be written"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_settings_that_cannot_be_are_told_in_a_sentence(
    program: ModuleType, images: Path, checkpoint: Path, tmp_path: Path, flags: list[Any], told: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    words = [str(flag).format(tmp=tmp_path) for flag in flags]
    with pytest.raises(UserError) as error:
        evaluate(program, checkpoint, images, "-o", tmp_path / "x.json", "--device", "cpu", *words)
    assert told in str(error.value)


def test_a_test_set_that_was_trained_on_is_told(
    program: ModuleType, images: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-n", 2, "--steps", 1, "--validation", 0.25, "--device", "cpu", "--test", images]
    evaluate(program, checkpoint, images, "-o", tmp_path / "x.json", *flags)
    told = "12 of the 12 images of --test are in DATA too"
    assert told in json.loads((tmp_path / "x.json").read_text())["notes"]
    assert told in capsys.readouterr().out


def test_data_that_the_checkpoint_does_not_know_are_refused(
    program: ModuleType, images: Path, checkpoint: Path, class_checkpoint: Path, tmp_path: Path
) -> None:
    other = tmp_path / "classes"
    for name in ("common", "rar"):
        (other / name).mkdir(parents=True)
        for number in range(4):
            to_pil(torch.full((3, 16, 16), number / 4)).save(other / name / f"{number}.png")
    equal = tmp_path / "equal"
    equal.mkdir()
    for number in range(4):
        to_pil(torch.zeros(3, 16, 16)).save(equal / f"{number}.png")
        (equal / f"{number}.txt").write_text("grey")
    Image.new("RGB", (16, 16), "red").save(equal / "z.png")
    (equal / "z.txt").write_text("red")
    for made, data, told in (
        (class_checkpoint, other, "did you mean 'rare'"),
        (class_checkpoint, images, "takes classes (common, rare)"),
        (checkpoint, equal, "all of them equal"),
        (checkpoint, tmp_path / "nowhere", "there is no folder"),
    ):
        flags = ["-o", tmp_path / "x.json", "--validation", 0.1, "--device", "cpu"]
        with pytest.raises(UserError) as error:
            evaluate(program, made, data, *flags)
        assert told in str(error.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("validation: [0.3]", "validation is [0.3]"),
        ("seed: many", "seed is 'many'"),
        ("columns: text", "columns is 'text'"),
        ("condition: [", "config.yaml is not valid YAML"),
        ("a: " + "[" * 1500, "config.yaml is nested too deep"),
    ],
)
def test_a_damaged_config_of_the_run_is_told(
    program: ModuleType, tmp_path: Path, content: str, told: str
) -> None:
    (tmp_path / "config.yaml").write_text(content)
    (tmp_path / "pipeline").mkdir()
    for checkpoint in (tmp_path, tmp_path / "pipeline"):  # a run folder, or the pipeline in it
        with pytest.raises(UserError) as error:
            program.as_trained(program.EvaluateConfig(checkpoint=str(checkpoint), data="d"))
        assert told in str(error.value)


def test_words_that_the_checkpoint_does_not_know_are_a_note(
    program: ModuleType, images: Path, checkpoint: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    folder = shutil.copytree(images, tmp_path / "others")
    rows = folder / "metadata.jsonl"
    rows.write_text(rows.read_text().replace('"text": "lime', '"text": "teal'))
    flags = ["-n", 12, "--steps", 1, "--validation", 0.25, "--batch-size", 2, "--device", "cpu"]
    evaluate(program, checkpoint, folder, "-o", tmp_path / "x.json", *flags)
    notes = json.loads((tmp_path / "x.json").read_text())["notes"]
    told = [note for note in notes if note.startswith("words that the checkpoint's vocabulary does not know")]
    assert len(told) == 1 and told[0].endswith(": 'teal'")
    assert not [one for one in recwarn if "vocabulary" in str(one.message)]
