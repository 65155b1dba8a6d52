"""Settings of discrete flow matching: generators that learn the tokens of a codebook."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError, lookup, make
from ..utils.flags import flag_of
from .model import AlignmentConfig, FlowConfig, NetworkConfig, RoutingConfig, changed

if TYPE_CHECKING:
    from ..flow.discrete import MixturePath
    from ..flow.discrete.objectives import Weighting


@dataclass(frozen=True, kw_only=True)
class TokenConfig:
    """Learning of the tokens of a codebook by discrete flow matching (docs/guide/discrete.md).

    Raises:
        UserError: an unknown name or option (the nearest is named), or settings without ``tokens``.
    """

    tokens: bool = False
    """Learn the tokens of an autoencoder with a codebook (a VQModel named by --vae, or one trained first by
    --autoencoder-class vq or fsq) in place of latents. Such a model inpaints without being trained to."""
    token_source: Literal["mask", "uniform"] = "mask"
    """State of every token at first: mask (it is not known yet), or uniform (a random one)."""
    kappa: str = "linear"
    """Schedule of the share of tokens that are known at time t: linear, polynomial, cosine or cubic."""
    kappa_options: dict[str, float] = field(default_factory=dict)
    """Options of the schedule, such as `degree 3` of polynomial."""
    token_objective: str = "cross-entropy"
    """Objective of the logits: cross-entropy, or generalised-kl (the bound of the likelihood)."""
    token_weighting: str | None = None
    """Weighting of the times: constant, likelihood, or capped (likelihood, but at most 5). Default: constant with
    cross-entropy, likelihood with generalised-kl."""

    tied_logits: bool = True
    """Logits are products with the embeddings of the tokens (--no-tied-logits: they have a layer of their own)."""

    def __post_init__(self) -> None:
        if not self.tokens:
            if given := sorted(changed(self)):
                raise UserError(f"{flag_of(given[0])} without --tokens", "Add --tokens, or leave it out.")
            return
        self.path(2)
        from ..flow.discrete import OBJECTIVES

        lookup(OBJECTIVES, self.token_objective, "token objective")
        self.weighting()

    def path(self, vocabulary: int) -> MixturePath:
        """Return the path of tokens 0 to ``vocabulary`` - 1."""
        from ..flow.discrete.table import mixture_path

        return mixture_path(vocabulary, **self.plain())

    def plain(self) -> dict[str, Any]:
        """Return the path's settings as a pipeline's config has them; see `mixture_path`."""
        return {"source": self.token_source, "kappa": self.kappa, "kappa_options": dict(self.kappa_options)}

    def weighting(self) -> Weighting | None:
        """Return the weighting; None: the objective's own."""
        from ..flow.discrete import WEIGHTINGS

        name = self.token_weighting
        return None if name is None else make(WEIGHTINGS, name, "token weighting")

    def refuse_unfit(
        self,
        flow: FlowConfig,
        network: NetworkConfig,
        others: dict[str, bool],
        sections: tuple[RoutingConfig | AlignmentConfig, ...],
    ) -> None:
        """Refuse settings of continuous flows, which would do nothing.

        Args:
            others: further flags that do not go with tokens -> whether they are given.
            sections: settings that must be at their defaults.

        Raises:
            UserError: names the flag.
        """
        if flow.inpainting or flow.mask_shapes:
            raise UserError(
                f"--{'inpainting' if flow.inpainting else 'mask-shapes'} with --tokens",
                "Leave it out: tokens that are known are kept, so every model of tokens fills holes.",
            )
        given = {flag_of(name) for name in changed(flow) - {"condition_dropout"}}
        given |= {flag_of(name) for section in sections for name in changed(section)}
        given |= {f"--{name}" for name, is_given in others.items() if is_given}
        given |= {"--network unet"} if network.network != "dit" else set()
        given |= {"--patch-size"} if network.patch_size not in (None, 1) else set()
        if given:
            raise UserError(
                f"{min(given)} with --tokens: it is of continuous flows",
                "Leave it out. Tokens have --token-source, --kappa, --token-objective and --token-weighting.",
            )
