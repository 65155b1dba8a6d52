"""Training under control images: what the network is shown, what it learns from it, and the run of the real command."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor

from latentflow import LatentFlowImg2ImgPipeline, LatentFlowInpaintPipeline, LatentFlowPipeline
from latentflow.config import FlowConfig
from latentflow.data import LatentTable, one_size
from latentflow.data.images import to_tensor
from latentflow.data.labels import to_label_image
from latentflow.data.sources.shape_layouts import LABELS
from latentflow.data.sources.shapes import train_source
from latentflow.errors import UserError
from latentflow.models import Condition, ControlInputs, DiT
from latentflow.training.loop.data_order import SampleUse
from latentflow.training.losses import ControlImages
from latentflow.training.losses.flow import FlowLoss
from latentflow.training.losses.latent_data import BucketData, LatentData

from .command import TINY, call, losses, opened, same_state, sampled

BOTH = ControlInputs(image=3, labels=LABELS, cell=4)


def rows(numbers: list[int]) -> dict[str, Any]:
    """A batch of shapes as 8 x 8 pixels, with their label maps of 32 x 32."""
    examples = train_source(layouts=True).examples
    images = [to_tensor(examples[number % len(examples)].open()) for number in numbers]
    layouts = [
        np.asarray(examples[number % len(examples)].open_control("labels", (32, 32))) for number in numbers
    ]
    latents = F.interpolate(torch.stack(images), (8, 8), mode="area")
    layout = torch.from_numpy(np.stack(layouts))[:, None]
    return {"latents": latents, "sample_ids": numbers, "layout": layout, "control": latents}


def test_dropped_is_a_share_decided_by_seed_and_number() -> None:
    numbers = [*range(300)]
    batch = {"latents": torch.ones(300, 3, 1, 1), "sample_ids": numbers, "control": torch.ones(300, 3, 1, 1)}
    batch["layout"] = torch.zeros(300, 1, 4, 4, dtype=torch.uint8)
    control = ControlImages(BOTH, 0.3, seed=1)
    shown = control(Condition(), batch, training=True)
    assert shown.control is not None and shown.layout is not None
    kept = shown.control.flatten(1).all(1)
    led = (shown.layout >= 0).flatten(1).all(1)
    shares = [float(each.float().mean()) for each in (kept, led, kept & led)]
    assert np.abs(np.subtract(shares, [0.7, 0.7, 0.49])).max() < 0.08  # each on its own
    one = {name: value for name, value in batch.items() if name != "control"}
    of_one_kind = control(Condition(), one, training=True).layout
    assert torch.equal((of_one_kind >= 0).flatten(1).all(1), kept)  # type: ignore[operator]  # as before there were two
    part = {name: value[7:9] for name, value in batch.items()}
    again = control(Condition(), part, training=True)
    assert torch.equal(again.control, shown.control[7:9])  # type: ignore[arg-type]
    other = ControlImages(BOTH, 0.3, seed=2)(Condition(), batch, training=True)
    assert not torch.equal(other.control, shown.control)  # type: ignore[arg-type]
    validated = control(Condition(), batch, training=False)
    assert validated.control.all()  # type: ignore[union-attr]
    bare = {name: batch[name] for name in ("latents", "sample_ids")}  # samples of the checkpoint itself
    without = control(Condition(), bare, training=True)
    assert not without.control.any() and (without.layout == -1).all()  # type: ignore[union-attr]


def test_control_images_are_mirrored_with_the_latents() -> None:
    """Rows whose mirror images are told apart by one column: 3 in the image as it is, 7 in its mirror image."""
    source = train_source(layouts=True).subset([0])
    both = torch.tensor([3.0, 7.0])[None, :, None, None, None].expand(1, 2, 4, 8, 8)
    layout = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    layout[..., 0] = 5
    table = LatentTable(both, None)
    bucket = BucketData(table, {"layout": layout}, table)
    data = LatentData(one_size(source, (16, 16)), [bucket], {})
    found = data.__getitems__([SampleUse(0, number) for number in range(32)])
    mirrored = found["latents"][:, 0, 0, 0] == 7
    assert 8 < mirrored.sum() < 24
    assert torch.equal(found["control"], found["latents"])
    assert torch.equal(found["layout"][:, 0, 0, -1] == 5, mirrored)
    assert torch.equal(found["layout"][:, 0, 0, 0] == 5, ~mirrored)


def test_the_loss_with_the_map_falls_below_the_loss_without() -> None:
    torch.manual_seed(0)
    inputs = ControlInputs(labels=LABELS, cell=4)
    network = DiT(in_channels=3, width=32, depth=1, heads=2, patch_size=2, control=inputs.plain())
    loss = FlowLoss(network, FlowConfig(), 0, control=ControlImages(inputs, 0.3, 0)).train()
    optimizer = torch.optim.AdamW(loss.parameters(), lr=4e-3, weight_decay=0.0)
    data, held_out = rows([*range(0, 4096, 16)]), rows([*range(8, 2048, 32)])

    def measured() -> dict[str, float]:
        loss.eval()
        bare = {name: held_out[name] for name in ("latents", "sample_ids")}
        with torch.no_grad():
            found = {"with": float(loss(held_out)["loss"]), "without": float(loss(bare)["loss"])}
        loss.train()
        return found

    start = measured()
    assert start["with"] == start["without"]  # to the last bit: nothing is learnt yet
    for step in range(100):
        chosen = torch.randint(len(data["latents"]), (64,), generator=torch.Generator().manual_seed(step))
        batch = {name: value[chosen] for name, value in data.items() if name != "sample_ids"}
        batch["sample_ids"] = [64 * step + row for row in range(64)]
        loss(batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    end = measured()
    assert end["without"] < start["without"]
    assert end["with"] < 0.9 * end["without"], end


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen shapes with captions and label maps; two have masks."""
    root = tmp_path_factory.mktemp("layouts")
    for number, example in enumerate(train_source(layouts=True).examples[:240:20]):
        example.open().resize((16, 16)).save(root / f"{number:02d}.png")
        (root / f"{number:02d}.txt").write_text(str(example.text))
        control = example.open_control("labels", (16, 16))
        assert control is not None
        control.save(root / f"{number:02d}-control.png")
    Image.new("L", (16, 16), 255).save(root / "03-mask.png")
    return root


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under label maps that also inpaints, in two steps."""
    root = tmp_path_factory.mktemp("run")
    line = [folder, *TINY, "--control", "labels", "--random-flip", "--checkpointing-steps", 1]
    call(root / "cache", *line, "--max-train-steps", 2, "-o", root / "run")
    call(root / "cache", *line, "--max-train-steps", 1, "-o", root / "stopped")
    call(root / "cache", *line, "--max-train-steps", 2, "-o", root / "stopped", "--allow-changes")
    return root


def test_one_flag_trains_under_label_maps(run: Path) -> None:
    pipe = opened(run / "run" / "pipeline")
    assert pipe.model.control_kinds == ("labels",)
    assert pipe.takes_masks  # several kinds at once
    assert all(colour.startswith("#") for _, colour in pipe.model.control_labels)
    card = (run / "run" / "pipeline" / "README.md").read_text()
    assert "It also draws under a label map" in card
    assert np.isfinite(losses(run / "run")).all()
    assert same_state(run / "run", run / "stopped")


def layout(pipe: Any, number: int = 1) -> Tensor:
    side = pipe.model.native_side
    return torch.full((side, side), number)


def test_a_call_draws_with_and_without(run: Path) -> None:
    pipe = opened(run / "run" / "pipeline")
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    asked: dict[str, Any] = {"prompt": ["a red circle", "a blue square"], "guidance_scale": 2.0}
    plain = sampled(pipe, **asked)
    one = sampled(pipe, **asked, control_image=layout(pipe))
    assert not torch.allclose(one, plain, atol=1e-3)
    assert torch.equal(sampled(pipe, **asked, control_image=layout(pipe), control_scale=0.0), plain)
    nothing = torch.full_like(layout(pipe), 255)
    torch.testing.assert_close(sampled(pipe, **asked, control_image=nothing), plain)
    as_image = to_label_image(layout(pipe).numpy().astype(np.uint8), pipe.model.control_labels)
    by_image = sampled(pipe, **asked, control_image={"labels": [as_image, as_image]})
    torch.testing.assert_close(by_image, one)
    large = as_image.resize((48, 40), Image.Resampling.NEAREST)
    torch.testing.assert_close(sampled(pipe, **asked, control_image=large), one)


def test_the_control_scale_is_its_formula(run: Path) -> None:
    """V(null) + w (V(c) - V(null)), where V(c) = v(c, without) + s (v(c, control) - v(c, without))."""
    pipe = opened(run / "run" / "pipeline")
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
        model = pipe.model
        rows = model.encode_prompt(["a red circle", "a blue square"])
        under = model.with_layout(rows, layout(pipe)[None])
        null, null_under = model.unconditional(rows), model.unconditional(under)
        x, t = model.noise(2, 16, 16, torch.Generator().manual_seed(0)), torch.tensor(0.4)

        def v(rows: Any) -> Tensor:
            found: Tensor = model.velocity(rows, 1.0)(x, t)
            return found

        s, w = 1.7, 3.0
        both = [v(a) + s * (v(b) - v(a)) for a, b in ((rows, under), (null, null_under))]
        expected = both[1] + w * (both[0] - both[1])
        scaled = model.with_control_scale(under, s)
        torch.testing.assert_close(model.velocity(scaled, w)(x, t), expected, atol=1e-5, rtol=1e-4)
        assert model.with_control_scale(under, 1.0) is under


def test_inpainting_under_a_control_image_keeps_what_is_kept(run: Path) -> None:
    pipe = opened(run / "run" / "pipeline", LatentFlowInpaintPipeline)
    image = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 20, 24)
    mask[..., 5:15, 6:20] = 1.0
    map_ = torch.ones(20, 24, dtype=torch.long)
    for extra in ({}, {"padding_mask_crop": 2}, {"method": "pnp-flow", "control_scale": 1.5}):
        drawn = pipe(
            "a red circle",
            image=image,
            mask_image=mask,
            control_image=map_,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
            **extra,
        ).images
        assert torch.equal(drawn * (1 - mask), image * (1 - mask))


def test_an_image_is_drawn_anew_under_a_control_image(run: Path) -> None:
    pipe = opened(run / "run" / "pipeline", LatentFlowImg2ImgPipeline)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    asked: dict[str, Any] = {"prompt": "a red circle", "image": images, "strength": 0.8}
    plain = sampled(pipe, **asked)
    led = sampled(pipe, **asked, control_image=layout(pipe))
    assert plain.shape == led.shape
    assert not torch.allclose(plain, led, atol=1e-3)
    each = sampled(pipe, **asked, control_image=[layout(pipe), layout(pipe, 255)])
    torch.testing.assert_close(each[0], led[0])
    torch.testing.assert_close(each[1], plain[1])
    with pytest.raises(UserError, match="3 control images for 2 images"):
        sampled(pipe, **asked, control_image=[layout(pipe)] * 3)


def test_a_call_that_cannot_work_says_so(run: Path) -> None:
    pipe = opened(run / "run" / "pipeline")
    count = len(pipe.model.control_labels)
    for settings, why in (
        ({"control_image": layout(pipe, count)}, f"has labels from {count} to {count}"),
        ({"control_image": {"image": layout(pipe)}}, "kind of control image"),
        ({"control_image": torch.rand(3, 16, 16)}, "whole numbers"),
        ({"control_image": Image.new("RGB", (16, 16), "#123456")}, "colours that are no label's"),
        ({"control_image": [layout(pipe)] * 3}, "3"),
        ({"control_scale": 2.0}, "no control image"),
        ({"control_image": layout(pipe), "control_scale": float("nan")}, "control_scale"),
    ):
        with pytest.raises(UserError, match=why):
            pipe(["red", "blue"], num_inference_steps=1, **settings)


def test_a_checkpoint_is_extended_and_its_labels_stay(folder: Path, run: Path, tmp_path: Path) -> None:
    cache, base = run / "cache", run / "run" / "pipeline"
    line = [folder, *TINY, "--max-train-steps", 1, "--prior-samples", 2, "--init-from", base]
    call(cache, *line, "--control", "labels", "-o", tmp_path / "same")
    before, after = opened(base).model, opened(tmp_path / "same" / "pipeline").model
    assert after.control_labels == before.control_labels
    call(cache, *line, "--control", "image", "-o", tmp_path / "more")
    pipe = opened(tmp_path / "more" / "pipeline")
    assert pipe.model.control_kinds == ("image", "labels")
    two = {"image": Image.new("RGB", (16, 16)), "labels": layout(pipe)}
    assert sampled(pipe, prompt="a red circle", control_image=two).isfinite().all()
    with pytest.raises(UserError, match="does not say of which kind"):
        pipe("a red circle", control_image=layout(pipe))
    image, map_ = folder / "00.png", folder / "00-control.png"
    drawn = tmp_path / "drawn.png"
    common = ["a red circle", "--checkpoint", tmp_path / "more", "-o", drawn, "--steps", 2, "-n", 2]
    call(cache, *common, "--control", f"image={image}", f"labels={map_}", file="../pipelines/generate")
    assert drawn.with_stem("drawn-2").is_file()
    pair = ["--control", f"image={image}", map_]
    assert "of the kinds image, none" in call(cache, *common, *pair, file="../pipelines/generate", expect=2)
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(f"thing {number}" for number in range(25)))
    said = call(
        cache, *line, "--control", "labels", "--control-labels", labels, "-o", tmp_path / "no", expect=2
    )
    assert "those of the checkpoint" in said


def test_one_run_learns_both_kinds(folder: Path, run: Path, tmp_path: Path) -> None:
    """One checkpoint draws without, under either and under both; a kind that says nothing is one that is not given."""
    cache, base, data = run / "cache", run / "run" / "pipeline", tmp_path / "both"
    shutil.copytree(folder, data)
    for file in sorted(data.glob("*-control.png")):
        Image.open(file).convert("RGB").save(file.with_stem(f"{file.stem}-image"))
        file.rename(file.with_stem(f"{file.stem}-labels"))
    line = [*TINY, "--max-train-steps", 1, "--prior-samples", 0, "--init-from", base]
    call(cache, "--control", "image", "labels", data, *line, "--inpainting", "-o", tmp_path / "run")
    pipe = opened(tmp_path / "run" / "pipeline")
    assert pipe.model.control_kinds == ("image", "labels") and pipe.takes_masks
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    assert "It also draws under a control image and a label map" in card
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["control"] == ["image", "labels"]
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    asked: dict[str, Any] = {"prompt": ["a red circle", "a blue square"]}
    image, map_ = Image.open(data / "00-control-image.png"), layout(pipe)
    nothing = torch.full_like(map_, 255)
    drawn = {
        "none": sampled(pipe, **asked),
        "image": sampled(pipe, **asked, control_image={"image": image}),
        "labels": sampled(pipe, **asked, control_image={"labels": map_}),
        "both": sampled(pipe, **asked, control_image={"image": image, "labels": map_}),
    }
    for one, other in itertools.combinations(drawn.values(), 2):
        assert not torch.allclose(one, other, atol=1e-3)
    both: dict[str, Any] = {"image": image, "labels": map_}
    dropped = sampled(pipe, **asked, control_image={"image": image, "labels": nothing})
    torch.testing.assert_close(dropped, drawn["image"])

    def scaled(**scales: float) -> Tensor:
        return sampled(pipe, **asked, control_image=both, control_scale=scales)

    assert torch.equal(scaled(labels=0.0), drawn["image"])
    assert torch.equal(scaled(image=0.0, labels=0.0), drawn["none"])
    assert torch.equal(scaled(image=1.0), drawn["both"])
    even = sampled(pipe, **asked, control_image=both, control_scale=1.5)
    assert torch.equal(scaled(image=1.5, labels=1.5), even)
    torch.testing.assert_close(scaled(image=1.5 + 1e-6, labels=1.5), even)  # and goes on from there
    with pytest.raises(UserError, match="kind of control image 'labels'"):
        sampled(pipe, **asked, control_image={"image": image}, control_scale={"labels": 2.0})
    rows = pipe.model.encode_prompt(["a red circle"] * 2)
    led = rows.with_control(torch.full((1, 3, 16, 16), 0.5))
    under = pipe.model.with_layout(led, map_[None])
    x, t = pipe.model.noise(2, 16, 16, torch.Generator().manual_seed(0)), torch.tensor(0.4)

    def v(rows: Any) -> Tensor:
        return pipe.model.velocity(rows, 1.0)(x, t)  # type: ignore[no-any-return]

    with torch.no_grad():
        of_labels, none, all_ = v(pipe.model.with_layout(rows, map_[None])), v(rows), v(under)
        for image_scale, labels_scale, first in ((2.0, 0.7, v(led)), (-0.5, 1.8, of_labels)):
            high, low = max(image_scale, labels_scale), min(image_scale, labels_scale)
            expected = none + high * (first - none) + low * (all_ - first)
            set_ = pipe.model.with_control_scale(under, {"image": image_scale, "labels": labels_scale})
            torch.testing.assert_close(v(set_), expected, atol=1e-5, rtol=1e-4)
    drawing: dict[str, Any] = {"file": "../pipelines/generate"}
    common = ["a red circle", "--checkpoint", tmp_path / "run", "--steps", 1, "-o", tmp_path / "drawn.png"]
    files = [
        "--control",
        f"image={data / '00-control-image.png'}",
        f"labels={data / '00-control-labels.png'}",
    ]
    call(cache, *common, *files, "--control-scale", "image=2,labels=0.5", **drawing)
    wrong = call(cache, *common, *files, "--control-scale", "image=2,3", expect=2, **drawing)
    assert "--control-scale image=2,3" in wrong
    wrong = call(cache, *common, *files, "--control-scale", "edges=2", expect=2, **drawing)
    assert "kind of control image 'edges'" in wrong
    said = call(cache, folder, *line, "--control", "image", "labels", "-o", tmp_path / "no", expect=2)
    assert "12 images of 12 without a control image of kind image (00-control-image.png, ...)" in said
    said = call(cache, data, *line, "--control", "edges", "-o", tmp_path / "no", expect=2)
    assert "edges" in said and "labels" in said


def test_programs_take_control_images(folder: Path, run: Path, tmp_path: Path) -> None:
    cache, out = run / "cache", tmp_path / "out.png"
    common = ["--checkpoint", run / "run" / "pipeline", "-o", out, "--steps", 2, "--overwrite"]
    one = folder / "00-control.png"
    generate, inpaint = ({"file": f"../pipelines/{name}"} for name in ("generate", "inpaint"))
    call(cache, "a red circle", "--control", one, "--control-scale", 1.5, *common, **generate)
    assert Image.open(out).size == (16, 16)
    box = ["--box", 2, 2, 9, 9]
    call(cache, folder / "00.png", "a red circle", *box, "--control", one, *common, **inpaint)
    kept = np.array(Image.open(out).convert("RGB"))
    assert np.array_equal(kept[9:], np.array(Image.open(folder / "00.png"))[9:])
    wrong = call(cache, "red", "--control", folder / "00.png", *common, **generate, expect=2)
    assert "colours that are no label's" in wrong or "is in colour" in wrong
    pairs = ["red", "blue", "hat", "--control", one, one]
    assert "2 files for 3 prompts" in call(cache, *pairs, *common, **generate, expect=2)


def test_bad_control_images_stop_a_run_before_it_begins(folder: Path, tmp_path: Path) -> None:
    line = [*TINY, "--max-train-steps", 1, "-o", tmp_path / "run", "--dry-run"]
    cache = tmp_path / "cache"
    apart = tmp_path / "controls"
    apart.mkdir()
    for number in range(6):
        Image.new("L", (16, 16)).save(apart / f"{number:02d}.png")
    said = call(cache, folder, *line, "--control", "labels", "--control-folder", apart, expect=2)
    assert "6 images of 12 without a control image: 06.png, 07.png, 08.png, 09.png, 10.png and 1 more" in said
    said = call(cache, folder, *line, "--control-folder", apart, expect=2)
    assert "--control-folder without --control" in said
    said = call(cache, folder, *line, "--control", "image", "--control-dropout", 1, expect=2)
    assert "--control-dropout is 1.0" in said
    said = call(cache, folder, *line, "--control-dropout", 0.5, expect=2)
    assert "--control-dropout without --control" in said


def test_a_description_of_a_run_without_control_images_is_as_before() -> None:
    from latentflow.config import ControlConfig

    assert ControlConfig().describe() == {}
    kinds = [ControlConfig(control=("image",)), ControlConfig(control=("labels",))]
    assert kinds[0].describe() == {"control": {"kind": "image", "dropout": 0.2}}
    assert ControlConfig(control=("none",)) == ControlConfig()
    assert ControlConfig(control=("labels", "image")) == ControlConfig(control=("image", "labels"))
    assert kinds[0].describe() != kinds[1].describe()
    assert dataclasses.replace(kinds[0], control_folder="x").describe() == kinds[0].describe()
    assert ControlInputs().plain() is None
    assert LatentFlowPipeline.model.fget is not None
