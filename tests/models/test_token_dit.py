"""The network of tokens: what it returns, learns and refuses, and that it is loaded as it was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentflow.errors import UserError
from latentflow.models import Condition
from latentflow.models.token_dit import TokenDiT

SMALL = {"width": 32, "depth": 1, "heads": 2, "num_classes": 3}
TOKENS = torch.randint(0, 7, (4, 5, 6), generator=torch.Generator().manual_seed(0))


def network(*, tied: bool = True, states: int | None = None) -> TokenDiT:
    torch.manual_seed(0)
    return TokenDiT(vocabulary=6, states=states, embedding_width=16, tied=tied, transformer=SMALL)


@pytest.mark.parametrize("tied", [True, False])
def test_it_learns_the_posterior_of_a_rule(tied: bool) -> None:
    """The data are rows of one token each, and the class names the token where everything is masked."""
    model = network(tied=tied)
    assert not model(TOKENS, 0.3).any()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    labels = torch.tensor([0, 1, 2])
    data, masked = labels[:, None, None].expand(3, 2, 2) * 2, torch.full((3, 2, 2), 6)
    losses = []
    for _ in range(160):
        logits = model(masked, torch.zeros(3), Condition(class_labels=labels))
        loss = torch.nn.functional.cross_entropy(logits.movedim(-1, 1), data)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert logits.shape == (3, 2, 2, 6) and min(losses[120:]) < 0.1 < losses[0]


def test_tied_logits_are_products_with_the_embeddings() -> None:
    tied, untied = network(), network(tied=False)
    assert (
        sum(one.numel() for one in untied.parameters()) - sum(one.numel() for one in tied.parameters())
        == 17 * 6
    )
    features = torch.randn(4, 5, 6, 16)
    tied.dit.forward = lambda *_: features.movedim(-1, 1)
    expected = features @ tied.embedding.weight[:6].T / 4
    torch.testing.assert_close(tied(TOKENS, 0.5), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_loaded_as_it_was_saved(tied: bool, tmp_path: Path) -> None:
    model = network(tied=tied)
    torch.nn.init.normal_(model.dit.final_layer.linear.weight)
    model.save_pretrained(tmp_path)
    loaded = TokenDiT.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(TOKENS, 0.5), model.eval()(TOKENS, 0.5)) and loaded(TOKENS, 0.5).any()


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (TOKENS + 1, UserError, "there are 7 states"),
        (TOKENS.float(), UserError, "int64"),
        (TOKENS[0], ValueError, "takes tokens"),
    ],
)
def test_what_are_no_tokens_is_refused(tokens: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        network()(tokens, 0.5)


def test_masks_are_no_states_of_a_uniform_source() -> None:
    with pytest.raises(UserError, match="there are 6 states"):
        network(states=6)(TOKENS, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocabulary": 6, "states": 8}, "6 tokens, 8 states"),
        ({"vocabulary": 1}, "1 tokens"),
        ({"transformer": {**SMALL, "in_channels": 4}}, "given in_channels"),
        ({"transformer": {**SMALL, "patch_size": 2}}, "patch_size 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokenDiT(**settings)
