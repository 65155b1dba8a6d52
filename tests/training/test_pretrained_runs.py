"""The folder of a run that fine-tunes a pretrained model: its prior samples, what opens it, what it says of itself."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file

from latentflow import LatentFlowPipeline
from latentflow.config import SamplingConfig
from latentflow.errors import UserError
from latentflow.inference.opening import open_pipeline
from latentflow.inference.sample import read_capabilities
from latentflow.training import pretrained_result
from latentflow.training.fine_tune import pretrained_base
from latentflow.training.loop.data_order import Stream, seeded
from latentflow.training.report.card import CardFacts, write_adapter_card
from latentflow.training.report.folder import read_run
from latentflow.training.report.hub import contents
from latentflow.training.report.verdict import judge
from latentflow.web.inference_server import InferenceServer

from ..families.tiny import checkpoint
from .command import call, call_on_two, losses, paste, same_state

FLUX = "FluxPipeline-dev"
OPTION = "max_sequence_length=32"  # as many positions as its tiny encoder has
QUICK = [
    "--resolution", 16, "--mixed-precision", "no", "--validation", 0, "--validation-steps", 0, "--preview-steps", 0,
    "--log-steps", 1, "--checkpointing-steps", 1,
]  # fmt: skip
ADAPTER = ["--lora-rank", 2, "--learning-rate", 0.02, "--lr-warmup-steps", 1]
PROMPTS = ["a red apple", "a green tree", "a blue car"]
DRAW = ["--steps", 2, "--height", 16, "--width", 16]


def program(name: str) -> str:
    return f"../pipelines/{name}"


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Any:
    """No images drawn to be compared with the training images; sums that are the same on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained_result, "report_memorisation", lambda *given: None)
        patch.setattr(pretrained_base, "has_fast_bfloat16", lambda device: False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def flux(folder: Path) -> Path:
    checkpoint(FLUX).save_pretrained(folder / "flux")
    return folder / "flux"


@pytest.fixture(scope="module")
def sd3(folder: Path) -> Path:
    checkpoint("StableDiffusion3Pipeline").save_pretrained(folder / "sd3")
    return folder / "sd3"


@pytest.fixture(scope="module")
def prompts(folder: Path) -> Path:
    (folder / "prompts.txt").write_text("\n\n".join(PROMPTS))
    return folder / "prompts.txt"


@pytest.fixture(scope="module")
def line(images: Path, flux: Path, prompts: Path) -> list[Any]:
    """The flags of a run of an adapter with five prior samples."""
    start = [images, "--init-from", flux, "--family-options", OPTION, "--prior-prompts", prompts]
    return [*start, "--prior-samples", 5, *QUICK, *ADAPTER]


@pytest.fixture(scope="module")
def run(line: list[Any], cache: Path, folder: Path) -> Path:
    """A finished run of an adapter."""
    said = call(cache, *line, "-o", folder / "hats", "--max-train-steps", 4)
    assert "50% of each step are images that it draws itself before training, 5 in all" in said
    assert "plan: 4 steps of 2 samples = 0.3 epochs" in said  # 4 images of 12
    return folder / "hats"


@pytest.fixture(scope="module")
def full(images: Path, sd3: Path, cache: Path, prompts: Path, folder: Path) -> Path:
    """A finished run of all weights."""
    start = [images, "--init-from", sd3, "--prior-prompts", prompts, "--prior-samples", 2, *QUICK]
    call(cache, *start, "-o", folder / "full", "--max-train-steps", 2, "--learning-rate", 0.01)
    return folder / "full"


def unfinished(run: Path, copy: Path) -> Path:
    """A run as it is between its last checkpoint and its result."""
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("adapter", "pipeline"))
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(f"output: {run}", f"output: {copy}"))
    return copy


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


def prior(run: Path) -> list[torch.Tensor]:
    return [load_file(file)["latents"] for file in sorted((run / "prior").glob("*.safetensors"))]


# ---------------------------------------------------------------- prior samples


def test_prior_samples_are_what_users_draw_with_the_base(run: Path, flux: Path) -> None:
    pipe = LatentFlowPipeline.from_pretrained(flux, family_options={"max_sequence_length": 32})
    pipe.set_progress_bar_config(disable=True)
    found = prior(run)
    assert len(found) == 5
    for number, latents in enumerate(found):
        seed = seeded(0, Stream.TEACHER_SAMPLES, number).initial_seed()
        noise = pipe.model.noise(1, 16, 16, torch.Generator().manual_seed(seed))
        prompt = PROMPTS[number % 3]  # each as often as the others
        wanted = pipe(prompt, height=16, width=16, latents=noise, output_type="latent").images
        torch.testing.assert_close(latents, wanted, rtol=0.0, atol=1e-4)
        assert (found[number - 1] - wanted).abs().max() > 1e-2


def test_a_resumed_run_draws_only_what_is_missing_and_ends_the_same(
    run: Path, line: list[Any], cache: Path, tmp_path: Path
) -> None:
    again = tmp_path / "again"
    call(cache, *line, "-o", again, "--max-train-steps", 2, "--lr-warmup-steps", 1)
    files = sorted((again / "prior").glob("*.safetensors"))
    before = {file: file.read_bytes() for file in files}
    files[2].unlink()
    kept = {file: file.stat().st_mtime_ns for file in files if file != files[2]}
    call(cache, *line, "-o", again, "--max-train-steps", 4)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert files[2].read_bytes() == before[files[2]]
    assert same_state(again, run) and losses(again) == losses(run)
    said = call(cache, *line, "-o", again, "--max-train-steps", 5, "--prior-samples", 4, expect=2)
    assert "another number of them (--prior-samples, --prior-prompts)" in said
    config = yaml.safe_load((again / "config.yaml").read_text())
    assert config["prior_samples"] == 5 and config["gradient_accumulation_steps"] == 2


def test_trained_weights_do_not_draw_prior_samples(
    images: Path, full: Path, sd3: Path, cache: Path, prompts: Path, tmp_path: Path
) -> None:
    before = prior(full)
    run = tmp_path / "full"
    shutil.copytree(full, run)
    shutil.rmtree(run / "pipeline")
    for file in (run / "prior").glob("*.safetensors"):
        file.unlink()
    start = [images, "--init-from", sd3, "--prior-prompts", prompts, "--prior-samples", 2, *QUICK]
    call(cache, *start, "-o", run, "--max-train-steps", 3, "--learning-rate", 0.01)
    assert all(torch.equal(one, other) for one, other in zip(prior(run), before, strict=True))


@pytest.mark.slow
def test_two_processes_share_the_prior_samples_of_one(
    line: list[Any], run: Path, cache: Path, tmp_path: Path
) -> None:
    flags = ["--max-train-steps", 4, "--gradient-accumulation-steps", 1]
    call_on_two(cache, *line, "-o", tmp_path / "two", *flags)
    for one, other in zip(prior(tmp_path / "two"), prior(run), strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-5)
    mine, theirs = (
        load_file(path / "adapter/pytorch_lora_weights.safetensors") for path in (run, tmp_path / "two")
    )
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, rtol=0.0, atol=1e-3)  # a step is 0.02


def test_classes_are_the_prompts_of_a_model_that_draws_classes(
    images: Path, cache: Path, tmp_path: Path
) -> None:
    checkpoint("DiTPipeline").save_pretrained(tmp_path / "dit")
    for name, file in zip("01", sorted(images.glob("*.png")), strict=False):  # folders named as its classes
        (tmp_path / "data" / name).mkdir(parents=True)
        shutil.copy(file, tmp_path / "data" / name)
    start = [tmp_path / "data", "--init-from", tmp_path / "dit", "--condition", "class", *QUICK]
    said = call(cache, *start, "-o", tmp_path / "run", "--max-train-steps", 1, "--prior-samples", 3)
    assert "3 in all, for its 1000 classes" in said and len(prior(tmp_path / "run")) == 3
    said = call(cache, *start, "-o", tmp_path / "a", "--prior-prompts", "x.txt", expect=2)
    assert "draws classes" in said and "Leave it out" in said


def test_prior_samples_that_cannot_be_are_refused(
    images: Path, sd3: Path, prompts: Path, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("\n")

    def refused(*flags: object) -> str:
        return call(cache, images, "--init-from", sd3, *QUICK, "-o", tmp_path / "run", *flags, expect=2)

    said = refused("--prior-samples", 3)
    assert "--prior-samples without --prior-prompts" in said and '"a photo of a dog"' in said
    assert "--prior-share 0.2 without prior samples" in refused("--prior-share", 0.2)
    assert "No such file" in refused("--prior-prompts", tmp_path / "none.txt")
    assert "holds no caption" in refused("--prior-prompts", tmp_path / "empty.txt")
    said = refused("--prior-prompts", prompts, "--gradient-accumulation-steps", 1)
    assert "a step of one sample cannot have --prior-share of it" in said
    said = call(
        cache, images, "--init-from", sd3, *QUICK, "-o", tmp_path, "--dry-run", "--prior-prompts", prompts
    )
    assert "100 in all, for the prompts in" in said


# ---------------------------------------------------------------- what opens a run


def test_a_run_opens_as_its_base_with_its_adapter_finished_or_not(
    run: Path, flux: Path, cache: Path, tmp_path: Path
) -> None:
    open_run = unfinished(run, tmp_path / "open")

    def drawn(name: str, *flags: object) -> tuple[np.ndarray, str]:
        file = tmp_path / f"{name}.png"
        said = call(cache, "a dog", *DRAW, "-o", file, *flags, file=program("generate"))
        return pixels(file), said

    option = ["--family-options", OPTION]
    with_adapter, _ = drawn("both", "--checkpoint", flux, "--lora", run, *option)
    plain, _ = drawn("plain", "--checkpoint", flux, *option)
    finished, said = drawn("run", "--checkpoint", run)
    assert (finished == with_adapter).all() and (plain != with_adapter).any()
    assert "not finished" not in said
    newest, said = drawn("open", "--checkpoint", open_run)
    assert (newest == with_adapter).all()
    match = re.search(r"open is not finished: step 4 of 4. To finish it:\n  (latentflow .*)", said)
    assert match is not None
    assert read_capabilities(str(run)) is None  # asked once it is open
    pipe = open_pipeline(LatentFlowPipeline, str(run), "cpu", SamplingConfig(lora=(f"{run}=0.5",)))
    assert len(pipe.get_active_adapters()) == 2  # its own, and the one that is asked for

    # as one pipeline, which stock diffusers opens and a run starts from
    call(cache, open_run, "-o", tmp_path / "merged", file=program("export"))
    merged, _ = drawn("merged", "--checkpoint", tmp_path / "merged", *option)
    assert abs(merged - with_adapter).max() <= 1
    assert not [
        name
        for name in load_keys(tmp_path / "merged" / "transformer")
        if "lora" in name or "base_layer" in name
    ]
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "merged")
    assert type(stock).__name__ == "FluxPipeline"
    assert "adapters merged into its weights: open" in (tmp_path / "merged" / "README.md").read_text()

    half, _ = drawn("half", "--checkpoint", flux, "--lora", f"{run}=0.5", *option)
    call(cache, flux, "--lora", f"{run}=0.5", "-o", tmp_path / "halved", file=program("export"))
    halved, _ = drawn("halved", "--checkpoint", tmp_path / "halved", *option)
    assert abs(half - halved).max() <= 1 < abs(half - with_adapter).max()
    with pytest.raises(UserError, match="a folder with them would not open"):
        pipe.save_pretrained(tmp_path / "broken")

    # the line that finishes it
    assert "done:" in paste(cache, match[1])


def load_keys(folder: Path) -> list[str]:
    return [name for file in folder.glob("*.safetensors") for name in load_file(file)]


def test_what_does_not_open_says_why(run: Path, full: Path, sd3: Path, cache: Path, tmp_path: Path) -> None:
    nothing, gone = unfinished(run, tmp_path / "nothing"), unfinished(run, tmp_path / "gone")
    all_weights = unfinished(full, tmp_path / "all")
    for step in (nothing / "checkpoints").glob("step-*"):
        shutil.rmtree(step)
    config = yaml.safe_load((gone / "config.yaml").read_text())
    (gone / "config.yaml").write_text(yaml.safe_dump(config | {"init_from": str(tmp_path / "moved")}))

    def refused(run: Path) -> str:
        return call(cache, "a dog", "--checkpoint", run, *DRAW, file=program("generate"), expect=2)

    resume = f"\n  latentflow train --config {nothing}/config.yaml -o {nothing}"
    assert f"{nothing} is not finished and has saved no checkpoint yet" in refused(nothing)
    assert resume in refused(nothing)
    assert f"trains an adapter of {tmp_path / 'moved'}, which cannot be opened: no folder" in refused(gone)
    said = refused(all_weights)
    assert f"trains all weights of {sd3}, and its pipeline is written when it is finished" in said
    assert f"Its images so far are in {all_weights / 'samples'}" in said
    said = call(cache, "x", "--init-from", run, "-o", tmp_path / "next", *QUICK, expect=2)
    assert "is no pipeline to start from" in said and f"latentflow export {run} -o FOLDER" in said
    said = call(cache, sd3, "x", "-o", tmp_path / "student", file="distill", expect=2)
    assert "is a pretrained model" in said and "are distilled" in said


def test_a_fine_tune_starts_from_a_merged_adapter_and_from_trained_weights(
    images: Path, run: Path, full: Path, cache: Path, tmp_path: Path
) -> None:
    call(cache, run, "-o", tmp_path / "merged", file=program("export"))
    for start in (tmp_path / "merged", full):
        options = ["--family-options", OPTION] if start != full else []
        flags = [images, "--init-from", start, *options, *QUICK, *ADAPTER, "--max-train-steps", 1]
        assert "done:" in call(cache, *flags, "-o", tmp_path / f"from-{start.name}")
    trained, made = (folder / "transformer" for folder in (full / "pipeline", tmp_path / "merged"))
    assert load_keys(trained) and load_keys(made)


@pytest.fixture(scope="module")
def diffusion(images: Path, cache: Path, folder: Path) -> Path:
    """A run of Stable Diffusion, whose layouts are kohya's."""
    checkpoint("StableDiffusionPipeline").save_pretrained(folder / "sd")
    start = [images, "--init-from", folder / "sd", "-o", folder / "diffusion", *QUICK, *ADAPTER]
    call(cache, *start, "--max-train-steps", 1)
    return folder / "diffusion"


@pytest.mark.parametrize(
    ("made", "layout"), [("run", "comfyui"), pytest.param("diffusion", "kohya", marks=pytest.mark.slow)]
)
def test_its_adapter_is_exported_in_other_layouts(
    made: str, layout: str, cache: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run: Path = request.getfixturevalue(made)
    base = yaml.safe_load((run / "config.yaml").read_text())["init_from"]
    call(cache, run, "--adapter", "--layout", layout, "-o", tmp_path / layout, file=program("export"))
    names = [load_keys(folder) for folder in (run / "adapter", tmp_path / layout)]
    assert not {*names[0]} & {*names[1]} or layout == "comfyui"
    images = []
    for adapter in (run / "adapter", tmp_path / layout):
        pipe = diffusers.DiffusionPipeline.from_pretrained(base)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(adapter)
        options = {"max_sequence_length": 32} if made == "run" else {}
        sizes = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "np"}
        images.append(pipe("a dog", **sizes, **options, generator=torch.Generator().manual_seed(0)).images)
    np.testing.assert_allclose(images[1], images[0], rtol=0, atol=1e-5)


def test_the_page_offers_the_adapter_of_a_run(run: Path, flux: Path, tmp_path: Path) -> None:
    for opened in (run, unfinished(run, tmp_path / "open")):
        server = InferenceServer(str(opened), "cpu")
        assert server.name == opened.name
        assert list(server.adapters) == [opened.name] and server.adapters[opened.name].chosen
        assert server.pipe.get_active_adapters()
        assert server.capabilities.text
        assert not server.open(server.choice(False, [])).get_active_adapters()  # switched off
    found = InferenceServer(str(flux), "cpu", SamplingConfig(family_options=(OPTION,)), str(run.parent))
    assert run.name in found.adapters and not found.adapters[run.name].chosen


# ---------------------------------------------------------------- what a run says of itself


def snippets(card: Path) -> list[str]:
    """Return the lines of Python of a card, without those that need a GPU."""
    blocks = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    return [re.sub(r"^pipe\.to\(.*\n", "", block, flags=re.MULTILINE) for block in blocks]


def test_the_card_of_an_adapter_has_lines_that_work_in_stock_diffusers(
    run: Path, flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = run / "adapter" / "README.md"
    header = ModelCard.load(card, ignore_metadata_errors=False).data.to_dict()
    assert header["library_name"] == "diffusers" and header["pipeline_tag"] == "text-to-image"
    assert {"diffusers", "lora", "latentflow"} <= {*header["tags"]} and "base_model" not in header
    text = card.read_text()
    assert "An adapter (LoRA of rank 2, alpha 2) for a `FluxPipeline` of diffusers" in text
    assert f"Made for {flux.name}, a local checkpoint." in text
    for setting in (
        "path",
        "prediction",
        "coupling",
        "objective",
        "inpainting",
        "network_preset",
        "vae",
        "text_width",
    ):
        assert f"| {setting} |" not in text
    for setting in ("resolution | 16", "init_from | flux", "lora_rank | 2", "prior_prompts | prompts.txt"):
        assert f"| {setting} |" in text
    assert "flow matching" not in text and "register_with_diffusers" not in text

    monkeypatch.chdir(flux.parent)  # the base is named by the name of its folder
    stock, ours = snippets(card)
    assert "latentflow" not in stock
    for number, code in enumerate((stock, ours)):
        exec(code.replace("image.png", str(tmp_path / f"{number}.png")), {})
        assert pixels(tmp_path / f"{number}.png").shape == (16, 16, 3)
    assert f"--checkpoint flux --lora {run}/adapter --family-options {OPTION}" in text


def test_the_card_of_a_pipeline_has_lines_that_work_in_stock_diffusers(full: Path, tmp_path: Path) -> None:
    card = full / "pipeline" / "README.md"
    header = ModelCard.load(card, ignore_metadata_errors=False).data.to_dict()
    assert header["library_name"] == "diffusers" and "diffusers" in header["tags"]
    text = card.read_text()
    assert (
        "A `StableDiffusion3Pipeline` of diffusers" in text
        and "Fine-tuned from sd3, a local checkpoint." in text
    )
    for part in ("vae", "text_encoder", "text_encoder_3", "transformer"):
        assert f"| `{part}` |" in text
    assert "| objective |" not in text and "register_with_diffusers" not in text
    stock, ours = snippets(card)
    for number, code in enumerate((stock, ours)):
        exec(code.replace("image.png", str(tmp_path / f"{number}.png")), {})
        assert pixels(tmp_path / f"{number}.png").shape == (16, 16, 3)
    uploaded = contents(full / "pipeline", "me/cats")["README.md"]
    assert isinstance(uploaded, bytes)
    moved = uploaded.decode()
    assert str(full) not in moved.replace("--init-from", "") and moved.count('from_pretrained("me/cats"') == 2
    assert "library_name: diffusers" in moved


def test_the_card_links_a_base_of_the_hub(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub" / "models--owner--flux" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump(config | {"init_from": "owner/flux"}))
    facts = CardFacts(
        where="me/hats", kind="text", parts={}, example="a hat", resolution=16, stock="FluxPipeline"
    )
    write_adapter_card(copy / "adapter", copy, facts)
    card = copy / "adapter" / "README.md"
    header = ModelCard.load(card, ignore_metadata_errors=False).data.to_dict()
    assert header["base_model"] == "owner/flux" and header["base_model_relation"] == "adapter"
    text = card.read_text()
    assert "Made for [owner/flux](https://huggingface.co/owner/flux) (licence: apache-2.0" in text
    assert 'DiffusionPipeline.from_pretrained("owner/flux", dtype=torch.bfloat16)' in text
    assert text.count('pipe.load_lora_weights("me/hats")') == 2


def test_the_report_and_the_verdict_know_the_result(
    run: Path, full: Path, cache: Path, tmp_path: Path
) -> None:
    for folder, name in ((run, "adapter"), (full, "pipeline")):
        read = read_run(folder)
        assert read.finished and read.result == folder / name and read.is_pretrained
        call(cache, folder, "-o", tmp_path / f"{name}.html", file="report")
        page = (tmp_path / f"{name}.html").read_text()
        assert "finished: step" in page and "not finished" not in page and "Generate images:" in page
        assert "<td>init_from</td>" in page and "default of a training from scratch" in page
        assert ("<td>lora_rank</td>" in page) == (name == "adapter")
    open_run = unfinished(run, tmp_path / "open")
    assert not read_run(open_run).finished and judge(read_run(open_run)) is None
    # captions of few images draw them after training from scratch; a pretrained model is judged by what it has learnt
    learning = json.loads((run / "learning.json").read_text())
    for before, kind in ((1.0, None), (0.9, "not learnt")):
        fall = {
            "before": before,
            "after": 0.9,
            "without_captions": 0.91,
            "error": 0.001,
            "distinct_captions": 1.0,
        }
        (run / "learning.json").write_text(json.dumps(learning | fall))
        verdict = judge(read_run(run))
        assert (verdict and verdict.kind) == kind
        assert verdict is None or "fewer than the 1695 that such a run usually takes" in verdict.text
    (run / "learning.json").write_text(json.dumps(learning))


def test_push_takes_the_adapter_of_a_run(run: Path, full: Path, cache: Path, tmp_path: Path) -> None:
    said = call(cache, run, "me/hats", "--dry-run", file=program("push"))
    assert (
        "pytorch_lora_weights.safetensors" in said
        and "model_index" not in said
        and f"from {run}/adapter" in said
    )
    moved = contents(run / "adapter", "me/hats")["README.md"]
    assert isinstance(moved, bytes)
    assert moved.decode().count('pipe.load_lora_weights("me/hats")') == 2
    assert "--lora me/hats " in moved.decode() and str(run) not in moved.decode()
    assert "model_index.json" in call(cache, full, "me/cats", "--dry-run", file=program("push"))
    said = call(
        cache, unfinished(run, tmp_path / "open"), "me/x", "--dry-run", file=program("push"), expect=2
    )
    assert "is a run that is not finished" in said
