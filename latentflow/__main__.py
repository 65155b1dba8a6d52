"""`python -m latentflow`: the `latentflow` command."""

from __future__ import annotations

from .cli import main

main()
