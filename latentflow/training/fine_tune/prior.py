"""Prior preservation: samples of the checkpoint that a fine-tune starts from are trained on beside the data.

So the network keeps what it knew, without the data that it learnt that from (DreamBooth, arXiv:2208.12242, section
3.2; generative replay, arXiv:1705.08690). They are sampled without guidance, from the distribution that the network has
learnt, and training on them leaves that distribution where it is.
"""

from __future__ import annotations

from typing import Any

import torch

from ...config import FineTuningConfig
from ...errors import UserError
from ...utils.files import read_prompts
from ..loop.data_order import SampleUse, Stream, seeded
from ..loop.loader import Batch
from ..losses.latent_data import LatentData
from .base import open_base


class MixedData:
    """The user's images with the checkpoint's samples behind them; a step has ``share`` of these.

    The two never pass through the network together: they may differ in size, and in the length of their captions.

    Attributes:
        groups: (N,) int64; a batch must be of one.
        mixin_count: number of the checkpoint's samples, which come last.
        mixin_share: their share of every step.
    """

    def __init__(self, own: LatentData, prior: LatentData, share: float) -> None:
        self._own, self._prior = own, prior
        self.mixin_count, self.mixin_share = len(prior), share
        groups = torch.zeros(len(own), dtype=torch.int64) if own.groups is None else own.groups
        self.groups = torch.cat([groups, groups.max() + 1 + torch.zeros(len(prior), dtype=torch.int64)])

    def __len__(self) -> int:
        return len(self._own) + len(self._prior)

    def __getitems__(self, draws: list[SampleUse]) -> Batch:
        first = len(self._own)
        if draws[0].index < first:
            return self._own.__getitems__(draws)
        return self._prior.__getitems__([SampleUse(draw.index - first, draw.sample_id) for draw in draws])

    def name(self, index: int) -> str:
        first = len(self._own)
        return self._own.name(index) if index < first else self._prior.name(index - first)


def prior_prompts(
    checkpoint: str, config: FineTuningConfig, images: int, seed: int, vae: str | None = None
) -> tuple[list[str], str]:
    """Choose the prompts of the prior samples, a caption or class each ("" if the checkpoint takes neither).

    Classes and captions of a file come in turn, each as often as the others. Without a file, captions are a word or
    two of the vocabulary: a checkpoint does not hold the captions that it was trained on.

    Args:
        images: number of images of the data.
        vae: another autoencoder than the checkpoint's, to which its samples would mean nothing.

    Returns:
        The prompts (none: no prior samples), and the plan's line about them.

    Raises:
        UserError: the file cannot be read or holds no caption, is given for a checkpoint that takes none, or is
            needed: a pretrained text encoder's vocabulary does not say which words were trained on.
    """
    model = open_base(checkpoint)
    names = model.classes
    count = config.samples(images, len(names))
    if config.prior_prompts and not model.takes_text:
        raise UserError(
            f"--prior-prompts, but {checkpoint} takes no captions", "Leave it out: it draws all its classes."
        )
    no_captions = model.takes_text and not config.prior_prompts and not model.trains_text
    unfit = None
    if vae:
        unfit = "--vae names another autoencoder", "Leave --vae out."
    elif model.few_steps.folded_guidance != 1.0:
        unfit = (
            "guidance was distilled into it, and training on its samples would guide them again",
            "Leave them out.",
        )
    elif no_captions:
        fix = "Give captions that it was trained on, one per line: --prior-prompts FILE."
        unfit = "its captions are not known", fix
    if config.prior_samples and unfit:
        raise UserError(f"--prior-samples cannot be generated with {checkpoint}: {unfit[0]}", unfit[1])
    if not count or unfit:
        hint = "--prior-samples 200" + (" --prior-prompts FILE" if no_captions else "") + " prevents it"
        if unfit and not no_captions:
            hint = unfit[0]
        return [], f"prior samples: none, so the checkpoint may forget what your images do not show ({hint})"
    if config.prior_prompts:
        prompts = in_turn(read_prompts(config.prior_prompts, "--prior-prompts"), count)
        origin = f"for the captions in {config.prior_prompts}"
    elif model.takes_text:
        prompts = _words(model.pipeline.tokenizer, count, seed)
        origin = "for words of its vocabulary"
    else:
        prompts = in_turn([*names] or [""], count)
        origin = f"for its {len(names)} classes" if names else "without a condition"
    line = (
        f"prior samples: so that the checkpoint does not forget what it knew, {config.prior_share:.0%} of each step "
        f"are images that it generates itself, {count} in all, {origin}"
    )
    if not config.prior_samples:
        line += " (--prior-samples 0 leaves them out)"
    if model.takes_text and not config.prior_prompts:
        line += ". With captions that it was trained on, --prior-prompts FILE, it forgets less"
    return prompts, line


def in_turn(names: list[str], count: int) -> list[str]:
    """Return ``count`` of the names, each as often as the others; of more names some that are spread over all."""
    spread = max(len(names), count)
    return [names[number * spread // count % len(names)] for number in range(count)]


def _words(tokenizer: Any, count: int, seed: int) -> list[str]:
    """Return one word, then two, in turn; all are of the tokenizer's vocabulary."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = [word for word, _ in vocabulary if word.isalpha() and len(word) > 1] or [vocabulary[-1][0]]
    random = seeded(seed, Stream.TEACHER_SAMPLES, -1)
    places = torch.randint(len(words), (count, 2), generator=random).tolist()
    return [" ".join(words[place] for place in row[: 1 + number % 2]) for number, row in enumerate(places)]
