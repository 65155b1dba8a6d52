"""The command that imports published weights, and what its result draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from latentflow import LatentFlowPipeline
from latentflow.errors import UserError

from .parts import kl
from .test_original import original_weights

Program = Callable[[str], Any]


@pytest.fixture
def autoencoder(tmp_path: Path) -> Path:
    kl(shift=None).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.parametrize("kind", ["sit", "dit", "repa"])
def test_an_imported_checkpoint_draws_classes(
    kind: str, autoencoder: Path, tmp_path: Path, load_program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / f"{kind}-last.pt", tmp_path / "result"
    torch.save(original_weights(kind, 64, 2, 1), file)
    load_program("import").main([str(file), "--vae", str(autoencoder), "-o", str(output)])
    assert "latentflow generate --checkpoint" in capsys.readouterr().out
    pipe = LatentFlowPipeline.from_pretrained(output)
    assert pipe.labels["golden retriever"] == 207
    assert (pipe.path.__class__.__name__, pipe.config.prediction) == (
        ("DDPM", "noise") if kind == "dit" else ("CondOT", "velocity")
    )
    image = pipe(class_labels="golden retriever", num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, 64, 64)
    assert image.isfinite().all()


def test_guidance_of_three_channels(autoencoder: Path, tmp_path: Path, load_program: Program) -> None:
    """SiT's own code guides the first three channels of four; the fourth is that of the condition alone."""
    file, output = tmp_path / "sit.pt", tmp_path / "result"
    torch.save(original_weights("sit", 64, 2, 1), file)
    load_program("import").main([str(file), "--vae", str(autoencoder), "-o", str(output)])
    model = LatentFlowPipeline.from_pretrained(output).model
    rows, x, t = model.encode_class([3]), torch.randn(1, 4, 32, 32), torch.tensor(0.4)
    with torch.no_grad():
        guided, alone, null = (
            model.velocity(given, scale)(x, t)
            for given, scale in ((rows, 4.0), (rows, 1.0), (model.null(1), 1.0))
        )
    torch.testing.assert_close(guided[:, :3], (null + 4.0 * (alone - null))[:, :3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(guided[:, 3:], alone[:, 3:], rtol=1e-5, atol=1e-5)
    assert (guided[:, :3] - alone[:, :3]).abs().max() > 0.01


def test_bad_input(autoencoder: Path, tmp_path: Path, load_program: Program) -> None:
    run, out = load_program("import").main, ["--vae", str(autoencoder), "-o", str(tmp_path / "result")]
    with pytest.raises(UserError, match="no file"):
        run([str(tmp_path / "none.pt"), *out])
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match="cannot be read"):
        run([str(tmp_path / "text.pt"), *out])
    torch.save(original_weights("sit", 64, 1, 1), tmp_path / "last.pt")
    with pytest.raises(UserError, match="--kind"):
        run([str(tmp_path / "last.pt"), *out])
    with pytest.raises(UserError, match="nothing is overwritten"):
        run([str(tmp_path / "last.pt"), "--vae", str(autoencoder), "-o", str(autoencoder)])
    assert not (tmp_path / "result").exists()
