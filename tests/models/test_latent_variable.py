"""Networks with a latent variable: as before until something is learnt, then another velocity under each z."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from latentflow.errors import UserError
from latentflow.models import MODELS, Condition
from latentflow.models.latent_variable import SEEN, LatentEncoder, Posterior
from latentflow.training.trained_model import extended

from .tiny import FULL, build, full_condition, latents, perturb

KIND = {"latent_variable": "image", "latent_variable_dim": 3}
Z = torch.randn(3, 3, generator=torch.Generator().manual_seed(5))


def test_the_rate_is_the_divergence_from_the_prior() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 6, 4, generator=generator)
    q = Posterior(mean, log_variance)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(q.rate(), expected)
    assert not Posterior(0 * mean, 0 * mean).rate().any()  # of the prior itself
    drawn = Posterior(mean[:1], log_variance[:1]).sample(torch.randn(200_000, 4, generator=generator))
    torch.testing.assert_close(drawn.mean(0), mean[0], atol=0.01, rtol=0.0)
    torch.testing.assert_close(drawn.var(0), log_variance[0].exp(), atol=0.0, rtol=0.02)


@pytest.mark.parametrize("kind", SEEN)
def test_an_encoder_takes_latents_of_any_size(kind: str) -> None:
    torch.manual_seed(0)
    encoder = LatentEncoder(kind, 4, 5, width=8)
    for side in (1, 3, 16):
        x1, x0 = torch.randn(2, 2, 4, side, side)
        seen = (x1,) if kind == "image" else (x1, x0, 0.5 * (x0 + x1), torch.tensor([0.1, 0.9]))
        q = encoder(*seen)
        assert q.mean.shape == q.log_variance.shape == (2, 5)
        assert (
            not q.log_variance.any() and q.mean.std() > 0.01
        )  # at first of variance 1, and it tells something
    if kind == "path":  # and what it sees counts
        for place in range(4):
            other = [*seen]
            other[place] = other[place].flip(0) * 0.9
            assert not torch.equal(encoder(*other).mean, q.mean)


@pytest.mark.parametrize("side", [4, 8, 32])
def test_z_tells_images_apart_from_the_first_step_on(side: int) -> None:
    torch.manual_seed(0)
    encoder = LatentEncoder("image", 8, 4)
    smooth = torch.nn.functional.interpolate(torch.randn(200, 8, 2, 2), size=side)
    apart = encoder(smooth).mean.std(0).mean()
    assert 0.1 < apart < 1.0  # of the noise's 1: with PyTorch's own weights about 0.01


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", [{}, FULL])
def test_an_extended_network_is_the_same_to_the_last_bit(name: str, settings: dict[str, int]) -> None:
    base, plain = build(name, **settings), full_condition() if settings else Condition()
    new = extended(base, **KIND).eval()
    expected = base(latents(), 0.3, plain)
    assert torch.equal(new(latents(), 0.3, plain), expected)
    assert torch.equal(new(latents(), 0.3, Condition(**{**vars(plain), "z": Z})), expected)
    perturb(new)
    by_z = new(latents(), 0.3, Condition(**{**vars(plain), "z": Z}))
    assert not torch.allclose(by_z, new(latents(), 0.3, plain), atol=1e-3)
    zero = Condition(**{**vars(plain), "z": 0 * Z})  # the prior's mean, where none is given
    assert torch.equal(new(latents(), 0.3, zero), new(latents(), 0.3, plain))


@pytest.mark.parametrize("name", MODELS)
def test_the_other_weights_start_as_without(name: str) -> None:
    plain, new = build(name, perturbed=False), build(name, perturbed=False, **KIND)
    weights = dict(new.named_parameters())
    assert all(torch.equal(weights.pop(key), value) for key, value in plain.named_parameters())
    assert {key.split(".")[0] for key in weights} == {"z_embedder", "z_encoder"}


def test_rows_keep_their_z_also_without_a_condition() -> None:
    cond = Condition(class_labels=torch.arange(3), z=Z)
    assert cond.unconditional().z is Z
    assert torch.equal(Condition.cat(cond, cond.rows(torch.tensor([2, 0]))).z[3:], Z[[2, 0]])
    with pytest.raises(ValueError, match="only one of the two conditions has z"):
        Condition.cat(cond, Condition(class_labels=torch.arange(3)))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="the condition has z, but the network has no latent variable"):
        build("dit")(latents(), 0.3, Condition(z=Z))
    with pytest.raises(ValueError, match=r"z has shape \(3, 2\): it must be \(3, 3\)"):
        build("dit", **KIND)(latents(), 0.3, Condition(z=Z[:, :2]))
    with pytest.raises(UserError, match="unknown latent variable 'images'"):
        build("dit", latent_variable="images")
    with pytest.raises(UserError, match="latent_variable_dim is -1"):
        build("unet", latent_variable="path", latent_variable_dim=-1)
