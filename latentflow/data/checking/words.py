"""What the captions of a set say: how long they are, which words they use, which are used more than once."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..examples import Example

_WORD = re.compile(r"\w+(?:['’-]\w+)*")


@dataclass(frozen=True)
class CaptionFacts:
    """Of all captions of all pictures.

    Attributes:
        missing: names of pictures without one.
        different: number of different captions.
        repeated: captions of several pictures, the most frequent first, with the number of pictures.
        shortest, median, longest: in words.
        vocabulary: number of different words, whatever their case.
        once: how many of them occur only once, and so can hardly be learnt.
        common: the most frequent words, with their counts.
    """

    missing: tuple[str, ...] = ()
    different: int = 0
    repeated: Mapping[str, int] = dataclasses.field(default_factory=dict)
    shortest: int = 0
    median: float = 0
    longest: int = 0
    vocabulary: int = 0
    once: int = 0
    common: Mapping[str, int] = dataclasses.field(default_factory=dict)


def caption_facts(examples: Sequence[Example], most: int = 20) -> CaptionFacts:
    """The facts, with ``most`` repeated captions and common words."""
    texts = Counter(text for example in examples for text in set(example.captions) if text)
    lengths = [len(_words(text)) for text in texts]
    words = Counter(word for text, times in texts.items() for word in _words(text) * times)
    return CaptionFacts(
        missing=tuple(example.name for example in examples if not example.text),
        different=len(texts),
        repeated=_first(texts, most, at_least=2),
        shortest=min(lengths, default=0),
        median=statistics.median(lengths) if lengths else 0,
        longest=max(lengths, default=0),
        vocabulary=len(words),
        once=sum(times == 1 for times in words.values()),
        common=_first(words, most),
    )


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _first(counts: Counter[str], most: int, at_least: int = 1) -> dict[str, int]:
    ordered: Iterable[tuple[str, int]] = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return {name: times for name, times in list(ordered)[:most] if times >= at_least}
