"""What `latentflow evaluate` reports. Images are (B, 3, H, W) in [-1, 1]; values outside are clipped."""

from __future__ import annotations

from .features import FEATURES as FEATURES
from .features import distances as distances
from .features import features as features
from .frechet import frechet_distance as frechet_distance
from .frechet import gaussian_frechet_distance as gaussian_frechet_distance
from .image import psnr as psnr
from .image import ssim as ssim
from .memorisation import Memorisation as Memorisation
from .memorisation import memorisation as memorisation
from .retrieval import attribute_groups as attribute_groups
from .retrieval import attribute_retrieval as attribute_retrieval
from .retrieval import caption_retrieval as caption_retrieval
