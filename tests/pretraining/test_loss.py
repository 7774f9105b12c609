"""The three ways to compute the loss are one function, and two of them never hold all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretraining.loss import choose_loss, next_token_loss


def gradients(how, **options):
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, requires_grad=True)
    weight = torch.randn(301, 16, requires_grad=True)
    targets = torch.randint(0, 301, (50,))
    entropy, objective = next_token_loss(hidden, weight, None, targets, how=how, chunk_tokens=8, **options)
    objective.backward()
    return entropy, objective.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("how", ["fused", "chunked"])
def test_loss_and_gradients_are_those_of_the_full_logits(how):
    for one, other in zip(gradients(how), gradients("full"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("options", [{"z_loss": 0.01}, {"softcap": 5.0}, {"z_loss": 0.01, "softcap": 5.0}])
def test_z_loss_and_capping_are_their_definitions(options):
    entropy, objective, hidden_gradient, _ = gradients("chunked", **options)
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, requires_grad=True)
    weight = torch.randn(301, 16)
    targets = torch.randint(0, 301, (50,))
    logits = hidden @ weight.T
    if "softcap" in options:
        logits = 5.0 * torch.tanh(logits / 5.0)
    expected = F.cross_entropy(logits, targets, reduction="sum")
    wanted = expected + options.get("z_loss", 0) * torch.logsumexp(logits, 1).square().sum()
    torch.testing.assert_close(entropy, expected.detach(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(objective, wanted.detach(), rtol=1e-5, atol=1e-3)
    wanted.backward()
    torch.testing.assert_close(hidden_gradient, hidden.grad, rtol=1e-4, atol=1e-4)


def test_auto_avoids_large_logits_only():
    assert choose_loss("auto", num_tokens=64, vocab_size=1024, z_loss=0, softcap=None, float32=True) == "full"
    assert choose_loss("auto", num_tokens=8192, vocab_size=128256, z_loss=0, softcap=None, float32=True) == "fused"
    assert choose_loss("auto", num_tokens=8192, vocab_size=128256, z_loss=1e-4, softcap=None, float32=True) == "chunked"
    assert choose_loss("auto", num_tokens=8192, vocab_size=128256, z_loss=0, softcap=None, float32=False) == "chunked"
    assert choose_loss("full", num_tokens=8192, vocab_size=128256, z_loss=0, softcap=None, float32=True) == "full"


def test_what_auto_takes_in_bfloat16_has_the_digits_of_float32():
    """Hidden states in bfloat16: the chosen loss equals that of the same values in float32, digit for digit."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 32).bfloat16(), (torch.randn(8192, 32) / 8).bfloat16()
    targets = torch.randint(0, 8192, (512,))
    how = choose_loss("auto", num_tokens=512, vocab_size=10**6, z_loss=0, softcap=None, float32=False)
    entropy, _ = next_token_loss(hidden, weight, None, targets, how=how, chunk_tokens=100)
    exact = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")
    torch.testing.assert_close(entropy, exact, rtol=1e-5, atol=1e-3)
