"""Words that a tokenizer of `train_tokenizer` knows; without transformers, for which `latentflow check` cannot wait."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..errors import nearest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_ALIKE = 0.75  # difflib's ratio from which a word may be a known one misspelt: "aple" and "apple" have 0.89


def known_words(tokenizer: Tokenizer) -> list[str]:
    """Return the words of the vocabulary, without its marks, characters and pieces for spelling."""
    return [word for word in tokenizer.get_vocab() if len(word) > 1 and not word.startswith(("[", "##"))]


def missing_words(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """Return the words of ``texts`` that the vocabulary lacks, each once, as the tokenizer reads them (lower case)."""
    vocabulary = tokenizer.get_vocab()
    found: dict[str, None] = {}
    for text in texts:
        pieces = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        found |= dict.fromkeys(word for word, _ in pieces if word not in vocabulary)
    return [word for word in found if not is_punctuation(word)]


def is_punctuation(word: str) -> bool:
    """Return whether every character of ``word`` is a punctuation mark."""
    return all(unicodedata.category(character).startswith("P") for character in word)


def with_guess(word: str, known: Iterable[str]) -> str:
    """Return the word in quotes, with the known word that it probably misspells, if there is one."""
    guess = nearest(word, known, cutoff=_ALIKE)
    return f"'{word}' (did you mean '{guess}'?)" if guess else f"'{word}'"
