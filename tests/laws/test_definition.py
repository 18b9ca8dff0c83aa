"""A loss is its formula: the naive version of it, and the gradient is that of the value."""

from inspect import signature

import pytest
import torch
from helpers import BATCHES, IGNORE, Batch, make_batch
from listed import (
    DETACHED,
    FAMILIES,
    LISTED,
    PERFECT_IS_NOT_BEST,
    REPRESENTATIVES,
    STRANGERS,
    VARIANTS,
    certain,
    close,
    each_loss,
    evaluate,
    groupings,
    naive,
    objective,
    term,
)
from naive import NAIVE

from axolotl_cvloss import available_losses


def test_every_loss_has_a_naive_version_and_variants():
    for name, loss in available_losses().items():
        assert name in NAIVE, f"write {name} into naive.py, from its formula and without looking at the package"
        if name not in STRANGERS:
            assert name in VARIANTS or not loss.parameters.model_fields, f"add variants of {name} to VARIANTS"


def test_the_representatives_take_all_that_a_loss_can_take():
    def taken(names):
        found = set()
        for loss in (available_losses()[LISTED[name][0]] for name in names):
            arguments = signature(loss.function).parameters.keys() - loss.parameters.model_fields.keys()
            found |= {(loss.family, argument) for argument in arguments}
        return found

    assert taken(REPRESENTATIVES) == taken(LISTED)


@each_loss(kind=list(BATCHES))
def test_equals_the_naive_version(listed_as, kind):
    batch = make_batch(kind, seed=len(listed_as))
    for grouping in groupings(listed_as):
        wanted, wanted_gradient = naive(batch, term(listed_as, **grouping))
        result, gradient = evaluate(batch, term(listed_as, **grouping))
        close(result.loss.detach(), wanted)
        close(gradient, wanted_gradient)


@pytest.mark.parametrize("kind", [kind for kind in BATCHES if kind != "rows"])
def test_a_mixture_of_all_families_over_two_scopes_equals_the_naive_versions(kind):
    for seed in range(3):
        batch = make_batch(kind, seed)
        wanted, wanted_gradient = naive(batch, *FAMILIES)
        result, gradient = evaluate(batch, *FAMILIES)
        close(result.loss.detach(), wanted)
        close(gradient, wanted_gradient)
        for one, value in zip(FAMILIES, result.terms.values(), strict=True):
            close(value, naive(batch, {**one, "weight": 1.0})[0])


class Recomputed(torch.autograd.Function):
    """Computes the objective anew in the backward pass, as an objective allows one backward alone."""

    @staticmethod
    def forward(ctx, logits, loss):
        ctx.save_for_backward(logits)
        ctx.loss = loss
        return loss(logits.detach()).clone()

    @staticmethod
    def backward(ctx, grad_output):
        leaf = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            return grad_output * torch.autograd.grad(ctx.loss(leaf), leaf)[0], None


@each_loss([name for name in LISTED if name not in DETACHED])
def test_gradient_is_that_of_the_value(listed_as):
    logits = make_batch("rows", 1, vocab=5).logits[:6]
    labels = torch.tensor([0, 2, 1, IGNORE, 0, 2])
    for grouping in groupings(listed_as):
        one = objective(term(listed_as, **grouping))
        torch.autograd.gradcheck(
            lambda z: Recomputed.apply(z, lambda x: Batch(x, labels, None, {"shift": False}).result(one).loss),  # noqa: B023
            (logits.requires_grad_(),),
        )


@each_loss([name for name in LISTED if name not in PERFECT_IS_NOT_BEST])
def test_a_perfect_prediction_is_the_minimum(listed_as):
    batch = make_batch("rows", 8)
    best = evaluate(batch, term(listed_as), logits=certain(batch.labels, 60.0))[0].loss
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        logits = certain(batch.labels, 0.3 * seed) + torch.randn(batch.logits.shape, generator=generator)
        assert evaluate(batch, term(listed_as), logits=logits)[0].loss > best
