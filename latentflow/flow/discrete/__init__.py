"""Discrete flow matching: paths of tokens, jumps along them, objectives, guidance, a bound of the likelihood.

The sibling of ``latentflow.flow`` for data that are tokens, such as the codes of an image tokenizer. Conventions: t = 0
is the source, t = 1 is data; tokens are int64, (B, ...), of a vocabulary 0 to V - 1, and the mask, where there is one,
is the token V; a *posterior* is a callable (x, t) -> logits (B, ..., V) of the data tokens given x_t.
"""

from __future__ import annotations

from .categorical import Logits as Logits
from .codebook import Codebook as Codebook
from .guidance import guide as guide
from .guidance import guide_batched as guide_batched
from .kappas import KAPPAS as KAPPAS
from .kappas import CosineKappa as CosineKappa
from .kappas import CubicKappa as CubicKappa
from .kappas import Kappa as Kappa
from .kappas import LinearKappa as LinearKappa
from .kappas import PolynomialKappa as PolynomialKappa
from .likelihood import likelihood_bound as likelihood_bound
from .metric import MetricPath as MetricPath
from .objectives import OBJECTIVES as OBJECTIVES
from .objectives import WEIGHTINGS as WEIGHTINGS
from .objectives import Divergence as Divergence
from .objectives import cross_entropy as cross_entropy
from .objectives import generalised_kl as generalised_kl
from .objectives import generalised_kl_parts as generalised_kl_parts
from .orders import confidence as confidence
from .orders import halton as halton
from .orders import random_order as random_order
from .paths import DiscretePath as DiscretePath
from .paths import DiscreteSample as DiscreteSample
from .paths import Jump as Jump
from .paths import MixturePath as MixturePath
from .samplers import CORRECTORS as CORRECTORS
from .samplers import Corrector as Corrector
from .samplers import Sampler as Sampler
from .simulate import Posterior as Posterior
from .simulate import simulate as simulate
from .sources import SOURCES as SOURCES
from .sources import MaskSource as MaskSource
from .sources import Source as Source
from .sources import UniformSource as UniformSource
from .table import PATHS as PATHS
from .table import SAMPLERS as SAMPLERS
