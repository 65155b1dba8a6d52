"""The seam of inpainting: change what was drawn in a hole, and nothing outside, so that no edge shows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Rounds of smoothing at each resolution.
_ROUNDS = 4


def match_border(drawn: Tensor, image: Tensor, hole: Tensor, depth: float) -> Tensor:
    """Return ``drawn`` with the colours in its hole shifted to meet those of the image around the hole.

    At the kept pixels that touch the hole the missing shift is known: image - drawn. Its median, a difference in light
    or colour, is added in the whole hole. The remainder, often an object that is cut by the border, continues into the
    hole as a smooth membrane that fades with the distance from the border, so that the middle keeps what was drawn:

        drawn + median + exp(-distance / depth) membrane(image - drawn - median)

    (The membrane alone is "Poisson Image Editing", Perez et al. 2003.)

    Args:
        drawn, image: (1, C, H, W) in [0, 1].
        hole: (1, 1, H, W), True where anything of ``drawn`` will be seen.
        depth: in pixels, above 0.

    Returns:
        (1, C, H, W) in [0, 1]; outside the hole, and where no kept pixel touches it, ``drawn`` as it is.
    """
    from scipy.ndimage import distance_transform_edt  # slow to import

    rows, columns = (hole[0, 0].any(side).nonzero()[:, 0].tolist() for side in (1, 0))
    if not rows:
        return drawn
    vertical, horizontal = (slice(max(0, line[0] - 1), line[-1] + 2) for line in (rows, columns))
    around = (slice(None), slice(None), vertical, horizontal)
    inside = hole[around].to(drawn)
    border = F.max_pool2d(inside, 3, stride=1, padding=1) - inside
    if not border.any():
        return drawn
    missing = image[around] - drawn[around]
    median = missing[..., border[0, 0] > 0].median(dim=-1).values[..., None, None]
    remainder = _membrane((missing - median) * border, border)
    distance = torch.from_numpy(distance_transform_edt(inside[0, 0].numpy())).to(drawn)
    fading = torch.exp((1.0 - distance) / depth)  # the pixels that touch the border are 1 away
    shifted = (drawn[around] + median + fading * remainder).clamp(0.0, 1.0)
    result = drawn.clone()
    result[around] = torch.where(inside > 0, shifted, drawn[around])
    return result


def _membrane(values: Tensor, known: Tensor) -> Tensor:
    """Return values (1, C, H, W) continued smoothly from where ``known`` (1, 1, H, W) is 1; elsewhere they are 0.

    Near a solution of Laplace's equation: a few rounds of averaging over neighbours, from the membrane at half the
    resolution. Nothing flows over the edges; constants are kept.
    """
    height, width = values.shape[-2:]
    if max(height, width) == 1 or known.all():
        return values
    share, mean = (F.avg_pool2d(part, 2, ceil_mode=True, count_include_pad=False) for part in (known, values))
    coarse = _membrane(mean / share.clamp_min(1e-6), (share > 0).to(known))
    result = F.interpolate(coarse, scale_factor=2, mode="bilinear")[..., :height, :width]
    for _ in range(_ROUNDS):
        result = torch.where(known > 0, values, result)
        wide = F.pad(result, (1, 1, 1, 1), mode="replicate")
        four = wide[..., :-2, 1:-1] + wide[..., 2:, 1:-1] + wide[..., 1:-1, :-2] + wide[..., 1:-1, 2:]
        result = 0.2 * (result + four)
    return result
