"""Measure a checkpoint: quality and variety of its images, agreement with their prompts, share of copies.

    latentflow evaluate runs/cats/pipeline cats -o report.json
    latentflow evaluate checkpoints/emoji-64 emoji/train --test emoji/test -o report.json \\
        --attributes "light skin tone" "medium skin tone" "dark skin tone"

Images are generated for the captions or classes of training images, in the data's proportions, and compared with real
images in a feature space. Writes a report (JSON) and, beside it, two images: report.png with generated images, and
report-nearest.png with the training images nearest to each. Nothing is downloaded, unless --features,
--fid or --clip names a model that is not on this machine. docs/reference/evaluation.md explains each figure.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from latentflow.cli import parse, run
from latentflow.config import AdapterChoice, MemoryConfig
from latentflow.errors import UserError, finite, lookup, printable, whole

MOST = 1_000_000  # images; they are held in memory
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(AdapterChoice):
    """Settings of an evaluation: the checkpoint, the data, and how images are sampled."""

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """Pipeline folder, run folder, such as runs/cats, or hub id."""
    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """The images that it was trained on: a folder, or "shapes"."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"])] = "report.json"
    """File of the report (.json)."""
    overwrite: bool = False
    """Replace an existing report and the images beside it."""

    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 200
    """Images to generate, for the captions or classes of as many training images (repeated where there are fewer).
    With fewer than 50, most figures say little."""
    features: str | None = None
    """Feature space in which generated and real images are compared: efficientnet-lite0 (extra `features`), pixels-16
    or pixels-32 (nothing to install), inception (extra `metrics`; downloads weights), or the hub id or folder of a
    vision model of transformers, such as facebook/dinov2-small. Default: efficientnet-lite0 if it is installed, else
    pixels-16."""
    steps: int | None = None
    """Steps from noise to data; default: 16, or those of a few-step checkpoint; with --solver 20."""
    guidance: float | None = None
    """Guidance scale; 1 is off. Default: as of `latentflow generate`."""
    solver: str | None = None
    """Solver of the flow, as of `latentflow generate`; default: as that draws."""
    temperature: float = 1.0
    """Checkpoints of tokens: divides the logits, as of `latentflow generate`."""
    corrector: float = 0.0
    """Checkpoints of tokens: how many times each token is drawn again on the way."""
    seed: int = 0
    """Seed of the captions, of the noise, and of the choice of real images to compare with."""
    batch_size: int = 50
    """Images that are generated or encoded at once."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ..."""
    memory: MemoryConfig = field(default_factory=MemoryConfig)

    validation: float | None = None
    """Share of DATA that the run held out. This and the next ten settings are read from the run's config.yaml if
    CHECKPOINT lies in a run folder; otherwise their defaults are those of `latentflow train`."""
    validation_seed: int | None = None
    """Seed of that run."""
    stratify: bool | None = None
    """Hold out the same share of every class, as the run did. Without a run folder the default is True; checkpoints
    from before November 2026 need False."""
    condition: Literal["auto", "none", "class", "text"] | None = None
    """Condition of the network for DATA's images."""
    missing_caption: Literal["error", "empty", "skip"] | None = None
    """Handling of images without a caption or class."""
    masks: Literal["auto", "none", "alpha"] | None = None
    """Origin of the masks; with alpha the images are used without their transparency."""
    columns: dict[str, str] = field(default_factory=dict)
    """Rename table columns (of --test as well), as for `latentflow train`."""
    colours: Literal["srgb", "stored"] | None = None
    """Convert images (of --test as well) to sRGB by their colour profiles, or not, as for `latentflow train`."""
    control: tuple[Literal["none", "image", "labels"], ...] | None = None
    """Kinds of control images of DATA and --test, which are then no images of the set."""
    control_folder: str | None = None
    """Folder of DATA's control images."""
    background: str | None = None
    """Colour behind transparent images."""
    test: str | None = None
    """One more folder that was not trained on; its reconstruction and loss are reported as well."""

    attributes: tuple[str, ...] = ()
    """Words that distinguish captions, such as "light skin tone" "dark skin tone". An image is generated for every
    caption of --test (without it: of the held-out images) that contains one; it is right if, among the real images
    whose captions differ by that word only, the nearest is the one with the same word."""
    probe: bool = False
    """Also read the classes of unseen images from the network's features, by a linear probe and by the nearest
    training images, behind some of its blocks and at some times."""
    likelihood: bool = False
    """Also the density of images' latents in bits per dimension: of training images, and of unseen ones."""
    likelihood_images: int = 32
    """Images of each set for --likelihood; each takes some hundred evaluations of the network."""
    other: Annotated[str | None, tyro.conf.arg(metavar="DATA")] = None
    """Images of another kind: with --likelihood, how well the density tells them from unseen images of DATA."""
    fid: bool = False
    """Also FID in Inception's feature space (extra `metrics`; downloads weights)."""
    clip: str | None = None
    """Also the CLIP score under this hub id or folder, such as openai/clip-vit-base-patch16."""

    def __post_init__(self) -> None:
        fix = f"Give at least 2, to fit a distribution, and at most {MOST:,}; default: 200."
        whole("-n", self.n, 2, MOST, fix=fix)
        for flag, value, least, most in (
            ("--steps", self.steps, 1, None),
            ("--batch-size", self.batch_size, 1, None),
            ("--likelihood-images", self.likelihood_images, 2, MOST),
            ("--seed", self.seed, 0, LARGEST_SEED),
            ("--validation-seed", self.validation_seed, 0, LARGEST_SEED),
        ):
            if value is not None:
                whole(flag, value, least, most)
        for flag, number in (("--guidance", self.guidance), ("--validation", self.validation)):
            if number is not None:
                finite(flag, number)
        if self.solver is not None and self.solver != "tuned":
            from latentflow.flow import SOLVERS
            from latentflow.flow.discrete import SAMPLERS

            lookup({**SOLVERS, **SAMPLERS}, self.solver, "solver")
        for flag, given in (
            ("--other", self.other is not None),
            ("--likelihood-images", self.likelihood_images != EvaluateConfig.likelihood_images),
        ):
            if given and not self.likelihood:
                raise UserError(f"{flag} without --likelihood", f"Add --likelihood, or leave {flag} out.")
        if self.attributes and len(set(self.attributes)) < max(2, len(self.attributes)):
            raise UserError("--attributes must distinguish captions", "Give at least two, all different.")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a checkpoint, and write the report."""
    config = parse(EvaluateConfig, argv, prog="latentflow evaluate", description=__doc__ or "")

    from latentflow.inference.opening import check_checkpoint, open_pipeline

    check_checkpoint(config.checkpoint, config.checkpoint_config)

    import torch

    from latentflow import metrics
    from latentflow.evaluation import control, feature_figures, figures, probing, report
    from latentflow.evaluation.data import (
        condition_kind,
        held_out,
        labelled,
        load_image_sets,
        load_images,
        open_other,
        open_source,
        run_settings,
    )
    from latentflow.evaluation.lines import lines
    from latentflow.evaluation.sampler import HELD_OUT_CAPTIONS, TRAINING_CAPTIONS, VARIATIONS, Sampler
    from latentflow.families.few_steps import require_velocity
    from latentflow.families.latent_variable import require_density
    from latentflow.families.latentflow import NAMED_STEPS
    from latentflow.metrics import learned
    from latentflow.models.vision import EFFICIENTNET_LIBRARIES
    from latentflow.pipeline import LatentFlowPipeline
    from latentflow.pipeline.jumps import JumpSettings, check_solver
    from latentflow.utils.libraries import install_command

    settings = run_settings(config.checkpoint, config.data)
    settings |= {name: value for name in settings if (value := getattr(config, name)) not in (None, {})}
    space, chosen = config.features or metrics.usual_space(), config.features is not None
    config = dataclasses.replace(config, features=space, **settings)  # for the report
    output = report.check_output(config.output, config.overwrite)
    metrics.features(torch.zeros(1, 3, 32, 32), space)  # refuses one that cannot be loaded
    fid = learned.open_fid() if config.fid else None
    clip = learned.open_clip(config.clip) if config.clip is not None else None
    started = time.monotonic()

    # ---------------------------------------------------------------- the checkpoint and the images
    pipe = open_pipeline(LatentFlowPipeline, config.checkpoint, config.device, config, config.memory)
    model = pipe.model
    model.check_image_input()
    JumpSettings(config.temperature, config.corrector).check(model)
    if config.solver is not None:
        check_solver(model, config.solver)
    pipe.set_progress_bar_config(disable=True)
    solver = config.solver
    steps = config.steps or (
        pipe.usual_steps if solver in (None, "tuned") or model.draws_tokens else NAMED_STEPS
    )
    guidance = model.usual_guidance if config.guidance is None else config.guidance
    config = dataclasses.replace(config, steps=steps, guidance=guidance, solver=solver)
    source = open_source(config.data, settings)
    kind = condition_kind(model, source)
    test = None if config.test is None else open_source(config.test, settings | {"control_folder": None})
    train, unseen = load_image_sets(model, source, test, settings)
    data = report.describe_data(source, train, unseen)
    print(
        "images: "
        + ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in data["images"].items())
    )

    # Conditions are those of real training images, so in the data's own proportions. The first of these images stand
    # for what a perfect generator would make; the reference of both is all others.
    order = metrics.in_proportion(train.captions, config.seed)
    captions = [train.captions[order[i % len(order)]] for i in range(config.n)]
    real = metrics.real_split(order, config.n)
    beside, reference = train.rows(real.beside), train.rows(real.reference)
    notes = report.notes(model, source, test, kind, captions, real)
    if config.probe and source.kind != "class":
        raise UserError(f"--probe: {source.name} has no classes to read", "Leave it out.")
    if config.likelihood:
        require_velocity(model)
        if model.latent_variable != "image":  # of which there is a bound
            require_density(model)
    if config.other is not None or guidance != 1.0:
        model.require_null()
    other = None if config.other is None else open_other(config.other, settings)
    if config.attributes and kind == "nothing":
        raise UserError("--attributes needs a checkpoint that takes captions or classes", "Leave it out.")
    if clip is not None and not any(captions):
        raise UserError("--clip compares images with captions, and DATA has none", "Leave --clip out.")
    if config.attributes:
        new = unseen.get("test") or unseen["held_out"]
        carry = metrics.split_attributes(new.captions, config.attributes)
        new = new.rows([row for row, split in enumerate(carry) if split is not None])
        counterparts = figures.find_counterparts(train, new, config.attributes)

    # ---------------------------------------------------------------- without sampling: what the networks know
    sampler = Sampler(
        model=model,
        pipeline=pipe,
        condition_kind=kind,
        settings={
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "solver": solver,
            "temperature": config.temperature,
            "corrector": config.corrector,
        },
        seed=config.seed,
        batch_size=config.batch_size,
    )
    measured: dict[str, Any] = {
        "data": data,
        "asked": report.proportions(captions, train.captions, kind),
        "reconstruction": {
            name: figures.reconstruction(model, part.images, config.batch_size)
            for name, part in unseen.items()
        },
        "validation_loss": {name: figures.validation_loss(sampler, part) for name, part in unseen.items()},
        "training_loss": figures.training_loss(sampler, train),
    }

    new_images = unseen.get("test") or unseen["held_out"]
    if config.probe:
        measured["probe"] = probing.probe(sampler, train, new_images)
    if config.likelihood:
        compared = {"train": train, **unseen}
        if other is not None:
            compared["other"] = load_images(model, other, settings["background"])
        measured["likelihood"] = probing.likelihood(sampler, compared, config.likelihood_images)

    # ---------------------------------------------------------------- by sampling
    what = {"prompt": "training captions", "class_labels": "training classes"}.get(
        sampler.condition_kind, "images"
    )
    generated = sampler.sample(captions, TRAINING_CAPTIONS, what)
    measured["frechet_distance"] = figures.frechet_distance(generated, beside, reference)
    if kind != "nothing" and any(captions):
        measured["caption_retrieval"] = figures.caption_retrieval(generated, captions, train, unseen)
    measured["memorisation"] = figures.memorisation(generated, train, unseen.get("held_out"))
    if (
        model.latent_variable is not None
    ):  # its prior was drawn from; of training images it flatters by copying
        varied = train.rows([order[i % len(order)] for i in range(config.n)]).images
        varied = sampler.sample(captions, VARIATIONS, "variations of training images", like=varied)
        copied = figures.memorisation(varied, train, unseen.get("held_out"))
        measured["memorisation_of_variations"] = copied
    if config.data == "shapes" and kind != "nothing":
        measured["shapes"] = figures.shapes(sampler, generated, captions, beside)
    if config.data == "shapes" and control.draws_layouts_of_shapes(model, kind):
        measured["layouts"] = control.layouts(sampler, config.n)
    led = control.led_by_edges(model, held_out(source, settings) if test is None else labelled(test))
    if led is not None:
        measured["edges"] = control.edges(sampler, led, settings["background"], config.n)
    if config.attributes:
        combined = sampler.sample(new.captions, HELD_OUT_CAPTIONS, "held-out captions")
        measured["attributes"] = figures.attribute_accuracy(combined, counterparts)
    if fid is not None:
        measured["fid"] = figures.frechet_distance(generated, beside, reference, fid, config.batch_size)
    if clip is not None:
        measured["clip_score"] = figures.clip_scores(clip, generated, captions, beside, config.batch_size)

    sets = feature_figures.feature_sets(space, generated, captions, train, real, unseen, model.device)
    measured["feature_space"] = feature_figures.compare(
        sets, conditioned=kind != "nothing", classes=source.kind == "class"
    )
    if config.attributes:
        measured["feature_space"]["combinations"] = feature_figures.combinations(
            sets.of(combined),
            sets.of(new.images),
            new.captions,
            sets.train,
            sets.train_set.captions,
            config.attributes,
        )

    # ---------------------------------------------------------------- the report
    if space.startswith("pixels") and not chosen:
        better = install_command(*EFFICIENTNET_LIBRARIES)
        notes.append(f"pixels see colours and layout only; for a space that sees more: {better}")
    measured |= {"notes": notes, "seconds": round(time.monotonic() - started, 1)}
    with_solver = f", {solver}" if solver else ""
    print(f"{config.n:,} images, seed {config.seed}{with_solver}, steps {steps}, guidance {guidance:g}")
    print(printable("\n".join([*lines(measured), *(f"note: {note}" for note in notes)])))
    repeat = {"settings": dataclasses.asdict(config), "versions": report.versions()}
    repeat["checkpoint"] = report.weight_hashes(model)
    report.write(output, repeat | measured, generated[:64], *feature_figures.neighbour_sheet(sets, generated))
    print(f"Wrote {', '.join(map(str, report.output_files(output).values()))}")


if __name__ == "__main__":
    run(main)
