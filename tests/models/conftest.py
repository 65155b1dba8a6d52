"""Every test that takes ``name`` runs for each velocity network."""

from __future__ import annotations

import pytest

from latentflow.models import MODELS


@pytest.fixture(params=list(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    """The name of a network in the table."""
    return str(request.param)
