"""What a family is to the engine: one file is enough for a new one, and losses are called as seldom as can be."""

from dataclasses import replace
from functools import wraps

import pytest
import torch
from family_of_margins import MARGIN, hinge
from helpers import DEVICE, temporary_losses

from axolotl_cvloss import Objective, available_losses, register_loss
from axolotl_cvloss.engine import batch as engine_batch
from axolotl_cvloss.engine.families import FAMILIES
from axolotl_cvloss.losses import registry
from axolotl_cvloss.losses.registry import register_family

B, T, H, V = 2, 11, 5, 13


@pytest.fixture
def _margins():
    with temporary_losses():
        register_family(MARGIN)
        try:
            register_loss("hinge", family="margin")(hinge)
            yield
        finally:
            del FAMILIES["margin"]


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((B, T, H), (V, H)))
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[:, :3] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.usefixtures("_margins")
@pytest.mark.parametrize("rows", [3, 1000])
@pytest.mark.parametrize("others", [{}, {"cross_entropy": 0.3}, {"lovasz": 0.5, "confidence_penalty": 0.2}], ids=str)
def test_a_family_that_the_package_does_not_know(others, rows, monkeypatch):
    """Beside families of one visit and of two, fused, in chunks: value and gradient are those of its formula."""
    monkeypatch.setitem(engine_batch.CHUNK_BYTES, DEVICE.type, rows * V * 8)
    hidden, weight, labels = tensors()
    objective = Objective.from_config({"hinge": {"weight": 0.4, "distance": 2.0}, **others})
    result = objective.from_hidden(hidden, weight, labels)
    found = torch.autograd.grad(result.loss, (hidden, weight))

    logits = (hidden @ weight.T)[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    logits, targets = logits[targets != -100], targets[targets != -100]
    own = logits.gather(1, targets[:, None]).squeeze(1)
    value = (2.0 - own + logits.scatter(1, targets[:, None], -torch.inf).amax(1)).clamp_min(0).mean()
    torch.testing.assert_close(result.terms["hinge"], value.detach())
    expected = 0.4 * value
    if others:
        expected = expected + Objective.from_config(others).from_logits(hidden @ weight.T, labels).loss
    torch.testing.assert_close(found, torch.autograd.grad(expected, (hidden, weight)))


@pytest.mark.usefixtures("_margins")
def test_a_family_has_one_name():
    with pytest.raises(ValueError, match="a family named 'margin' is there already"):
        register_family(MARGIN)


# Many sets

SIZES = [1, 1, 1, 2, 2, 5]  # rows of each document


def documents(sizes=SIZES, repeat=1):
    generator = torch.Generator().manual_seed(1)
    position_ids = torch.cat([torch.arange(size) for size in sizes * repeat])[None]
    logits = torch.randn(1, position_ids.numel(), 3, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, 3, position_ids.shape, generator=generator), position_ids


def counting(function, calls):
    @wraps(function)
    def counted(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return counted


def values(name, logits, labels, position_ids):
    logits = logits.detach().requires_grad_()
    inputs = {"shift": False, "position_ids": position_ids, "reference_logps": torch.zeros_like(logits[..., 0])}
    loss = Objective.from_config(name).from_logits(logits, labels, **inputs).loss
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("name", [n for n, loss in available_losses().items() if loss.per_set])
def test_built_in_losses_of_sets_are_called_once(name, monkeypatch):
    calls = []
    loss = available_losses()[name]
    with temporary_losses():
        monkeypatch.setitem(registry._losses, name, replace(loss, function=counting(loss.function, calls)))
        values(name, *documents(repeat=50))
    assert len(calls) == 1


def spread(intersection, predicted, labelled):
    """Its classes are not independent of each other."""
    return intersection / labelled - (intersection / predicted).mean() ** 2


def halting(logp):
    """An ``if`` on a value."""
    return -logp.sum() if logp.sum() > -2 else -logp.max()


@pytest.mark.parametrize(("function", "family"), [(spread, "region"), (halting, "document")])
def test_a_function_of_one_set_gives_the_same_for_many(function, family):
    """As when every document comes alone; called once a size, or once a set where vmap cannot follow it."""
    calls = []
    logits, labels, position_ids = documents(repeat=20)
    with temporary_losses():
        register_loss("mine", family=family)(counting(function, calls))
        value, gradient = values("mine", logits, labels, position_ids)
        called, n = len(calls), labels.numel()
        total, expected, at = 0, torch.zeros_like(logits), 0
        for size in SIZES * 20:
            part = slice(at, at + size)
            alone, slope = values("mine", *(x[:, part].detach() for x in (logits, labels, position_ids)))
            total, at = total + size / n * alone, at + size
            expected[:, part] = size / n * slope
        torch.testing.assert_close(value, total)
        torch.testing.assert_close(gradient, expected)
    assert called <= 8 if function is spread else called >= len(SIZES) * 20
