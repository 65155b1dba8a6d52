"""Prior preservation: the checkpoint that a fine-tune starts from draws samples, which are trained on beside the data.

So it is reminded of what it could draw, without the data that it learnt that from (DreamBooth, arXiv:2208.12242,
section 3.2; generative replay, arXiv:1705.08690). The samples are drawn without guidance: they are of the distribution
that the network has learnt, and training on them leaves that where it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import Example, Framing, LatentTable, Source, to_pil
from ..data.examples import Kind
from ..errors import UserError
from ..memory import memory_phase
from ..pipeline import LatentFlowPipeline
from .base import class_names, open_base
from .batches import Batch
from .conditions import conditions_of
from .fine_tuning import FineTuningConfig
from .latent_data import LatentData, Sized
from .order import Draw, seeded
from .processes import process_state
from .start import Networks, is_small_tokenizer

log = logging.getLogger(__name__)

_STEPS = 20  # of the solver
_TOGETHER = 50  # samples in a file, and drawn at once,
_PIXELS = 2**20  # unless they have more pixels in all
_STREAM = 6  # of random numbers; see `seeded`


@dataclass(frozen=True)
class PriorExample(Example):
    """A sample of the checkpoint; only its latents are kept, and its pixels where masks need them."""

    pixels: Tensor | None = field(kw_only=True, default=None, compare=False, repr=False)

    def open(self) -> Image.Image:
        if self.pixels is None:
            raise UserError(f"{self.name} was drawn as latents", "Open a picture of the data.")
        return to_pil(self.pixels.float() / 127.5 - 1)

    def content_key(self) -> str:
        return hashlib.sha256(f"prior {self.name} {self.text} {self.label}".encode()).hexdigest()


class MixedData:
    """The user's pictures with the checkpoint's samples behind them; a step has ``share`` of these.

    The two never pass through the network together: they may differ in size, and in the length of their captions.

    Attributes:
        groups: (N,) int64; a batch must be of one.
        second: how many of the samples, the last ones, are the checkpoint's.
        second_share: their share in each step.
    """

    def __init__(self, own: LatentData, prior: LatentData, share: float) -> None:
        self._own, self._prior = own, prior
        self.second, self.second_share = len(prior), share
        groups = torch.zeros(len(own), dtype=torch.int64) if own.groups is None else own.groups
        self.groups = torch.cat([groups, groups.max() + 1 + torch.zeros(len(prior), dtype=torch.int64)])

    def __len__(self) -> int:
        return len(self._own) + len(self._prior)

    def __getitems__(self, draws: list[Draw]) -> Batch:
        first = len(self._own)
        if draws[0].index < first:
            return self._own.__getitems__(draws)
        return self._prior.__getitems__([Draw(draw.index - first, draw.number) for draw in draws])

    def name(self, index: int) -> str:
        first = len(self._own)
        return self._own.name(index) if index < first else self._prior.name(index - first)


def asked_of(
    checkpoint: str, config: FineTuningConfig, pictures: int, seed: int, vae: str | None = None
) -> tuple[list[str], str]:
    """What the checkpoint is to draw: a caption or class for each sample ("" for one that takes neither); and a line.

    Classes and captions of a file come in turn, each as often as the others. Without a file, captions are a word or
    two of the vocabulary: a checkpoint does not hold the captions that it was trained on.

    Args:
        pictures: of the data.
        vae: another autoencoder than the checkpoint's, to which its samples would mean nothing.

    Raises:
        UserError: the file cannot be read or holds no caption, is given for a checkpoint that takes none, or is
            needed: a pretrained text encoder's vocabulary does not say which words were trained on.
    """
    pipe = open_base(checkpoint)
    count = config.samples(pictures, len(class_names(pipe)))
    if config.prior_prompts and not pipe.takes_text:
        raise UserError(
            f"--prior-prompts, but {checkpoint} takes no captions", "Leave it out: all classes are drawn."
        )
    no_captions = pipe.takes_text and not config.prior_prompts and not is_small_tokenizer(pipe.tokenizer)
    unfit = None
    if vae:
        unfit = "--vae names another autoencoder", "Leave --vae out."
    elif pipe.config.get("folded_guidance", 1.0) != 1.0:
        unfit = "it has learned guidance along, and what it draws would be guided again", "Leave them out."
    elif no_captions:
        fix = "Give captions that it was trained on, one a line: --prior-prompts FILE."
        unfit = "it does not say of which captions", fix
    if config.prior_samples and unfit:
        raise UserError(f"{checkpoint} cannot draw --prior-samples: {unfit[0]}", unfit[1])
    if not count or unfit:
        told = "--prior-samples 200" + (" --prior-prompts FILE" if no_captions else "") + " reminds it"
        if unfit and not no_captions:
            told = unfit[0]
        return [], f"prior: none; what your pictures do not show may be forgotten ({told})"
    if config.prior_prompts:
        asked, told = (
            _in_turn(_read_prompts(config.prior_prompts), count),
            f"the captions in {config.prior_prompts}",
        )
    elif pipe.takes_text:
        asked = _words(pipe.tokenizer, count, seed)
        told = "words that it knows (--prior-prompts FILE with captions that it was trained on keeps more)"
    else:
        names = list(class_names(pipe))
        asked, told = _in_turn(names or [""], count), f"its {len(names)} classes" if names else "no condition"
    share = f"{config.prior_share:.0%} of each step" + (
        "" if config.prior_samples else "; --prior-samples 0: none"
    )
    return asked, f"prior: {count} samples of {checkpoint} itself, of {told}, are {share}"


def prior_data(
    checkpoint: str, asked: list[str], networks: Networks, folder: Path, seed: int, pixels: bool, told: bool
) -> LatentData:
    """The samples as training data, drawn into ``folder`` where they are not there yet.

    Args:
        checkpoint: the pipeline that draws.
        asked: a caption, a class or "" for each sample.
        networks: what is trained, whose tokenizer and classes are used.
        folder: where the samples are kept, as latents; what a killed run has drawn is not drawn again.
        seed: with the sample's number decides its noise.
        pixels: whether the pictures are needed as well, to be masked.
        told: whether the network is told sizes.

    Raises:
        UserError: ``folder`` holds other samples.
    """
    state = process_state()
    with memory_phase("draw prior samples"), state.main_process_first():
        tensors, kind, side = _drawn(checkpoint, asked, folder, seed, pixels, state.device)
    pictures = tensors.get("pixels")
    examples = tuple(
        PriorExample(
            f"prior sample {number}",
            text=name if kind == "text" else None,
            label=name if kind == "class" else None,
            pixels=None if pictures is None else pictures[number],
        )
        for number, name in enumerate(asked)
    )
    source = Source(f"samples of {checkpoint}", examples, kind, networks.classes if kind == "class" else ())
    natural = np.full((len(asked), 2), side, dtype=np.int32)
    framing = Framing(source, ((side, side),), np.zeros(len(asked), dtype=np.int32), natural)
    sized = Sized(
        LatentTable(tensors["latents"][:, None], None), {} if pictures is None else {"pixels": pictures}
    )
    return LatentData(
        framing, [sized], conditions_of(source, networks, seed), flips=False, told=told, seed=seed
    )


def _in_turn(names: list[str], count: int) -> list[str]:
    """Each as often as the others; of more than ``count`` some that are spread over all of them."""
    spread = max(len(names), count)
    return [names[number * spread // count % len(names)] for number in range(count)]


def _read_prompts(file: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(file).expanduser().read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prior-prompts {file} cannot be read: {error}", "Give a text file, one caption a line."
        ) from None
    if not any(lines):
        raise UserError(f"--prior-prompts {file} holds no caption", "Write one a line.")
    return [line for line in lines if line]


def _words(tokenizer: Any, count: int, seed: int) -> list[str]:
    """One word, then two, in turn; all are of the tokenizer's vocabulary."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = [word for word, _ in vocabulary if word.isalpha() and len(word) > 1] or [vocabulary[-1][0]]
    places = torch.randint(len(words), (count, 2), generator=seeded(seed, _STREAM, -1)).tolist()
    return [" ".join(words[place] for place in row[: 1 + number % 2]) for number, row in enumerate(places)]


def _drawn(
    checkpoint: str, asked: list[str], folder: Path, seed: int, pixels: bool, device: torch.device
) -> tuple[dict[str, Tensor], Kind, int]:
    """``latents`` (N, C, h, w) and perhaps ``pixels`` (N, 3, H, W) uint8; what they are conditioned on; their side."""
    pipe = open_base(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    kind: Kind = "text" if pipe.takes_text else "class" if pipe.takes_classes else "unconditional"
    native = pipe.transformer.config.sample_size
    if native is None:
        raise UserError(f"{checkpoint} does not say of which size its samples are", "Use --prior-samples 0.")
    side = pipe.vae_scale_factor * int(native if isinstance(native, int) else max(native))
    made_of = {
        "checkpoint": _digest(pipe.transformer), "asked": asked, "seed": seed, "side": side, "pixels": pixels,
        "steps": _STEPS,
    }  # fmt: skip
    _claim(folder, made_of)
    parts = []
    together = min(_TOGETHER, max(1, _PIXELS // side**2))
    for start in tqdm(range(0, len(asked), together), desc="drawing prior samples", disable=None):
        file = folder / f"{start:06d}.safetensors"
        if not file.is_file():
            names = asked[start : start + together]
            _write(file, _draw(pipe.to(device), kind, names, start, seed, side, pixels))
        parts.append(load_file(file))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, kind, side


def _draw(
    pipe: LatentFlowPipeline, kind: Kind, names: list[str], start: int, seed: int, side: int, pixels: bool
) -> dict[str, Tensor]:
    generators = [
        torch.Generator().manual_seed(seeded(seed, _STREAM, start + row).initial_seed())
        for row in range(len(names))
    ]
    asked: dict[str, Any] = {"num_images_per_prompt": len(names)}
    if kind == "text":
        asked = {"prompt": names}
    elif kind == "class":
        asked = {"class_labels": names if pipe.labels else [int(name) for name in names]}
    latents = pipe(
        **asked, height=side, width=side, guidance_scale=1.0, num_inference_steps=_STEPS, generator=generators,
        output_type="latent",
    ).images  # fmt: skip
    drawn = {"latents": latents.float().cpu()}
    if pixels:
        images = pipe.decode_latents(latents).cpu()
        drawn["pixels"] = ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return drawn


def _claim(folder: Path, made_of: dict[str, Any]) -> None:
    """Say what the samples in ``folder`` are drawn from, or check that it is the same."""
    file = folder / "prior.json"
    if not file.is_file():
        if process_state().is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            half = file.with_suffix(".tmp")
            half.write_text(json.dumps(made_of, ensure_ascii=False), encoding="utf-8")
            half.replace(file)
        return
    held = json.loads(file.read_text(encoding="utf-8"))
    differ = [name for name in made_of if made_of[name] != held.get(name)]
    if differ:
        raise UserError(
            f"{folder} holds samples that were drawn otherwise ({', '.join(differ)})",
            "Use another output folder, or the same checkpoint and --prior flags as before.",
        )


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    half = file.with_suffix(".tmp")
    save_file({name: one.contiguous() for name, one in tensors.items()}, half)
    half.replace(file)


def _digest(module: nn.Module) -> str:
    """Hash of a network's weights."""
    digest = hashlib.sha256()
    for name, one in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(one.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
