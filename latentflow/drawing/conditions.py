"""What each picture shows: prompts or classes as a checkpoint takes them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from ..errors import UserError

#: What one picture shows, as keywords of a pipeline's call.
Condition = dict[str, Any]


def conditions(
    pipe: Any,
    prompts: Sequence[str] = (),
    classes: Sequence[str] = (),
    negative: str | None = None,
    *,
    optional: bool = False,
) -> list[Condition]:
    """One row for each prompt or class.

    Args:
        classes: names, or numbers written out.
        negative: what to keep away from, the same for every prompt.
        optional: where nothing is given, a checkpoint of captions takes the empty one.

    Raises:
        UserError: the checkpoint does not take these; what it takes is said in flags.
    """
    if prompts and classes:
        raise UserError("a prompt and --class are both given", "Give one of them.")
    if prompts and not pipe.takes_text:
        raise UserError(f"this checkpoint takes no prompt such as '{prompts[0]}'", _instead(pipe))
    if classes and not pipe.takes_classes:
        raise UserError("this checkpoint takes no --class", _instead(pipe))
    if optional and pipe.takes_text and not prompts and not classes:
        prompts = ("",)
    if not prompts and not classes and (pipe.takes_text or pipe.takes_classes):
        raise UserError("nothing says what to draw", _instead(pipe))
    if prompts:
        extra: Condition = {} if negative is None else {"negative_prompt": negative}
        return [{"prompt": prompt} | extra for prompt in prompts]
    ids = pipe.class_ids([_number_or_name(pipe, name) for name in classes]) if classes else []
    return [{"class_labels": number} for number in ids] or [{}]


def tell_unknown_words(pipe: Any, *texts: str | None) -> None:
    """Say once on stderr, before anything is drawn, which words the checkpoint does not know."""
    from ..models.text import UnknownWords
    from ..pipeline_conditions import unknown_words_text

    if words := pipe.unknown_words([text for text in texts if text]):
        print(f"Warning: {unknown_words_text(words)}.", file=sys.stderr)
    warnings.simplefilter("ignore", UnknownWords)  # each batch would say it again


def _instead(pipe: Any) -> str:
    """What this checkpoint takes, in flags."""
    if pipe.takes_text:
        return 'It takes a prompt, such as "red apple"'
    if pipe.takes_classes:
        return f"It takes --class NAME: {', '.join(pipe.labels) or 'a number'}"
    return "It draws without being told what: leave it out."


def _number_or_name(pipe: Any, text: str) -> int | str:
    return int(text) if text.isdecimal() and text not in pipe.labels else text
