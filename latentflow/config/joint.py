"""Settings of an autoencoder that learns together with the flow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import UserError
from ..utils.flags import flag_of
from .model import AlignmentConfig, AutoencoderConfig, FlowConfig, changed

#: Defaults of ``joint_log_snr`` and ``joint_weight``. The first of `unified` is the paper's.
_LOG_SNR = {"unified": 5.0, "lsgm": 9.0}
_WEIGHT = {"unified": 0.02, "lsgm": 0.02, "alignment": 1.5}


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """Training of the autoencoder together with the flow, in one run (docs/guide/train.md).

    Raises:
        UserError: a value out of bounds, or settings of no use.
    """

    joint: Literal["unified", "lsgm", "alignment"] | None = None
    """Train the autoencoder together with the network, not before it. unified: latents carry a fixed noise, and the
    flow's own loss measures and limits their information (Unified Latents, arXiv:2602.17270). lsgm: the same with a
    posterior that is learned (arXiv:2106.05931; needs --autoencoder-class kl). alignment: the encoder learns the
    features of --alignment encoder through the network (REPA-E, arXiv:2504.10483). The loop's batch, steps, rate and
    optimiser are then also the autoencoder's; --vae is where it starts. Default: the autoencoder is trained first."""
    joint_log_snr: float | None = None
    """unified and lsgm: log-SNR of the latents that the decoder learns from, where the flow's noise levels end, while
    their spread is one. The spread is learned: this is where a run begins, and what latents tell in the end is decided
    by --joint-weight. Default: 5 (unified: noise of 0.08), 9 (lsgm: 0.01)."""
    joint_weight: float | None = None
    """unified and lsgm: weight of the information in the latents, in nats for each pixel value: a higher one makes
    latents that are easier to generate and reconstruct worse. alignment: weight of the encoder's alignment loss.
    Default: 0.02; alignment: 1.5."""

    def __post_init__(self) -> None:
        if self.joint is None:
            if given := sorted(changed(self)):
                raise UserError(
                    f"{flag_of(given[0])} without --joint", "Add --joint unified, or leave it out."
                )
            return
        if self.joint_log_snr is not None and self.joint == "alignment":
            raise UserError(
                "--joint-log-snr with --joint alignment, whose latents have no noise",
                "Leave it out, or use --joint unified.",
            )
        if self.joint_log_snr is not None and not 0 < self.joint_log_snr <= 20:
            raise UserError(
                f"--joint-log-snr is {self.joint_log_snr}",
                "Give a number above 0, and at most 20; 5 is usual.",
            )
        if self.joint_weight is not None and not 0 < self.joint_weight < math.inf:
            raise UserError(
                f"--joint-weight is {self.joint_weight}",
                f"Give a number above 0, such as {_WEIGHT[self.joint]:g}.",
            )

    @property
    def log_snr(self) -> float:
        """Return the log-SNR at which the flow's noise levels end (unified and lsgm)."""
        return self.joint_log_snr or _LOG_SNR[str(self.joint)]

    @property
    def weight(self) -> float:
        """Return the weight of what shapes the latents."""
        return _WEIGHT[str(self.joint)] if self.joint_weight is None else self.joint_weight

    def refuse_unfit(
        self,
        others: Mapping[str, bool],
        flow: FlowConfig,
        alignment: AlignmentConfig,
        autoencoder: AutoencoderConfig | None,
    ) -> None:
        """Refuse what does not go with an autoencoder that changes in every step.

        Args:
            others: flag of another section -> whether it is given.
            autoencoder: settings of the one that is made; None: it is given.

        Raises:
            UserError: names the flag.
        """
        wrong = {
            **others,
            "--inpainting": flow.inpainting,
            "--mask-shapes": bool(flow.mask_shapes),
            f"--objective {flow.objective}": flow.objective != "flow-matching",
            f"--alignment {alignment.alignment}": alignment.alignment == "self",
        }
        for flag, given in wrong.items():
            if given:
                raise UserError(
                    f"{flag} with --joint, whose latents change in every step",
                    "Leave it out; or train the autoencoder first (latentflow autoencoder), and a generator with it.",
                )
        if self.joint != "alignment" and flow.coupling != "independent":
            raise UserError(
                f"--coupling {flow.coupling} with --joint {self.joint}, whose rate is of independent noise",
                "Leave it out.",
            )
        terms = ["weighting", "time_density", "time_options", "time_uniform_from"]
        terms += ["direction_weight", "contrastive_weight"]
        if self.joint == "lsgm" and (given_terms := [name for name in terms if name in changed(flow)]):
            raise UserError(
                f"{flag_of(given_terms[0])} with --joint lsgm, whose network learns by the likelihood itself",
                "Leave it out, or use --joint unified.",
            )
        if self.joint == "alignment" and alignment.alignment != "encoder":
            raise UserError(
                "--joint alignment without features to align to",
                "Add --alignment encoder --alignment-encoder facebook/dinov2-small.",
            )
        fit = {"unified": ("dc",), "lsgm": ("kl",)}.get(str(self.joint), ("dc", "kl"))
        if autoencoder is not None and autoencoder.autoencoder_class not in fit:
            raise UserError(
                f"--joint {self.joint} with --autoencoder-class {autoencoder.autoencoder_class}",
                f"Add --autoencoder-class {fit[0]}.",
            )
        if self.joint != "alignment":
            import torch

            path = flow.choices().path
            first, last = (float(path.log_snr(torch.tensor(t, dtype=torch.float64))) for t in (0.0, 1.0))
            if first > -math.inf or last <= self.log_snr:
                raise UserError(
                    f"--path {flow.path} with --joint {self.joint}: its log-SNR is {first:.1f} to {last:.1f}",
                    f"Leave it out: information is measured from noise alone up to a log-SNR of {self.log_snr:g}.",
                )
