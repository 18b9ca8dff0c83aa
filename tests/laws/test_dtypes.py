"""No worse than plain PyTorch on the same logits taken to float32."""

import torch
from helpers import DEVICE, make_batch, naive_loss
from listed import MIXTURE, each_loss, evaluate, naive, term

# Beyond what the naive version loses itself: a factor, and so many units in the last place of the largest entry.
FACTOR, UNITS = 2.0, 4


@each_loss(dtype=[torch.bfloat16, torch.float16, torch.float32])
def test_precision(listed_as, dtype):
    for seed, kind in enumerate(("padded", "packed")):
        batch = make_batch(kind, 20 + seed).to(dtype)
        exact, exact_gradient = naive(batch.to(torch.float64), term(listed_as))
        plain_loss = naive_loss(batch, (leaf := batch.logits.clone().requires_grad_()).float(), [term(listed_as)])
        (plain_gradient,) = torch.autograd.grad(plain_loss, leaf)
        result, gradient = evaluate(batch, term(listed_as))
        assert result.loss.dtype == result.nll.dtype == torch.float32
        assert gradient.dtype == dtype

        def error(a, b):
            return (a.double() - b).abs().max()

        room = UNITS * torch.finfo(torch.float32).eps * exact.abs().clamp_min(1)
        assert error(result.loss, exact) <= FACTOR * error(plain_loss, exact) + room
        room = UNITS * torch.finfo(dtype).eps * exact_gradient.abs().max()
        assert error(gradient, exact_gradient) <= FACTOR * error(plain_gradient, exact_gradient) + room


@each_loss()
def test_float64_stays_float64(listed_as):
    result, gradient = evaluate(make_batch("padded"), term(listed_as))
    assert {x.dtype for x in (result.loss, result.nll, gradient, *result.terms.values())} == {torch.float64}


def test_autocast_changes_nothing():
    batch = make_batch("padded").to(torch.float32)
    wanted, wanted_gradient = evaluate(batch, *MIXTURE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        result, gradient = evaluate(batch, *MIXTURE)
    assert torch.equal(result.loss, wanted.loss)
    assert torch.equal(gradient, wanted_gradient)
