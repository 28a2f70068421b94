"""The critic's loss against hand gradients, bounds and spot values."""

import pytest
import torch

from trl_ext.token_mdp.losses import value_loss


def batch():
    generator = torch.Generator().manual_seed(0)
    values, returns, old_values = torch.randn(3, 8, 16, generator=generator, dtype=torch.float64)
    return values.requires_grad_(), returns, old_values


def gradient(loss, values):
    return torch.autograd.grad(loss.sum(), values)[0]


def test_gradient_without_clipping_is_the_error():
    values, returns, old_values = batch()
    error = (values - returns).detach()
    torch.testing.assert_close(gradient(value_loss(values, returns), values), error)
    # Old values without a range do nothing
    torch.testing.assert_close(gradient(value_loss(values, returns, old_values), values), error)


@pytest.mark.parametrize("cliprange", [0.1, 0.5])
def test_gradient_vanishes_where_the_clipped_error_is_larger(cliprange):
    values, returns, old_values = batch()
    moved = (values - old_values).detach()
    clipped = old_values + moved.sign() * cliprange
    beyond = moved.abs() > cliprange
    held = beyond & ((clipped - returns).abs() > (values - returns).abs())
    grad = gradient(value_loss(values, returns, old_values, cliprange), values)
    assert held.any() and (beyond & ~held).any() and (~beyond).any()
    assert (grad[held] == 0).all()
    torch.testing.assert_close(grad[~held], (values - returns).detach()[~held])


@pytest.mark.parametrize("cliprange", [0.1, 0.5, 100.0])
def test_clipping_is_pessimistic(cliprange):
    values, returns, old_values = batch()
    plain, clipped = value_loss(values, returns), value_loss(values, returns, old_values, cliprange)
    within = (values - old_values).abs() <= cliprange
    assert clipped.shape == plain.shape == values.shape
    torch.testing.assert_close(clipped[within], plain[within])
    assert (clipped >= plain)[~within].all()
    assert (clipped > plain + 1e-3).any() == (cliprange < 100)


@pytest.mark.parametrize(
    ("value", "target", "old", "cliprange", "loss", "grad"),
    [
        (3.0, 1.0, 0.0, None, 2.0, 2.0),
        (1.0, 3.0, 0.0, None, 2.0, -2.0),
        (1.0, 1.0, 0.0, None, 0.0, 0.0),
        (1.0, 3.0, 0.0, 2.0, 2.0, -2.0),  # within the range
        (2.0, 3.0, 0.0, 1.0, 2.0, 0.0),  # came nearer than it may: the loss of having moved by 1, and no gradient
        (4.0, 3.0, 0.0, 0.5, 3.125, 0.0),
        (-2.0, 3.0, 0.0, 1.0, 12.5, -5.0),  # went away: the whole loss, to come back
        (-2.0, -3.0, 0.0, 1.0, 2.0, 0.0),
        (2.0, 3.0, 1.0, 0.0, 2.0, 0.0),
    ],
)
def test_spot_values(value, target, old, cliprange, loss, grad):
    value = torch.tensor([[value]], requires_grad=True)
    actual = value_loss(value, torch.tensor([[target]]), torch.tensor([[old]]), cliprange)
    assert actual.item() == loss
    assert gradient(actual, value).item() == grad


def test_gradient_matches_finite_differences():
    values, returns, old_values = batch()
    assert torch.autograd.gradcheck(lambda v: value_loss(v, returns, old_values, 0.3), values)
