"""Metrics of images, which are (B, 3, H, W) in [-1, 1]; values outside are clipped.

:mod:`latentflow.evaluation` measures a checkpoint with them.
"""

from __future__ import annotations

from .distributions import KernelDistance as KernelDistance
from .distributions import Manifold as Manifold
from .distributions import diversity as diversity
from .distributions import kernel_distance as kernel_distance
from .distributions import manifold as manifold
from .distributions import nearest_rows as nearest_rows
from .distributions import neighbour_labels as neighbour_labels
from .features import FEATURES as FEATURES
from .features import distances as distances
from .features import features as features
from .features import frechet_distance as frechet_distance
from .features import gaussian_frechet_distance as gaussian_frechet_distance
from .features import refuse_not_finite as refuse_not_finite
from .features import usual_space as usual_space
from .image import SSIM_SIDE as SSIM_SIDE
from .image import edge_agreement as edge_agreement
from .image import psnr as psnr
from .image import ssim as ssim
from .memorisation import Memorisation as Memorisation
from .memorisation import memorisation as memorisation
from .proportions import RealSplit as RealSplit
from .proportions import in_proportion as in_proportion
from .proportions import real_split as real_split
from .retrieval import Retrieval as Retrieval
from .retrieval import attribute_groups as attribute_groups
from .retrieval import attribute_retrieval as attribute_retrieval
from .retrieval import retrieve as retrieve
from .retrieval import retrieve_rows as retrieve_rows
from .retrieval import split_attributes as split_attributes
