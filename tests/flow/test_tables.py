from __future__ import annotations

from dataclasses import dataclass

import pytest

from latentflow.errors import UserError
from latentflow.flow import make


@dataclass(frozen=True)
class Thing:
    size: float = 1.0
    count: int = 2
    name: str = "x"
    kind: bool = False


TABLE = {"thing": Thing, "function": lambda size, *, rate=0.5: (size, rate), "bare": lambda: 7}


def test_options_reach_classes_and_functions() -> None:
    assert make(TABLE, "thing", "thing") == Thing()
    # An option may be called like an argument of `make` itself.
    assert make(TABLE, "thing", "thing", size=2.0, name="y", kind=True) == Thing(2.0, name="y", kind=True)
    assert make(TABLE, "function", "thing", size=3) == (3, 0.5)
    assert make(TABLE, "bare", "thing") == 7


def test_numbers_may_be_text_and_whole_ones_stay_whole() -> None:
    assert make(TABLE, "thing", "thing", size="1e-4", name="5") == Thing(1e-4, name="5")
    for count in (3, 3.0, "3", "3.0"):
        made = make(TABLE, "thing", "thing", count=count).count
        assert made == 3 and isinstance(made, int)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("thin", {}, "(?s)unknown thing 'thin'.*did you mean 'thing'"),
        ("thing", {"sise": 1}, "(?s)unknown option of thing 'thing': 'sise'.*mean 'size'.*size, count"),
        ("bare", {"size": 1}, "(?s)option 'size' of thing 'bare'.*leave it out"),
        ("function", {"rate": 1}, "missing option of thing 'function': size"),
        ("thing", {"size": "big"}, "(?s)option 'size' of thing 'thing' is 'big'.*number"),
        ("thing", {"size": [1]}, r"option 'size' of thing 'thing' is \[1\]"),
        ("thing", {"size": True}, "option 'size' of thing 'thing' is True"),
        ("thing", {"count": 2.5}, "(?s)option 'count' of thing 'thing' is 2.5.*whole number"),
        ("thing", {"count": "2.5"}, "option 'count' of thing 'thing' is '2.5'"),
    ],
)
def test_mistakes_are_named(name, options, message) -> None:
    with pytest.raises(UserError, match=message):
        make(TABLE, name, "thing", **options)
