"""Settings of a training run: its data, what it starts from, and all others together; of a distillation; presets."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from ..errors import UserError, lookup
from ..utils.flags import Essential, flag_of
from ..utils.libraries import missing
from .control import ControlConfig
from .joint import JointConfig
from .latent_variable import LatentVariableConfig
from .loop import LoopConfig
from .model import AlignmentConfig, AutoencoderConfig, FlowConfig, NetworkConfig, RoutingConfig, TextConfig
from .tokens import TokenConfig

_REPLAYED = 1000  # images: up to here the model's own samples are mixed in by default


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The images, with their captions, classes and masks."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder of images, tar shards, a zip file, a table, a saved data set, hub:owner/name, a .yaml that mixes
    several, or `shapes` (docs/reference/data.md)."""
    resolution: Annotated[int, Essential("data")] = 64
    """Side in pixels to which images are resized and centre-cropped (with --buckets: of a square of as many
    pixels)."""
    background: str = "white"
    """Colour behind transparent images: a name or #rrggbb."""
    condition: Annotated[Literal["auto", "none", "class", "text"], Essential("data")] = "auto"
    """auto: captions, else classes (subfolders), else none. text: captions, else names of classes."""
    missing_caption: Literal["error", "empty", "skip"] = "error"
    """Handling of images without a caption, or without a class among others that have one: stop with an error, train
    on them without (empty), or skip them."""
    caption: Annotated[str | None, Essential("data")] = None
    """Caption of the images that have none, such as "a photo of sks dog"."""
    masks: Annotated[Literal["auto", "none", "alpha"], Essential("data")] = "auto"
    """Your own inpainting masks. auto: the metadata's mask column, else cat-mask.png beside cat.png. alpha: repaint
    what is transparent."""
    columns: dict[str, str] = field(default_factory=dict)
    """Rename table columns: pairs of our name and yours, such as `image photo text caption`."""
    colours: Literal["srgb", "stored"] = "srgb"
    """srgb converts images that have another colour profile to sRGB; stored takes all pixel values as they are."""
    shuffle_tags: int = 0
    """For captions that are lists of tags separated by commas: train on this many random orders of each list. 0
    keeps the order as it is."""
    keep_tags: int = 0
    """With --shuffle-tags: this many tags keep their place at the front."""
    balance_classes: bool = False
    """Use all classes equally often in training, the images of smaller ones more often than others. Images without a
    class are used as they are."""
    validation: float = 0.02
    """Share of the images that is held out for validation."""
    stratify: bool = True
    """Hold out the same share of every class. Runs that earlier versions began without it continue without it."""
    random_flip: Annotated[bool, Essential("data")] = False
    """Mirror images at random."""

    def wanted(self) -> dict[str, Any]:
        """Return the keyword arguments of `find_source`."""
        names = (
            "condition",
            "missing_caption",
            "masks",
            "columns",
            "colours",
            "shuffle_tags",
            "keep_tags",
            "caption",
        )
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class FramingConfig:
    """Cropping of the images."""

    buckets: Annotated[bool, Essential("data")] = False
    """Train on several aspect ratios, each image on the one nearest to its own, so that little is cropped away."""
    crops: int = 1
    """Number of crops of each image, at random places along its longer side. 1: only the centre."""
    mirror_captions: bool = False
    """With --random-flip: swap the words left and right in the captions of mirrored images."""
    size_conditioning: bool = False
    """Condition the network on the original size of each image and on what was cropped away (SDXL,
    arXiv:2307.01952)."""

    def __post_init__(self) -> None:
        if not 1 <= self.crops <= 64:
            raise UserError(f"--crops is {self.crops}", "Use 1 (the centre) to 64; each is encoded once.")


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig:
    """Fine-tuning the checkpoint of --init-from (docs/guide/fine-tune.md)."""

    prior_samples: int | None = None
    """Number of images that the checkpoint generates before training, to be trained on together with yours. 0: none.
    Default: 200, or 10 per class if that is more (at most 1000), if you have at most 1000 images; else none. Pretrained
    models: 100 if --prior-prompts is given, else none."""
    prior_share: float = 0.5
    """Share of these images in the samples of every step."""
    prior_prompts: str | None = None
    """Text file of captions for these images, one per line; those that the checkpoint was trained on are best.
    Default: one or two words of its vocabulary per image; pretrained models need the file."""
    quantize: Literal["nf4", "int8", "float8"] | None = None
    """Store the frozen weights of a pretrained model, and its text encoders, in 4 or 8 bits while an adapter is
    trained (extra `quantize`; nf4: extra `bitsandbytes` and a GPU). int8 and float8 switch --gradient-checkpointing on.
    Nothing is to be offloaded: text encoders and autoencoder leave the GPU before the network comes."""
    family_options: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE ...")] = ()
    """Options of a pretrained model's family: arguments of its own pipeline in diffusers, such as
    max_sequence_length=256."""
    outside_mask: float = 0.1
    """Pretrained models, data with masks: factor on the loss of what is black in an image's own mask."""

    def __post_init__(self) -> None:
        if self.prior_samples is not None and self.prior_samples < 0:
            raise UserError(f"--prior-samples is {self.prior_samples}", "Give a number from 0 on.")
        if not 0 <= self.outside_mask <= 1:
            raise UserError(f"--outside-mask is {self.outside_mask}", "Give a factor from 0 to 1.")
        if not 0 < self.prior_share < 1:
            raise UserError(
                f"--prior-share is {self.prior_share}",
                "Give a share such as 0.5; --prior-samples 0 mixes none in.",
            )

    def samples(self, images: int, classes: int) -> int:
        """Return how many images the checkpoint generates, given the numbers of training images and of its classes."""
        if self.prior_samples is not None:
            return self.prior_samples
        return min(1000, max(200, 10 * classes)) if images <= _REPLAYED else 0


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Fine-tuning by an adapter: the weights stay frozen, small factors beside them are trained (extra `lora`).

    Raises:
        UserError: a setting is out of bounds or has no effect, or peft is missing.
    """

    lora_rank: Annotated[int, Essential("model")] = 0
    """Rank of an adapter (LoRA), usually 16; 0: train all weights. Above 500 million parameters a pretrained model gets
    one by default."""
    lora_alpha: float | None = None
    """The adapter is multiplied by alpha / rank. Default: the rank."""
    lora_dora: bool = False
    """Also learn the length of each row of the weights (DoRA)."""
    lora_dropout: float = 0.0
    """Share of the adapter's inputs that are set to 0 at random while it is trained, against learning a few images by
    heart; 0 to below 1, such as 0.1."""
    lora_layers: tuple[str, ...] = ("attention", "feed-forward")
    """Layers with an adapter: attention, feed-forward, all (every linear layer), or parts of layer names, such as
    blocks.0 cross_attn."""
    lora_text_encoder: bool = False
    """Adapt the text encoder too: one that was trained with the checkpoint (words that it does not know yet are
    learned in any case), or the CLIP text encoders of Stable Diffusion 1 to 3, SDXL and FLUX.1, which then stay in
    memory and learn at a twentieth of the learning rate."""

    def __post_init__(self) -> None:
        if self.lora_rank < 0:
            raise UserError(f"--lora-rank is {self.lora_rank}", "It must be at least 1; 16 is usual.")
        if not self.lora_rank:
            for setting in dataclasses.fields(self):
                if getattr(self, setting.name) != setting.default:
                    flag = flag_of(setting.name)
                    raise UserError(f"{flag} without --lora-rank", "Add --lora-rank 16.")
            return
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise UserError(f"--lora-alpha is {self.lora_alpha}", "It must be above 0; default: the rank.")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"--lora-dropout is {self.lora_dropout}", "It must be 0 or more, and below 1.")
        if not self.lora_layers:
            raise UserError("--lora-layers names none", "Name some, or leave it out.")
        if importlib.util.find_spec("peft") is None:
            raise missing("--lora-rank needs", "peft")

    def describe(self) -> dict[str, Any]:
        """Return the settings that must not change when a run is resumed; see `FlowConfig.describe`."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name != "lora_dropout" or value}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Turn a folder of images into a diffusers pipeline; run again, the same line resumes."""

    data: DataConfig
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FOLDER")]
    """Run folder. The result is in `pipeline` or `adapter`."""
    init_from: Annotated[str | None, Essential()] = None
    """Fine-tune this pipeline folder, run folder or hub id, or a pretrained model of diffusers."""
    vae: Annotated[str | None, Essential()] = None
    """Pretrained autoencoder of diffusers, or a pipeline that has one (folder or hub id). Default: train one on your
    images first."""
    latents_as_is: bool = False
    """Scale the latents of --vae as the model does that it was published with, such as FLUX.1 or Stable Diffusion.
    Default: measure the mean and spread of each channel on your images where its config does not have them."""
    export_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the weights in `pipeline`; the run's checkpoints keep float32."""
    push_to_hub: str | None = None
    """Upload the result to the Hugging Face hub under this name (owner/name). A new repository is private."""
    license: str | None = None
    """Licence of the result for its model card: the hub's identifier, such as apache-2.0 or cc-by-4.0, or NAME=LINK for
    any other."""
    dry_run: Annotated[bool, Essential()] = False
    """Print the plan, sizes and an estimate of memory and time, then stop."""
    fine_tuning: FineTuningConfig = FineTuningConfig()
    framing: FramingConfig = FramingConfig()
    control: ControlConfig = ControlConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    joint: JointConfig = JointConfig()
    network: NetworkConfig = NetworkConfig()
    text: TextConfig = TextConfig()
    adapter: AdapterConfig = AdapterConfig()
    flow: FlowConfig = FlowConfig()
    latent_variable: LatentVariableConfig = LatentVariableConfig()
    tokens: TokenConfig = TokenConfig()
    routing: RoutingConfig = RoutingConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    loop: LoopConfig = LoopConfig()

    def __post_init__(self) -> None:
        if self.license is not None and not re.fullmatch(
            r"(?!other$)[a-z0-9][a-z0-9.+-]*(=https?://\S+)?", self.license
        ):
            raise UserError(
                f"--license {self.license} does not name a licence as the hub does",
                "They are in lower case, such as apache-2.0, mit, cc-by-4.0 or cc0-1.0; any other licence is "
                "NAME=LINK, such as my-licence=https://example.org/licence.",
            )
        if self.framing.mirror_captions and not self.data.random_flip:
            raise UserError(
                "--mirror-captions without --random-flip", "Add --random-flip: nothing is mirrored."
            )
        if self.latents_as_is and not self.vae:
            raise UserError("--latents-as-is without --vae", "Name the autoencoder, or leave it out.")
        if not self.init_from:
            for name in ("prior_samples", "prior_prompts"):
                if getattr(self.fine_tuning, name):
                    raise UserError(
                        f"{flag_of(name)} without --init-from",
                        "Name the checkpoint that should be kept.",
                    )
        if self.adapter.lora_rank and not self.init_from:
            raise UserError("--lora-rank without --init-from", "Name the checkpoint that it adapts.")
        latent = self.latent_variable
        if not self.init_from:
            latent.network()  # refuses settings of none
        if latent.latent_variable is not None and self.adapter.lora_rank:
            raise UserError(
                "--latent-variable with --lora-rank: an adapter has no place for its encoder",
                "Leave out one of the two.",
            )
        if self.joint.joint:
            self._check_joint()
        if self.tokens.tokens:
            self._check_tokens()
        elif self.flow.predicts_codes:
            self._check_codes()
        if self.adapter.lora_rank and self.loop.ema_lengths:
            raise UserError(
                "--ema-lengths with --lora-rank: averages of another length are not made for adapters",
                "Leave out one of the two.",
            )

    def unused_flags(self, flags: Collection[str]) -> str:
        """Return a warning that names those of the autoencoder's ``flags`` that change nothing; "" if all count."""
        fields = [field.name for field in dataclasses.fields(AutoencoderConfig)]
        found = "--vae" if self.vae else "--init-from" if self.init_from else ""
        unused = {*fields} if found else set()
        if self.joint.joint:  # it is trained, but with the flow
            unused = {*AutoencoderConfig.ALONE, *(AutoencoderConfig.BUILDING if found else ())}
        named = [flag_of(name) for name in fields if name in unused and name in flags]
        if not named:
            return ""
        why = f"the autoencoder is that of {found}" if found else "the autoencoder learns with the flow"
        return f"Warning: without effect, since {why}: {', '.join(named)}"

    def _check_joint(self) -> None:
        """Refuse what does not go with joint training."""
        others = {
            "--init-from": bool(self.init_from),
            "--tokens": self.tokens.tokens,
            "--prediction codes": self.flow.predicts_codes,
            "--latents-as-is": self.latents_as_is,
            "--control": bool(self.control.control),
            "--latent-variable": self.latent_variable.latent_variable is not None,
            "--masks alpha": self.data.masks == "alpha",
            "--buckets": self.framing.buckets,
            "--crops": self.framing.crops != 1,
            "--size-conditioning": self.framing.size_conditioning,
            "--ema-lengths": bool(self.loop.ema_lengths),
            "--early-stop": self.loop.early_stop > 0,
            "--shard": self.loop.shard,
            "--gradient-checkpointing": self.network.gradient_checkpointing,
        }
        if self.joint.joint != "alignment" and self.autoencoder.kl_weight != AutoencoderConfig.kl_weight:
            raise UserError(
                f"--kl-weight with --joint {self.joint.joint}: the flow measures the information in the latents",
                "Leave it out, or weigh that information: --joint-weight.",
            )
        self.joint.refuse_unfit(others, self.flow, self.alignment, None if self.vae else self.autoencoder)

    def _check_tokens(self) -> None:
        """Refuse what does not go with tokens."""
        others = {
            "control": bool(self.control.control),
            "latents-as-is": self.latents_as_is,
            "latent-variable": self.latent_variable.latent_variable is not None,
        }
        self._check_codebook("--tokens")
        self.tokens.refuse_unfit(self.flow, self.network, others, (self.routing, self.alignment))

    def _check_codes(self) -> None:
        """Refuse what does not go with the prediction of codes."""
        flag, network = "--prediction codes", self.network
        self._check_codebook(flag)
        unfit = {
            "--network unet": network.network != "dit",
            "--patch-size": network.patch_size not in (None, 1),
            "--route-share": self.routing.route_share > 0,
            "--alignment": self.alignment.alignment is not None,
        }
        for other, given in unfit.items():
            if given:
                raise UserError(
                    f"{other} with {flag}", "Leave it out: a transformer predicts the code of each latent."
                )

    def _check_codebook(self, flag: str) -> None:
        """Refuse a checkpoint to start from, and an autoencoder without codes, for what ``flag`` trains."""
        if self.init_from:
            raise UserError(
                f"--init-from with {flag}: such models are trained from scratch", "Leave out one of the two."
            )
        if not self.vae and not self.autoencoder.has_codebook:
            raise UserError(
                f"{flag} with --autoencoder-class {self.autoencoder.autoencoder_class}, whose latents are no tokens",
                "Add --autoencoder-class vq (or fsq), or name a VQModel: --vae.",
            )


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """The teacher, and how the student learns from it."""

    guidance: Annotated[float | None, Essential("training")] = None
    """Guidance scale of the teacher. The student learns it, and needs no guidance when it samples. Default: the
    teacher's usual one (4; 1 without a condition)."""
    step_counts: Annotated[tuple[int, ...], Essential("training")] = (1, 2, 4)
    """Numbers of evaluations that the student is made for; by default it uses the last one. (Method one-step: 1.)"""
    pairs: int = 10_000
    """Methods reflow and one-step: number of pairs of noise and image that the teacher generates, for the captions
    or classes of the data in turn."""
    pairs_steps: int = 20
    """Number of steps in which the teacher generates each pair."""
    pairs_solver: str | None = None
    """Solver with which the teacher generates the pairs. Default: the teacher's own."""
    pairs_folder: str | None = None
    """Folder in which the pairs are kept; existing pairs are not generated again. Default: `pairs` in the run
    folder."""

    def __post_init__(self) -> None:
        if self.guidance is not None and not 0.0 < self.guidance < float("inf"):
            raise UserError(f"--guidance is {self.guidance}", "Use 1 for none; 2 to 5 are usual.")
        rising = [*self.step_counts] == sorted({*self.step_counts})
        for name in ("pairs", "pairs_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{flag_of(name)} is {getattr(self, name)}", "Give at least 1.")
        if self.pairs_solver is not None:
            from ..flow import SOLVERS

            solver = lookup(SOLVERS, self.pairs_solver, "solver")
            if solver.stochastic:
                raise UserError(
                    f"--pairs-solver {self.pairs_solver} adds fresh noise on its way, and forgets the first noise",
                    "Use heun or dopri5.",
                )
        if not self.step_counts or not rising or self.step_counts[0] < 1:
            raise UserError(
                f"--step-counts {' '.join(map(str, self.step_counts))}", "Give rising numbers, such as 1 2 4."
            )


#: Values for `latentflow train --preset`: data, autoencoder, network and loop together.
PRESETS: dict[str, dict[str, Any]] = {
    # Minutes on two CPU cores; what the tutorials and benchmarks use.
    "tiny": {
        "resolution": 32,
        "latent_channels": 16,
        "autoencoder_widths": (24, 48, 96, 128),
        "encoder_layers": (0, 1, 1, 1),
        "decoder_layers": (1, 1, 1, 1),
        "autoencoder_steps": 600,
        "network_preset": "tiny",
        "text_width": 192,
        "text_heads": 3,
        "max_train_steps": 800,
        "train_batch_size": 128,
        "learning_rate": 4e-3,
        "optimizer": "muon",
        "validation_steps": 200,
        "preview_steps": 200,
        "checkpointing_steps": 200,
    },
    # An hour or two on a few CPU cores, minutes on a GPU.
    "small": {
        "resolution": 64,
        "latent_channels": 16,
        "network_preset": "small",
        "max_train_steps": 20_000,
        "train_batch_size": 64,
        "learning_rate": 4e-3,
        "optimizer": "muon",
    },
    # A GPU for a day.
    "base": {
        "resolution": 256,
        "latent_channels": 16,
        "autoencoder_widths": (64, 128, 256, 512),
        "encoder_layers": (0, 2, 2, 3),
        "decoder_layers": (1, 2, 2, 3),
        "autoencoder_steps": 50_000,
        "network_preset": "small",
        "width": 768,
        "depth": 12,
        "heads": 12,
        "patch_size": 2,
        "max_train_steps": 200_000,
        "train_batch_size": 128,
        "learning_rate": 3e-4,
        "optimizer": "adamw",
    },
}
