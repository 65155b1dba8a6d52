"""Prompts that are longer than a pipeline's text encoders read: the words that an encoder does not see."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import few, shown

if TYPE_CHECKING:
    from .pretrained import PretrainedModel

log = logging.getLogger(__name__)
#: name of a text encoder that is not known
ANY = "the text encoder"


class Tokenized(NamedTuple):
    """Text that a tokenizer was given.

    Attributes:
        part: name of the tokenizer among the pipeline's components.
        text: with any template around the prompt.
        limit: number of tokens that are kept, special ones included; None: all.
        special: the tokenizer adds special tokens.
    """

    part: str
    text: str
    limit: int | None
    special: bool


@contextmanager
def watched_tokenizers(pipeline: Any) -> Iterator[list[Tokenized]]:
    """Yield a list to which the pipeline's tokenizers add what they are given meanwhile."""
    seen: list[Tokenized] = []
    with ExitStack() as stack:
        for name, tokenizer in _tokenizers(pipeline).items():
            stack.enter_context(_watched(name, tokenizer, seen))
        yield seen


def report_lost_words(
    model: PretrainedModel, prompts: Sequence[str], seen: Sequence[Tokenized], limits: Mapping[str, int]
) -> None:
    """Log one warning that quotes the words that encoders do not see; the same warning only once for a model.

    Args:
        model: its ``reported`` keeps a hash of each warning.
        seen: see `watched_tokenizers`.
        limits: name of a tokenizer -> number of tokens of a text that the pipeline itself keeps.
    """
    pipeline = model.pipeline
    lost = lost_words(pipeline, prompts, seen, limits)
    if lost:
        unseen = [f"{_encoder(pipeline, part)} does not see {shown(words)}" for part, words in lost]
        blind = {_encoder(pipeline, part) for part, _ in lost}
        whole = sorted({_encoder(pipeline, entry.part) for entry in seen} - blind - {ANY})
        rest = [f"{few(whole)} sees all of it"] if whole else []
        line = f"the prompt is too long: {'; '.join([*unseen, *rest])}"
        if hash(line) not in model.reported:
            model.reported.add(hash(line))
            log.warning("%s", line)


def lost_words(
    pipeline: Any, prompts: Sequence[str], seen: Sequence[Tokenized], limits: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Return (name of the tokenizer, end of a prompt that is cut off) pairs; see `report_lost_words`."""
    tokenizers = _tokenizers(pipeline)
    lost: dict[tuple[str, str], None] = {}  # in their order
    for entry in dict.fromkeys(seen):
        of_prompt = any(text in entry.text or entry.text in text for text in prompts)  # no template alone
        kept = limits.get(entry.part) if of_prompt else None
        if entry.limit is None and kept is None:
            continue
        if words := _lost_words(tokenizers[entry.part], prompts, entry, kept):
            lost[entry.part, words] = None
    return [*lost]


def _tokenizers(pipeline: Any) -> dict[str, Any]:
    """Return the tokenizers of a pipeline by the names of their components; a processor has one inside."""
    from transformers import PreTrainedTokenizerBase

    parts = {
        name: part if isinstance(part, PreTrainedTokenizerBase) else getattr(part, "tokenizer", None)
        for name, part in pipeline.components.items()
    }
    return {name: part for name, part in parts.items() if isinstance(part, PreTrainedTokenizerBase)}


@contextmanager
def _watched(name: str, tokenizer: Any, seen: list[Tokenized]) -> Iterator[None]:
    """Let a tokenizer be of a class of its own meanwhile, since Python looks up ``__call__`` in the class."""
    kind = type(tokenizer)

    def call(self: Any, text: Any = None, *args: Any, **options: Any) -> Any:
        limit = options.get("max_length") or self.model_max_length
        limit = int(limit) if options.get("truncation") else None
        texts = [text] if isinstance(text, str) else text or []
        special = bool(options.get("add_special_tokens", True))
        seen.extend(Tokenized(name, each, limit, special) for each in texts if isinstance(each, str))
        return kind.__call__(self, text, *args, **options)

    tokenizer.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    try:
        yield
    finally:
        tokenizer.__class__ = kind


def _lost_words(tokenizer: Any, prompts: Sequence[str], entry: Tokenized, kept: int | None) -> str:
    """Return the end of a prompt that is cut off; "" where nothing is, or only a template's end.

    Args:
        kept: number of tokens that are kept after the tokenizer, which itself keeps the special ones at the end.
    """
    encoded = tokenizer(
        entry.text, add_special_tokens=entry.special, return_special_tokens_mask=True, verbose=False
    )
    added = encoded["special_tokens_mask"]
    added = [1] * (len(encoded["input_ids"]) - len(added)) + added  # ChatGLM's lacks those at the beginning
    places = [place for place, special in enumerate(added) if not special]
    content = [] if kept is None else [place for place in places if place >= kept]
    if entry.limit is not None and len(added) > entry.limit:
        content = max(content, places[max(entry.limit - sum(added), 0) :], key=len)
    if not content:
        return ""
    if not tokenizer.is_fast:  # which does not say where in the text a token is
        return str(tokenizer.decode([encoded["input_ids"][place] for place in content])).strip()
    text = entry.text.lower()  # as some pipelines clean prompts
    prompt = max((p.strip() for p in prompts if p.strip().lower() in text), key=len, default=entry.text)
    begin = max(text.rfind(prompt.lower()), 0)
    span = encoded.token_to_chars(content[0])
    return entry.text[max(begin, span.start if span else begin) : begin + len(prompt)].strip()


def _encoder(pipeline: Any, tokenizer: str) -> str:
    """Return the name and class of the text encoder that reads what a tokenizer makes; ANY where no name says which."""
    name = tokenizer.replace("tokenizer", "text_encoder").replace("processor", "text_encoder")
    encoder = pipeline.components.get(name)
    return ANY if encoder is None else f"{name} ({type(encoder).__name__})"
