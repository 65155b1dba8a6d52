"""A folder of a dozen small captioned pictures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentflow.data.shapes import train_source


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for number, example in enumerate(train_source().examples[:240:20]):
        example.open().resize((24, 20)).save(folder / f"{number:02d}.png")
        rows.append({"file_name": f"{number:02d}.png", "text": example.text})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder
