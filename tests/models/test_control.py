"""Networks that take control images: as before until something is learnt, then led by every pixel of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latentflow.errors import UserError
from latentflow.models import MODELS, Condition, ControlInputs
from latentflow.training.trained_model import extended

from .tiny import FULL, build, full_condition, latents, perturb

LABELS = [["ground", "#ffffff"], ["cat", "#ff0000"], ["dog", ""]]
BOTH = {"image": 4, "labels": LABELS, "cell": 2, "label_width": 3}


def control(rows: int = 3, height: int = 6, width: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    layout = torch.randint(-1, 3, (rows, 2 * height, 2 * width), generator=generator)
    return {"control": torch.randn(rows, 4, height, width, generator=generator), "layout": layout}


@pytest.mark.parametrize("name", MODELS)
def test_an_extended_network_is_the_same_to_the_last_bit(name: str) -> None:
    base = build(name, **FULL)
    new = extended(base, control=BOTH).eval()
    for condition in (Condition(), full_condition()):
        expected = base(latents(), 0.3, condition)
        assert torch.equal(new(latents(), 0.3, condition), expected)
        under = Condition(**{**vars(condition), **control()})
        assert torch.equal(new(latents(), 0.3, under), expected)
    perturb(new)
    assert not torch.allclose(new(latents(), 0.3, Condition(**control())), new(latents(), 0.3), atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_a_row_without_a_control_image_is_what_it_is_without_any(name: str) -> None:
    model, given = build(name, control=BOTH), control()
    given["control"][1], given["layout"][1] = 0.0, -1
    out = model(latents(), 0.3, Condition(**given))
    torch.testing.assert_close(out[1], model(latents(), 0.3)[1])
    alone = {key: value[:1] for key, value in given.items()}
    torch.testing.assert_close(out[:1], model(latents()[:1], 0.3, Condition(**alone)))
    for kind, nothing in (("control", 0.0), ("layout", -1)):  # one kind dropped: what the other alone gives
        dropped = {**given, kind: torch.full_like(given[kind], nothing)}
        rest = {key: value for key, value in given.items() if key != kind}
        both, one = (model(latents(), 0.3, Condition(**each)) for each in (dropped, rest))
        assert torch.equal(both, one)
        assert not torch.allclose(one, out, atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_every_pixel_of_a_label_map_and_every_label_counts(name: str) -> None:
    model = build(name, control={**BOTH, "image": 0})
    layout = torch.zeros(1, 12, 8, dtype=torch.long)
    plain = model(latents(1), 0.3, Condition(layout=layout))
    for y, x in ((0, 0), (0, 1), (1, 0), (11, 7)):
        seen = []
        for label in (-1, 1, 2):
            changed = layout.clone()
            changed[0, y, x] = label
            seen.append(model(latents(1), 0.3, Condition(layout=changed)))
        for one, other in ((seen[0], plain), (seen[1], plain), (seen[1], seen[2])):
            assert not torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_learnt_control_survives_saving_and_further_extension(name: str, tmp_path: Any) -> None:
    model, given = build(name, control={**BOTH, "image": 0}), control()
    layout = Condition(layout=given["layout"])
    model.save_pretrained(tmp_path)
    assert torch.equal(
        MODELS[name].from_pretrained(tmp_path)(latents(), 0.3, layout), model(latents(), 0.3, layout)
    )
    more = extended(model, control=BOTH, condition_channels=2).eval()  # a control image, and masks
    expected = model(latents(), 0.3, layout)
    torch.testing.assert_close(more(latents(), 0.3, layout), expected)
    torch.testing.assert_close(more(latents(), 0.3, Condition(**given)), expected)


@pytest.mark.parametrize("name", MODELS)
def test_all_of_the_control_learns(name: str) -> None:
    model = build(name, control=BOTH).train()
    model(latents(), 0.3, Condition(**control())).square().mean().backward()
    found = {key: value.grad for key, value in model.named_parameters() if "control" in key}
    assert len(found) == 3
    for key, gradient in found.items():
        assert gradient is not None, key
        assert gradient.abs().sum() > 0, key


def test_a_control_that_does_not_fit_is_refused() -> None:
    model, given = build("dit", control=BOTH), control()
    with pytest.raises(ValueError, match=r"layout has shape \(3, 6, 4\): it must be \(3, 12, 8\)"):
        model(latents(), 0.3, Condition(layout=given["layout"][:, ::2, ::2]))
    with pytest.raises(ValueError, match="no labels of control images"):
        build("dit", control={"image": 4})(latents(), 0.3, Condition(layout=given["layout"]))
    with pytest.raises(ValueError, match="no control images"):
        build("dit")(latents(), 0.3, Condition(control=given["control"]))


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"image": 0},
        {"image": 2.5},
        {"image": 10**9},
        {"labels": [["cat"]]},
        {"labels": [["cat", "red"]]},
        {"labels": "cat"},
        {"labels": LABELS, "cell": 0},
        {"depth": 1},
        [4],
    ],
)
def test_settings_of_a_control_that_are_none_are_refused(wrong: Any) -> None:
    with pytest.raises(UserError, match="control"):
        ControlInputs.of(wrong)


def test_the_settings_are_plain_and_come_back() -> None:
    inputs = ControlInputs.of(BOTH)
    assert inputs.plain() == BOTH
    assert inputs.kinds == ("image", "labels")
    assert inputs.channels == {"image": 4, "labels": 3 * 4}
    assert ControlInputs.of(None).plain() is None
