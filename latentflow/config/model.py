"""Settings of what is trained: the networks, the autoencoder, the loss."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from ..errors import UserError, lookup, unknown
from ..utils.flags import Essential, flag_of

if TYPE_CHECKING:
    from ..flow import Coupling, Objective, Path, TimeDensity, Weighting


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The velocity network."""

    network: Literal["dit", "unet"] = "dit"
    """Architecture of the velocity network: a transformer (dit) or diffusers' U-Net."""
    network_preset: str = "small"
    """Size of the transformer: tiny or small (modern blocks), or S, B, L, XL as in SiT."""
    patch_size: int | None = None
    """Side of the latent patch that becomes one token (dit). Default: the preset's."""
    width: int | None = None
    """Channels of the transformer (dit). Default: the preset's."""
    depth: int | None = None
    """Number of transformer blocks (dit). Default: the preset's."""
    heads: int | None = None
    """Attention heads (dit). Default: the preset's."""
    block: Literal["modern", "plain"] | None = None
    """Kind of the blocks, which sets the next four flags and the scale of the times together (dit). modern:
    RMSNorm, SwiGLU, rotary positions, normalised queries and keys. plain, as in DiT and SiT: LayerNorm, GELU,
    sin-cos positions. Default: the preset's."""
    norm: Literal["rms", "layer"] | None = None
    """Normalisation layers (dit). Default: those of --block."""
    activation: Literal["swiglu", "gelu"] | None = None
    """Activation of the feed-forward layers (dit). Default: that of --block."""
    position: Literal["rope", "sincos"] | None = None
    """Position encoding: rotary, or a fixed sin-cos table (dit). Default: that of --block."""
    qk_norm: bool | None = None
    """Normalise queries and keys (dit). Default: as --block has it."""
    registers: int | None = None
    """Number of register tokens (dit). Default: the preset's."""
    gradient_checkpointing: bool = False
    """Compute activations a second time in the backward pass instead of storing them: less memory, about a third
    more time."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text encoder for captions."""

    text_encoder: Annotated[str | None, Essential("model")] = None
    """Pretrained text encoder of transformers (hub id or folder), kept frozen. Default: a small one is trained with
    the network."""
    text_width: int = 256
    """Channels of the small text encoder."""
    text_depth: int = 2
    """Layers of the small text encoder."""
    text_heads: int = 4
    """Attention heads of the small text encoder."""
    text_length: int = 32
    """Longest caption, in tokens; longer captions are cut off."""


#: Settings of a codebook -> the classes that have them.
_OF_CODEBOOKS = {
    "codebook_size": ("vq",), "codebook_width": ("vq",), "fsq_levels": ("fsq",), "commitment_weight": ("vq", "fsq"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The autoencoder that is trained where no --vae is given."""

    #: Settings that build it, and those of the training of an autoencoder alone.
    BUILDING: ClassVar[tuple[str, ...]] = (
        "autoencoder_class", "latent_channels", *_OF_CODEBOOKS, "autoencoder_widths", "encoder_layers",
        "decoder_layers",
    )  # fmt: skip
    ALONE: ClassVar[tuple[str, ...]] = (
        "autoencoder_steps", "autoencoder_batch_size", "autoencoder_learning_rate", "autoencoder_optimizer",
    )  # fmt: skip

    autoencoder_class: Literal["dc", "kl", "vq", "fsq"] = "dc"
    """Class of the autoencoder in diffusers. dc: AutoencoderDC with a space-to-channel stem (deterministic, and
    cheaper for the same PSNR; see docs/measurements/autoencoder.md). kl: AutoencoderKL. vq: VQModel, whose images are
    tokens of a learned codebook. fsq: VQModel whose codebook is a fixed grid (arXiv:2309.15505)."""
    latent_channels: int = 16
    """Number of latent channels."""
    codebook_size: int = 1024
    """Number of codes (vq only)."""
    codebook_width: int = 8
    """Channels of a code (vq only); few, so that many codes are used."""
    fsq_levels: tuple[int, ...] = (8, 5, 5, 5)
    """Values of each channel of a code; their product is the number of codes (fsq only)."""
    commitment_weight: float = 0.25
    """Weight of the mean squared distance between latents and their codes (vq and fsq only)."""
    autoencoder_widths: tuple[int, ...] = (16, 64, 128, 256)
    """Channels at each resolution, finest first; n numbers downscale by 2^(n-1). With dc each is 4 times a divisor
    of the one before."""
    encoder_layers: tuple[int, ...] = (0, 1, 1, 2)
    """Residual blocks of the encoder at each resolution; a leading 0 is the space-to-channel stem (dc only)."""
    decoder_layers: tuple[int, ...] = (1, 2, 2, 2)
    """Residual blocks of the decoder at each resolution (all but dc use the largest number everywhere)."""
    autoencoder_steps: int | None = None
    """Optimiser steps. Default: --max-train-steps, but at most 3000."""
    autoencoder_batch_size: int = 16
    """Images per step and process."""
    autoencoder_learning_rate: float = 2e-3
    """Peak learning rate."""
    autoencoder_optimizer: Literal["adamw", "muon"] = "muon"
    """Optimiser of the autoencoder."""
    kl_weight: float = 1e-6
    """Weight of the KL term, which is summed over the latent and divided by the number of pixel values (kl
    only)."""
    perceptual_weight: float = 0.0
    """Weight of a perceptual loss: how different reconstructions look to a vision network. 0: off."""
    perceptual_features: str = "lpips"
    """Network of the perceptual loss: lpips (extra `lpips`; downloads VGG weights); or a network whose features are
    compared as they are: efficientnet-lite0 (extra `features`), or the hub id or folder of a vision model of
    transformers."""
    adversarial_weight: float = 0.0
    """Weight of the PatchGAN hinge loss, before the adaptive factor."""
    adversarial_start: int = 1_500
    """First step with the adversarial loss."""
    equivariance: float = 0.0
    """Probability that a step shrinks and rotates the latents, and decodes them to images shrunk and rotated in the
    same way (EQ-VAE, arXiv:2502.09509; 0.5 is usual). 0: off."""
    latent_noise: float = 0.0
    """Largest strength of the noise added to the latents that the decoder learns from: between none and this many
    times the latents' spread, chosen for each sample (as in l-DeTok, arXiv:2507.15856, which goes up to noise alone;
    0.5 is mild). 0: off."""

    def __post_init__(self) -> None:
        if not 0 <= self.equivariance <= 1:
            raise UserError(f"--equivariance is {self.equivariance}", "It must be from 0 to 1.")
        if not 0 <= self.latent_noise < math.inf:
            raise UserError(f"--latent-noise is {self.latent_noise}", "It must be finite, and not negative.")
        if self.perceptual_features != "lpips" and not self.perceptual_weight:
            raise UserError(
                f"--perceptual-features {self.perceptual_features} without --perceptual-weight",
                "Add --perceptual-weight 0.1, or leave it out.",
            )
        if self.codebook_size < 2 or self.codebook_width < 1:
            raise UserError(
                f"a codebook of {self.codebook_size} codes with {self.codebook_width} channels",
                "Use --codebook-size 1024 --codebook-width 8, or others of at least 2 and 1.",
            )
        if not self.fsq_levels or min(self.fsq_levels) < 2 or math.prod(self.fsq_levels) > _MOST_CODES:
            raise UserError(
                f"--fsq-levels {' '.join(map(str, self.fsq_levels))}: each is at least 2, and their product at most "
                f"{_MOST_CODES:,}",
                "Usual are 8 5 5 5 (1,000 codes), 7 5 5 5 5 (4,375) and 8 8 8 5 5 5 (64,000).",
            )
        if not 0 <= self.commitment_weight < math.inf:
            raise UserError(
                f"--commitment-weight is {self.commitment_weight}", "It must be finite, and not negative."
            )
        for name in sorted(changed(self) & _OF_CODEBOOKS.keys()):
            if self.autoencoder_class not in (kinds := _OF_CODEBOOKS[name]):
                raise UserError(
                    f"{flag_of(name)} with --autoencoder-class {self.autoencoder_class}",
                    f"Leave it out: it is of {' and '.join(kinds)}.",
                )
        if self.has_codebook and self.latent_noise:
            raise UserError(
                f"--latent-noise {self.latent_noise} with --autoencoder-class {self.autoencoder_class}",
                "Leave it out: the decoder learns from codes, which have no noise.",
            )

    @property
    def has_codebook(self) -> bool:
        """Return True if images become tokens of a codebook."""
        return self.autoencoder_class in ("vq", "fsq")

    def describe(self) -> dict[str, Any]:
        """Return the settings that must not change when a run is resumed.

        Settings that earlier versions did not have are left out at their defaults, so that their runs resume.
        """
        later = ("equivariance", "latent_noise", "perceptual_features", *_OF_CODEBOOKS)
        unchanged = set(later) - changed(self)
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in unchanged}


# Codes beyond these are more than the distances to them are worth.
_MOST_CODES = 2**18
# Settings that runs of earlier versions do not have, and their value in those runs.
_LATER: dict[str, Any] = {"time_uniform_from": 1.0, "objective_options": {}}
# Settings that name entries of tables and their options. The tables import torch: they are looked into only for what
# differs from the defaults, so that a command line is read without torch.
_NAMED = {
    "path", "path_options", "prediction", "coupling", "coupling_options", "objective", "objective_options",
    "weighting", "weighting_options", "time_density", "time_options",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """Learning of the velocity network: one entry of each table of `latentflow.flow` (docs/reference/design-space.md).

    Raises:
        UserError: an unknown name or option (the nearest is named), or choices that do not go together.
    """

    path: str = "condot"
    """Probability path from noise to data: condot (straight), variance-preserving, variance-exploding,
    trigonometric, polynomial, sqrt or ddpm (the noise of Stable Diffusion)."""
    path_options: dict[str, float] = field(default_factory=dict)
    """Options of the path, such as `beta_max 12`."""
    prediction: str = "velocity"
    """Prediction of the network: velocity, data, noise or score; or codes, how likely each code of the autoencoder's
    codebook is (Purrception, docs/guide/discrete.md; needs --autoencoder-class vq or fsq, or a VQModel as --vae)."""
    coupling: str = "independent"
    """Pairing of noise and data: independent, ot, sinkhorn, conditional-ot; with --inpainting also
    data-dependent (the flow starts from the known part of the image, with noise in the hole only). ot, sinkhorn and
    conditional-ot pair within one forward pass, so that its batch size affects what is learned."""
    coupling_options: dict[str, float] = field(default_factory=dict)
    """Options of the coupling, such as `regularization 0.05`."""
    objective: str = "flow-matching"
    """Objective to minimise: flow-matching learns velocities; mean-flow and its relatives learn average velocities,
    which generate in one to four evaluations (docs/guide/few-steps.md)."""
    objective_options: dict[str, float] = field(default_factory=dict)
    """Options of the objective, such as `guidance 3` of mean-flow."""
    weighting: str | None = None
    """Weighting of the noise levels as a function of the log-SNR: flow-matching (or cosine-velocity, the same),
    cosine-noise, edm, min-snr, sigmoid, likelihood or sd3. Default: the plain squared error of the prediction, weighted
    by the density of the times."""
    weighting_options: dict[str, float] = field(default_factory=dict)
    """Options of the weighting, such as `bias 2`."""
    time_density: str | None = None
    """Density of the training times t: uniform, logit-normal, mode, cosine-map, beta or power. Default:
    logit-normal; with --weighting uniform, where the density affects only how noisy the loss is."""
    time_options: dict[str, float] = field(default_factory=dict)
    """Options of the density, such as `mean 0.5 std 1`. `shift 3` moves it towards the noise, as large images
    need."""
    time_uniform_from: float = 1.0
    """Share of the run after which the training times are uniform, such as 0.8; 1: never. Logit-normal times speed
    up the start (see the public notes on LightningDiT, arXiv:2501.01423)."""
    direction_weight: float = 0.0
    """Weight of the loss on the direction (cosine) of the velocity."""
    contrastive_weight: float = 0.0
    """Weight of the contrastive loss (Delta-FM); 0.05 is usual."""
    condition_dropout: float = 0.1
    """Share of the samples whose condition is replaced by the learned null, for classifier-free guidance. With 0 the
    checkpoint draws without guidance, unless some images have no condition."""
    inpainting: Annotated[bool, Essential("model")] = False
    """Also learn to inpaint, with random masks. Automatic if the data have masks or --init-from can inpaint."""
    mask_shapes: dict[str, float] = field(default_factory=dict)
    """Shares of the mask shapes: rectangle, strokes, ellipse, half-plane, frame (outpainting), full (nothing is
    known: plain generation), none, and data (the image's own mask). Default: a mixture of all but none; if the data
    have masks, half of them are data."""

    def __post_init__(self) -> None:
        choices = self.choices() if changed(self) & _NAMED else None
        if self.coupling == "data-dependent" and not self.inpainting:
            raise UserError(
                "coupling 'data-dependent' starts from the known part of an image",
                "Add --inpainting; for another source use latentflow.flow.DataDependent from Python.",
            )
        if self.mask_shapes:
            from ..data.masks import OWN, check_shapes

            check_shapes(self.mask_shapes, more=[OWN])
        if self.direction_weight and self.prediction != "velocity":
            raise UserError(
                f"direction_weight with prediction '{self.prediction}'",
                "Only velocities have a direction to learn.",
            )
        if self.predicts_codes and (self.weighting or self.contrastive_weight):
            raise UserError(
                f"{'--weighting' if self.weighting else '--contrastive-weight'} with --prediction codes",
                "Leave it out: codes are learned by cross-entropy, not by squared errors.",
            )
        if not 0.0 <= self.contrastive_weight < 1.0:
            raise UserError(
                f"contrastive_weight {self.contrastive_weight}", "Use 0 to below 1; 0.05 is usual."
            )
        if not 0.0 <= self.time_uniform_from <= 1.0:
            raise UserError(
                f"time_uniform_from {self.time_uniform_from}", "Use 0 to 1, a share of the run; 1 is never."
            )
        if choices is not None and choices.objective.average:
            self._check_average(choices)
        if self.weighting_options and self.weighting is None:
            raise UserError("weighting_options are given without a weighting", "Name one with --weighting.")

    @property
    def predicts_codes(self) -> bool:
        """Return True if the network predicts logits of an autoencoder's codes, whose mean is that of the data."""
        return self.prediction == "codes"

    def _check_average(self, choices: Choices) -> None:
        """Refuse what average velocities cannot be combined with."""
        from ..flow import CondOT

        unfit = {
            f"--path {self.path}": choices.path != CondOT(),
            f"--prediction {self.prediction}": self.prediction != "velocity",
            f"--weighting {self.weighting}": choices.weighting is not None,
            "--direction-weight": self.direction_weight != 0.0,
            "--contrastive-weight": self.contrastive_weight != 0.0,
        }
        for flag, given in unfit.items():
            if given:
                raise UserError(
                    f"{flag} with --objective {self.objective}",
                    "Leave it out: average velocities are learned on the straight path, with a weight of their own.",
                )
        if choices.settings.guided and not self.condition_dropout:
            raise UserError(
                f"guidance {choices.settings.guidance:g} of --objective {self.objective} with --condition-dropout 0",
                "Leave --condition-dropout out: guidance needs what is learned without the condition.",
            )

    def shapes(self, has_masks: bool) -> dict[str, float]:
        """Return the share of each mask shape, for data with or without masks of their own."""
        from ..data.masks import DEFAULT_SHAPES, OWN

        return self.mask_shapes or {
            **DEFAULT_SHAPES,
            **({OWN: sum(DEFAULT_SHAPES.values())} if has_masks else {}),
        }

    def describe(self) -> dict[str, Any]:
        """Return the settings that must not change when a run is resumed.

        Settings that earlier versions did not have are left out where they change nothing, so that their runs resume.
        """
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in _LATER or value != _LATER[name]}

    def choices(self) -> Choices:
        """Return the entries of the tables that this config names."""
        from ..flow import COUPLINGS, OBJECTIVES, PATHS, PREDICTIONS, TIME_DENSITIES, WEIGHTINGS, make

        if not self.predicts_codes and self.prediction not in PREDICTIONS:
            raise unknown("prediction", self.prediction, [*PREDICTIONS, "codes"])
        weighting = None
        if self.weighting is not None:
            weighting = make(WEIGHTINGS, self.weighting, "weighting", **self.weighting_options)
        density = self.time_density or ("logit-normal" if weighting is None else "uniform")
        objective = lookup(OBJECTIVES, self.objective, "objective")
        # MeanFlow, table 1d; its t = 1 is noise
        usual = {"mean": 0.4} if objective.average and (self.time_density or weighting) is None else {}
        return Choices(
            path=make(PATHS, self.path, "path", **self.path_options),
            coupling=make(COUPLINGS, self.coupling, "coupling", **self.coupling_options),
            objective=objective,
            settings=make(
                {self.objective: objective.settings}, self.objective, "objective", **self.objective_options
            ),
            density=make(TIME_DENSITIES, density, "time density", **usual | self.time_options),
            weighting=weighting,
        )


class Choices(NamedTuple):
    """One entry of each table."""

    path: Path
    coupling: Coupling
    objective: Objective
    settings: Any  # the objective's own
    density: TimeDensity
    weighting: Weighting | None


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Token routing (TREAD, arXiv:2501.04765): cheaper training steps; validation and the result use all tokens.

    Raises:
        UserError: a share outside its bounds.
    """

    route_share: float = 0.0
    """Share of the tokens that skips the middle blocks in training (dit); 0.5 is usual. 0: none."""
    route_blocks: tuple[int, int] = (1, -1)
    """First block that they skip and first that they do not, as in a Python slice: 1 -1 skips all but the first and
    the last block."""
    route_until: float = 0.9
    """Share of the run after which tokens no longer skip blocks, so that training ends with the network as it will be
    used."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.route_share < 1.0:
            raise UserError(f"route_share {self.route_share}", "Use 0 to below 1; 0.5 is usual.")
        if not 0.0 <= self.route_until <= 1.0:
            raise UserError(f"route_until {self.route_until}", "Use a share of the run, 0 to 1.")


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """Feature alignment: a second loss on the tokens of an early block, used in training only.

    Raises:
        UserError: an unknown alignment, a weight that is not positive, an encoder that is missing, or settings of no
            use.
    """

    alignment: str | None = None
    """Pull the features of an early block (dit) towards better ones. self: those of the weight average, of a later
    block and of less noisy data (SRA, arXiv:2505.02831). encoder: those of a vision model (REPA, arXiv:2410.06940).
    Default: off."""
    alignment_weight: float | None = None
    """Weight of this loss. Default: 0.2 (self), 0.5 (encoder)."""
    alignment_block: int | None = None
    """Number of blocks before the aligned features. Default: three tenths of all (2 of 8, 8 of 28)."""
    alignment_encoder: str | None = None
    """With --alignment encoder: the vision model, which stays frozen: the hub id or folder of a model of transformers
    (DINOv2, CLIP, ...), or efficientnet-lite0 (extra `features`)."""

    def __post_init__(self) -> None:
        if self.alignment is not None:
            from ..training.losses.alignment import ALIGNMENTS

            lookup(ALIGNMENTS, self.alignment, "alignment")
        if (self.alignment == "encoder") != (self.alignment_encoder is not None):
            raise UserError(
                f"--alignment {self.alignment} with --alignment-encoder {self.alignment_encoder}",
                "Give both: --alignment encoder --alignment-encoder facebook/dinov2-small; or leave the encoder out.",
            )
        if self.alignment is None and (self.alignment_weight, self.alignment_block) != (None, None):
            raise UserError(
                "--alignment-weight or --alignment-block without --alignment", "Add --alignment self."
            )
        if self.alignment_weight is not None and not self.alignment_weight > 0:
            raise UserError(
                f"alignment_weight {self.alignment_weight}", "Use more than 0, or no --alignment."
            )


def changed(config: Any) -> set[str]:
    """Return the names of the settings that differ from their defaults."""
    plain = {
        setting.name: setting.default_factory() if callable(setting.default_factory) else setting.default
        for setting in dataclasses.fields(config)
    }
    return {name for name, default in plain.items() if getattr(config, name) != default}
