"""Fine-tuning: what the checkpoint knew stays, what is chosen for it, and what it is reminded of."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers.utils.logging
import pytest
import torch
import transformers.utils.logging
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file
from transformers import Dinov2Config, Dinov2Model

from latentflow import LatentFlowPipeline
from latentflow.autoencoder import build_autoencoder
from latentflow.config import AutoencoderConfig, FineTuningConfig, LoopConfig
from latentflow.data import Source, cached_pixels, find_source, pixels_to_images
from latentflow.errors import UserError
from latentflow.models import DiT, small_text_encoder, train_tokenizer
from latentflow.training.data import refuse_renumbered_classes
from latentflow.training.export import preview_source, shown_classes
from latentflow.training.fine_tune.base import open_base, with_base_classes
from latentflow.training.fine_tune.defaults import fitted, held_out_share
from latentflow.training.fine_tune.memorisation import report_memorisation_of
from latentflow.training.fine_tune.prior import prior_prompts
from latentflow.training.fine_tune.teacher_samples import TeacherSample
from latentflow.training.loop.data_order import DataOrder
from latentflow.training.trained_model import networks_from

from ..data.images import noise
from .command import ROOT, TINY, call, call_on_two, losses, opened, same_state, sampled, save_images, state

QUICK = TINY + shlex.split("--validation 0 --preview-steps 0 --validation-steps 0 --checkpointing-steps 100")
STILL = ["--learning-rate", 0, "--weight-decay", 0, "--max-train-steps", 1, "--prior-samples", 4]


def checkpoint(folder: Path, **network: Any) -> Path:
    """A pipeline with random weights, 16 px: of classes cat and dog, or of captions where ``text_dim`` is given."""
    torch.manual_seed(0)
    sizes = {"autoencoder_widths": (8, 16), "encoder_layers": (0, 1), "decoder_layers": (0, 1)}
    vae = build_autoencoder(AutoencoderConfig(latent_channels=4, **sizes), 16)  # type: ignore[arg-type]
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4, scaling_factor=1.0)
    text: dict[str, Any] = {}
    if "text_dim" in network:
        tokenizer = train_tokenizer(["a red circle", "a small blue square"])
        encoder = small_text_encoder(tokenizer, network["text_dim"], 1, 1)
        text = {"tokenizer": tokenizer, "text_encoder": encoder}
    else:
        text = {"id2label": network.pop("id2label", {0: "cat", 1: "dog"})}
        network["num_classes"] = len(text["id2label"])
    dit = DiT(**{"in_channels": 4, "width": 16, "depth": 2, "heads": 1, "sample_size": 8} | network)
    with torch.no_grad():
        for one in dit.parameters():
            one += 0.05 * torch.randn_like(one)
    LatentFlowPipeline(vae=vae, transformer=dit, **text).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("base") / "pipeline")


@pytest.fixture(scope="module")
def animals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images each of ant, dog and cow."""
    names = [f"{label}/{number}.png" for label in ("ant", "dog", "cow") for number in range(3)]
    return save_images(tmp_path_factory.mktemp("animals"), *names)


# ---------------------------------------------------------------- classes


def test_new_classes_follow_those_of_the_checkpoint_which_draws_what_it_drew(
    base, animals, cache, tmp_path
) -> None:
    said = call(cache, animals, "-o", tmp_path, *QUICK, "--init-from", base, *STILL)
    assert "3 classes: ant, cow, dog" in said  # of subfolders
    assert "all 2 stay" in said and "1 of them are in the data and trained on: dog" in said
    assert "2 new ones follow: ant, cow" in said
    known, result = opened(base), opened(tmp_path / "pipeline")
    assert result.labels == {"cat": 0, "dog": 1, "ant": 2, "cow": 3}
    old, new = (pipe.transformer.y_embedder.embedding_table.weight for pipe in (known, result))
    assert torch.equal(new[[0, 1, 4]], old)  # the null is the last
    torch.testing.assert_close(new[2], old.mean(0))
    for name in ("cat", "dog"):
        kept = (sampled(pipe, class_labels=name, output_type="pt") for pipe in (known, result))
        torch.testing.assert_close(*kept, rtol=0, atol=1e-5)
    # Begun with these numbers: the same data with fewer classes known would train images under other ones.
    with pytest.raises(UserError, match="'dog' was 1, is 2"):
        refuse_renumbered_classes(tmp_path / "pipeline", Source("d", (), "class", ("ant", "cow", "dog")))


def test_classes_that_differ_in_case_or_spaces_only_are_refused(base, tmp_path) -> None:
    def joined(folder: Path, *classes: str) -> Source:
        return with_base_classes(Source("d", (), "class", classes), str(folder))

    assert joined(base, "cat", "Catfish").classes == ("cat", "dog", "Catfish")
    assert joined(base, "caterpillar").classes[2:] == ("caterpillar",)
    for name in ("Cat", " dog ", "dog_", "ｄｏｇ"):
        with pytest.raises(UserError, match=r"case or spaces.*\n.*Spell them as the checkpoint"):
            joined(base, "cat", name)
    accented = checkpoint(tmp_path / "base", id2label={0: "café_noir"})
    with pytest.raises(UserError, match="Spell them as the checkpoint"):
        joined(accented, "cafe\u0301 noir")  # as macOS spells it, in parts


@pytest.mark.parametrize(("base_name", "name"), [("café", "cafe\u0301"), ("cafe\u0301", "café")])
def test_a_class_in_the_other_spelling_of_unicode_is_the_checkpoints(base_name, name, tmp_path) -> None:
    """Its images get the class's number; the checkpoint, a distillation and a resumed run know it by both."""
    folder = checkpoint(tmp_path / "base", id2label={0: "tea", 1: base_name})
    data = tmp_path / "data"
    for seed, label in enumerate((name, "water")):
        (data / label).mkdir(parents=True)
        noise(seed).save(data / label / "1.png")
    source = with_base_classes(find_source(str(data)), str(folder))
    assert source.classes == ("tea", base_name, "water") and source.class_ids() == [1, 2]
    assert any("1 of them are in the data" in note and "1 new ones" in note for note in source.notes)
    model = open_base(str(folder))
    assert model.class_ids([name, base_name]) == [1, 1]
    assert model.call_arguments([name, "tea"]) == {"class_labels": [1, 0]}
    with pytest.raises(UserError, match="unknown class 'caf'"):
        model.class_ids(["caf"])
    refuse_renumbered_classes(folder, Source("d", (), "class", ("tea", name)))
    with pytest.raises(UserError, match="was 1, is 0"):
        refuse_renumbered_classes(folder, Source("d", (), "class", (name, "tea")))


def test_fine_tuning_without_its_condition_keeps_it_and_previews_what_it_can(
    base, animals, images, cache, tmp_path
) -> None:
    """All classes in turn, or the null of captions; `call` refuses a run that could not preview."""
    captioned = checkpoint(tmp_path / "base", text_dim=8)
    flags = "--condition none --max-train-steps 1 --prior-samples 4 --preview-steps 1 --inpainting"
    for name, source, data in (("classes", base, animals), ("captions", captioned, images)):
        run = tmp_path / name
        call(cache, data, "-o", run, *QUICK, "--init-from", source, *flags.split())
        assert (run / "samples" / "step-000001.png").is_file()
    assert LatentFlowPipeline.from_pretrained(tmp_path / "classes" / "pipeline").labels == {
        "cat": 0,
        "dog": 1,
    }
    assert LatentFlowPipeline.from_pretrained(tmp_path / "captions" / "pipeline").takes_text


# ---------------------------------------------------------------- another resolution


def test_the_resolution_is_the_checkpoints_unless_one_is_given(animals, cache, tmp_path) -> None:
    base, run = checkpoint(tmp_path / "base", sample_size=(8, 12)), tmp_path / "run"
    line = [animals, "-o", run, "--init-from", base, "--max-train-steps", 1, "--prior-samples", 0]
    assert QUICK[0] == "--resolution"
    said = call(cache, *line, *QUICK[2:], "--preset", "tiny")  # whose own is 32
    assert "resolution: 24 pixels" in said
    assert LatentFlowPipeline.from_pretrained(run / "pipeline").transformer.config.sample_size == 12
    assert "resolution: 24 pixels" in call(cache, *line, "--config", run / "config.yaml", "--dry-run")
    assert "resolution: 16 pixels" in call(cache, *line, *QUICK, "--dry-run")


@pytest.mark.parametrize("position", ["rope", "sincos"])
def test_another_resolution_has_its_own_positions(position, animals, cache, tmp_path) -> None:
    base = checkpoint(tmp_path / "base", position=position)
    line = [*QUICK, "--resolution", 24, "--init-from", base, *STILL]
    call(cache, animals, "-o", tmp_path / "run", *line)
    pipe = opened(tmp_path / "run" / "pipeline")
    assert pipe.transformer.config.sample_size == 12
    assert sampled(pipe, class_labels="dog", output_type="pt").shape == (1, 3, 24, 24)
    # The size that it is asked for decides, not the size that it is configured for: it computes what the base does.
    known = DiT.from_pretrained(base, subfolder="transformer")
    if position == "sincos":
        assert pipe.transformer.pos_embed.shape == (1, 144, 16)
        fresh = DiT(in_channels=4, width=16, depth=1, heads=1, sample_size=12, position="sincos")
        assert torch.equal(pipe.transformer.pos_embed, fresh.pos_embed)
    x = torch.randn(1, 4, 12, 12)
    torch.testing.assert_close(pipe.transformer(x, 0.5), known(x, 0.5), rtol=0, atol=1e-5)
    # Its own samples are of the size that it knew.
    assert load_file(tmp_path / "run" / "prior" / "000000.safetensors")["latents"].shape == (4, 4, 8, 8)


# ---------------------------------------------------------------- the checkpoint's own samples


def test_a_step_has_its_share_of_both_sets_and_each_has_its_own_epochs() -> None:
    def draws(processes: int, batch: int, first: int, last: int) -> list[tuple[int, int]]:
        order = DataOrder(
            size=25, batch_size=batch, processes=processes, seed=1, mixin_count=10, mixin_share=0.4
        )
        assert order.mixin_per_step == 4  # of 10
        found = [order.batches(first, last, process) for process in range(processes)]
        return sorted((d.sample_id, d.index) for one in found for part in one for d in part)

    whole = draws(1, 10, 0, 15)
    for step in range(15):
        assert sum(index >= 15 for _, index in whole[10 * step : 10 * step + 10]) == 4
    uses = Counter(index for _, index in whole)
    assert {uses[index] for index in range(15)} == {6} and {uses[index] for index in range(15, 25)} == {6}
    assert whole == draws(2, 5, 0, 15) == draws(1, 10, 0, 7) + draws(2, 5, 7, 15)
    lone = DataOrder(size=5, batch_size=2, mixin_count=3, mixin_share=0.01)
    assert lone.mixin_per_step == 1


def test_samples_that_were_drawn_are_not_drawn_again_and_a_resumed_run_is_exact(
    base, animals, cache, tmp_path, monkeypatch
) -> None:
    line = [animals, *QUICK, "--init-from", base, "--prior-samples", 6, "--max-train-steps", 4]
    line += ["--checkpointing-steps", 2, "--inpainting"]  # so that their pixels are kept as well
    monkeypatch.setattr("latentflow.training.fine_tune.teacher_samples._TOGETHER", 4)
    said = call(cache, *line, "-o", tmp_path / "whole")
    assert "generates itself, 6 in all" in said and "its 2 classes" in said
    files = sorted((tmp_path / "whole" / "prior").glob("*.safetensors"))
    assert [len(load_file(file)["latents"]) for file in files] == [4, 2]
    assert load_file(files[0])["pixels"].dtype == torch.uint8
    # Killed after the first file, and again in training.
    begun = tmp_path / "begun" / "prior"
    begun.mkdir(parents=True)
    for name in ("drawn.json", files[0].name):
        (begun / name).write_bytes((tmp_path / "whole" / "prior" / name).read_bytes())
    before = (begun / files[0].name).stat().st_mtime_ns
    resumed = [*line, "-o", tmp_path / "begun"]
    call(cache, *resumed, "--max-train-steps", 2, "--lr-scheduler", "constant")
    call(cache, *line, "-o", tmp_path / "straight", "--lr-scheduler", "constant")
    call(cache, *resumed, "--lr-scheduler", "constant")
    assert (begun / files[0].name).stat().st_mtime_ns == before
    assert same_state(tmp_path / "straight", tmp_path / "begun")
    # A line that is refused changes nothing: the run's own settings are what it is resumed with.
    settings = (tmp_path / "begun" / "config.yaml").read_text()
    said = call(cache, *line[:-5], "-o", tmp_path / "begun", "--prior-samples", 5, "--inpainting", expect=2)
    assert "drawn otherwise:\n  other classes or captions, or another number of them" in said
    said = call(cache, *resumed[:-3], "-o", tmp_path / "begun", "--seed", 3, expect=2)
    assert "\n  seed: 0 -> 3\n" in said and "\n  without the pixels of each sample" not in said
    call(cache, *resumed, "--path", "trigonometric", expect=2)
    assert (tmp_path / "begun" / "config.yaml").read_text() == settings
    call(cache, *resumed, "--log-steps", 2)  # may change
    assert "log_steps: 2" in (tmp_path / "begun" / "config.yaml").read_text()
    os.truncate(files[1], files[1].stat().st_size // 2)
    said = call(cache, *line, "-o", tmp_path / "whole", "--max-train-steps", 5, expect=2)
    assert f"{files[1]} cannot be read" in said and "Remove it: its samples are drawn again." in said


@pytest.mark.parametrize(
    "flags",
    [
        "--prior-samples 6",
        # Without captions the text encoder is used by none, or by one process alone: that with the step's sample.
        "--prior-samples 0 --condition none --prior-share 0.25",
        pytest.param("--prior-samples 6 --condition none --prior-share 0.25", marks=pytest.mark.slow),
        pytest.param(
            "--prior-samples 6 --condition none --prior-share 0.25 --auto-micro-batch", marks=pytest.mark.slow
        ),
    ],
)
def test_two_processes_mix_as_one_does(flags, base, animals, images, cache, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    data = animals
    if "none" in flags:
        data, base = images, checkpoint(tmp_path / "base", text_dim=8)
    line = [data, *QUICK, "--init-from", base, *f"{flags} --max-train-steps 3 --mixed-precision no".split()]
    call(cache, *line, "-o", tmp_path / "one")
    call_on_two(cache, *line, "-o", tmp_path / "two", "--train-batch-size", 2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 3 and two == pytest.approx(one, abs=1e-4)
    weights, others = state(tmp_path / "one"), state(tmp_path / "two")
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], rtol=0, atol=1e-4)


def test_samples_have_pixels_where_an_alignment_needs_them(base, animals, cache, tmp_path) -> None:
    torch.manual_seed(5)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = Dinov2Config(**shape, image_size=28, patch_size=7)
    Dinov2Model(encoder).save_pretrained(tmp_path / "encoder")
    line = [animals, *QUICK, "--init-from", base, "--prior-samples", 4, "--max-train-steps", 2]
    line += ["--alignment", "encoder", "--alignment-encoder", tmp_path / "encoder", "--log-steps", 1]
    call(cache, *line, "-o", tmp_path / "run")
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["alignment"] > 0 for row in rows)


def test_the_samples_are_the_checkpoints_own_under_its_conditions(base, tmp_path) -> None:
    asked, line = prior_prompts(str(base), FineTuningConfig(prior_samples=5), 9, 0)
    assert asked == ["cat", "dog", "cat", "dog", "cat"] and "50% of each step" in line
    assert len(prior_prompts(str(base), FineTuningConfig(), 1000, 0)[0]) == 200
    none, advice = prior_prompts(str(base), FineTuningConfig(), 1001, 0)
    assert none == [] and "--prior-samples 200" in advice
    with pytest.raises(UserError, match="takes no captions"):
        prior_prompts(str(base), FineTuningConfig(prior_prompts="some.txt"), 9, 0)
    with pytest.raises(UserError, match="--vae names another"):
        prior_prompts(str(base), FineTuningConfig(prior_samples=5), 9, 0, vae="other")

    captioned = str(checkpoint(tmp_path / "captioned", text_dim=8))
    known = {"red", "circle", "small", "blue", "square"}
    words, line = prior_prompts(captioned, FineTuningConfig(), 9, 0)
    assert len(words) == 200 and set(" ".join(words).split()) == known and "--prior-prompts" in line
    (tmp_path / "captions.txt").write_text("a red circle\n\n a blue square \n")
    prompts = FineTuningConfig(prior_samples=3, prior_prompts=str(tmp_path / "captions.txt"))
    assert prior_prompts(captioned, prompts, 9, 0)[0] == ["a red circle", "a blue square", "a red circle"]
    # Of more captions than samples, not the first.
    (tmp_path / "captions.txt").write_text("\n".join(map(str, range(1000))))
    assert prior_prompts(captioned, prompts, 9, 0)[0] == ["0", "333", "666"]


def test_memorisation_is_measured_on_all_classes_and_its_failure_is_a_warning(
    base, tmp_path, monkeypatch, caplog
) -> None:
    (tmp_path / "pipeline").symlink_to(base)
    for number in range(20):
        file = tmp_path / "data" / ("cat" if number < 18 else "dog") / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise(number, 16, 16).save(file)
    source, asked = find_source(str(tmp_path / "data")), []
    unreadable = tuple(TeacherSample(f"{n}", label="cat" if n < 18 else "dog") for n in range(20))
    draw = LatentFlowPipeline.__call__

    def drawn(self: LatentFlowPipeline, **settings: Any) -> Any:
        asked.extend(settings["class_labels"])
        return draw(self, **settings, num_inference_steps=1)

    monkeypatch.setattr(LatentFlowPipeline, "__call__", drawn)
    monkeypatch.setenv("LATENTFLOW_CACHE", str(tmp_path / "cache"))
    report_memorisation_of(tmp_path, source, source.subset([]), "white", torch.device("cpu"))
    assert Counter(asked) == {0: 15, 1: 1}
    (tmp_path / "memorisation.json").unlink()
    lost = Source("d", unreadable, "class", ("cat", "dog"))
    report_memorisation_of(tmp_path, lost, lost.subset([]), "white", torch.device("cpu"))
    assert "was not measured whether the result copies your images: 0 was drawn as latents" in caplog.text
    assert not (tmp_path / "memorisation.json").exists()


def test_a_duplicate_in_the_data_does_not_hide_copies(base, tmp_path, monkeypatch, caplog) -> None:
    caplog.set_level("INFO")
    (tmp_path / "pipeline").symlink_to(base)
    for number, name in enumerate(["cat/0", "cat/1", "dog/2", "dog/3"]):
        for copy in "ab":
            (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
            noise(number, 16, 16).save(tmp_path / "data" / f"{name}{copy}.png")
    source = find_source(str(tmp_path / "data"))

    def copies(self: LatentFlowPipeline, height: int, **settings: Any) -> Any:
        images = pixels_to_images(cached_pixels(source, height, "white")[:])
        return SimpleNamespace(images=(images.repeat(2, 1, 1, 1) + 1) / 2)

    monkeypatch.setattr(LatentFlowPipeline, "__call__", copies)
    monkeypatch.setenv("LATENTFLOW_CACHE", str(tmp_path / "cache"))
    report_memorisation_of(tmp_path, source, source.subset([]), "white", torch.device("cpu"))
    assert "WARNING: memorisation: 16 of 16 generated images are nearly copies" in caplog.text
    found = json.loads((tmp_path / "memorisation.json").read_text())
    assert (found["ratio"], found["copied"], found["drawn"]) == (0.0, 16, 16)
    assert (found["new"], found["compared"]) == ("left out", 4)  # different images


# ---------------------------------------------------------------- defaults


def test_defaults_follow_from_the_number_of_images_and_flags_win() -> None:
    loop = LoopConfig(train_batch_size=64)
    few = fitted(loop, (), 40, own_share=0.5)
    assert few.learning_rate == pytest.approx(4e-4) and few.lr_embeddings == 5
    assert few.max_train_steps == 313  # 250 uses of 40 images, 32 a step
    assert (few.lr_warmup_steps, few.validation_steps, few.preview_steps) == (31, 31, 78)
    assert (few.lr_decay_share, LoopConfig().lr_decay_share) == (1.0, 0.2)
    more = fitted(loop, (), 500, own_share=1.0)
    assert 64 * more.max_train_steps / 500 == pytest.approx(79, abs=1)
    assert fitted(loop, (), 10**6, own_share=1.0).max_train_steps == 20_000
    own = fitted(loop, {"learning_rate", "max_train_steps"}, 40, own_share=0.5)
    assert (own.learning_rate, own.max_train_steps, own.lr_warmup_steps) == (2e-3, 20_000, 100)
    assert own.lr_embeddings == 1
    adapter = fitted(loop, (), 40, own_share=0.5, adapter=True)  # begins at nothing
    assert (adapter.learning_rate, adapter.lr_embeddings, adapter.max_train_steps) == (1.2e-2, 1, 313)
    student = fitted(loop, (), 40, own_share=0.5, adapter=True, student=True)
    assert student.learning_rate == 2e-3
    with pytest.raises(UserError, match="a step of one sample"):
        fitted(LoopConfig(train_batch_size=1), (), 40, own_share=0.5)
    assert held_out_share((), 0.02, 19) == 0 and held_out_share((), 0.02, 20) == 0.02
    assert held_out_share({"validation"}, 0.02, 5) == 0.02


def test_the_plan_says_what_was_chosen(base, animals, cache, tmp_path) -> None:
    line = [animals, "-o", tmp_path / "run", "--resolution", 16, "--init-from", base, "--dry-run"]
    said = call(cache, *line, "--preset", "tiny")
    assert "--learning-rate 0.0008" in said  # a fifth of the preset's
    assert "9 images to train on, 0 held out" in said and "few images (9)" in said
    assert "200 in all" in said
    drawn = re.search(
        r"prior samples: 200 of 16 pixels .* in 20 evaluations each, .*FLOPs, .* here; (.*) MiB on", said
    )
    values = math.prod(LatentFlowPipeline.from_pretrained(base).model.latent_shape(16, 16))
    assert float(drawn[1]) == pytest.approx(200 * 4 * values / 2**20, rel=0.06)
    said = call(cache, *line, "--learning_rate", "0.003", "--max-train-steps=7", "--prior-samples", 0)
    assert "learning rate 0.003" in said and "plan: 7 steps" in said and "prior samples: none" in said
    assert "of 16 pixels are drawn" not in said
    assert not (tmp_path / "run").exists()


def test_a_fine_tune_goes_on_with_what_the_checkpoint_was_trained_for(animals, cache, tmp_path) -> None:
    """Path, prediction, coupling and guidance are the checkpoint's without being named; what is named wins, or is
    refused."""
    base = checkpoint(tmp_path / "base", condition_channels=8)
    pipe = LatentFlowPipeline.from_pretrained(base)
    asked: dict[str, Any] = {"path": "polynomial", "path_options": {"degree": 3.0}, "prediction": "data"}
    asked |= {"coupling": "data-dependent", "guidance_channels": 2, "usual_guidance": 1.5}
    asked |= {"time_density": "beta", "time_options": {"a": 3.0}}
    LatentFlowPipeline(**pipe.components, id2label=pipe.config.id2label, **asked).save_pretrained(base)
    line = [animals, *QUICK, "--init-from", base, "--max-train-steps", 1, "--prior-samples", 0]
    call(cache, *line, "-o", tmp_path / "run")
    result = LatentFlowPipeline.from_pretrained(tmp_path / "run" / "pipeline").config
    assert {name: result[name] for name in asked} == asked
    call(cache, *line, "-o", tmp_path / "own", "--coupling", "independent")
    assert LatentFlowPipeline.load_config(tmp_path / "own" / "pipeline")["coupling"] == "independent"
    said = call(cache, *line, "-o", tmp_path / "none", "--no-inpainting", expect=2)
    assert "Add --inpainting" in said
    said = call(cache, *line, "-o", tmp_path / "other", "--path", "condot", expect=2)
    assert "was trained with path polynomial" in said


def test_previews_show_what_the_data_show_though_little_of_it_is_held_out() -> None:
    source = Source("d", tuple(TeacherSample(f"{n}") for n in range(40)), "unconditional")
    few, many = source.subset([0]), source.subset(list(range(16)))
    assert preview_source(source, few) is source and preview_source(source, many) is many


def test_previews_show_classes_from_all_over() -> None:
    names = [f"{number:03}" for number in range(100)]
    assert shown_classes(names, {*names}) == [names[n * 100 // 16] for n in range(16)]
    assert shown_classes(names, {"070", "090"}) == ["070", "090"] + [
        [name for name in names if name not in ("070", "090")][n * 98 // 14] for n in range(14)
    ]
    assert shown_classes(["a", "b", "c"], {"c"}) == (["c", "a", "b"] * 6)[:16]


# ---------------------------------------------------------------- bad input


def test_a_checkpoint_that_is_damaged_or_not_ours_is_refused(tmp_path) -> None:
    base = checkpoint(tmp_path / "base", text_dim=8)
    weights = base / "text_encoder" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    damage = r"text_encoder/model.safetensors cannot be read: .*\nRestore the file"
    with pytest.raises(UserError, match=damage):
        open_base(str(base))
    weights.write_bytes(whole)
    sizes = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1, "norm_num_groups": 1}
    parts = LatentFlowPipeline.from_pretrained(base).components
    foreign = LatentFlowPipeline(**parts | {"transformer": DiTTransformer2DModel(**sizes)})
    foreign.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="its network is a DiTTransformer2DModel"):
        open_base(str(tmp_path / "other"))
    animals = Source("d", (), "class", ("cat",))
    with pytest.raises(
        UserError, match=r"is not conditioned on class, the data is\nUse --condition text \(the names"
    ):
        networks_from(open_base(str(base)), str(base), animals)


@pytest.mark.parametrize("file", ["flow", pytest.param("distill", marks=pytest.mark.slow)])
def test_the_plan_from_a_checkpoint_is_all_that_is_printed(file, tmp_path, images, capfd) -> None:
    """Neither the libraries' bars of loading nor their warnings, of which nobody who asked for a plan has any use."""
    base = ROOT / "checkpoints" / "emoji-64"
    data = ["--init-from", base, images] if file == "flow" else [base, images]
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.enable_progress_bar()  # as in a new process
    plan = call(tmp_path, *data, "-o", tmp_path / "run", "--dry-run", file=file)
    said = plan + "".join(capfd.readouterr())
    assert "fine-tuning" in said and "compute:" in said and ("student of" in said) == (file == "distill")
    assert not (tmp_path / "run").exists()
    for words in ("Loading", "it/s", "kept in float32", "gemm_4bit"):
        assert words not in said, said
