"""The gradients of single terms on a sample of the rows."""

import pytest
import torch
from naive import NAIVE

from axolotl_cvloss import Objective
from axolotl_cvloss.objective import objective

MIX = {"cross_entropy": 0.6, "lovasz": 0.4, "dice": 0.3, "spherical_z": 0.1}
CLOSE = 1e2 * torch.finfo(torch.float32).eps


@pytest.fixture
def batch():
    torch.manual_seed(0)
    labels = torch.randint(0, 5, (3, 6))
    labels[1, 4:] = -100
    return torch.randn(3, 6, 4), torch.nn.Linear(4, 5, bias=False), labels


def expected(logits, labels, whole):
    """By autograd, where ``whole`` is what the sums are divided by."""
    documents = torch.arange(len(labels))[:, None].expand_as(labels)
    found = {}
    for name, weight in MIX.items():
        leaf = logits.detach().double().requires_grad_()
        value = NAIVE[name](leaf.flatten(0, 1), labels.flatten(), documents.flatten())
        (gradient,) = torch.autograd.grad(weight * value * (labels != -100).sum() / whole, leaf)
        found[name] = float(gradient.norm())
    return found


@pytest.mark.parametrize(("most", "documents"), [(100, 3), (11, 2), (6, 1)])
def test_gradients_of_the_first_documents(batch, monkeypatch, most, documents):
    hidden, head, labels = batch
    monkeypatch.setattr(objective, "SAMPLE", most)
    logits = head(hidden)
    wanted = expected(logits[:documents], labels[:documents], (labels != -100).sum())
    made = Objective.from_config(MIX)
    for result in (
        made.from_hidden(hidden.requires_grad_(), head, labels, shift=False, sample=True),
        made.from_logits(logits, labels, shift=False, sample=True),
    ):
        assert {name: float(norm) for name, norm in result.gradients.items()} == pytest.approx(wanted, rel=CLOSE)


def test_a_long_document_is_cut(batch, monkeypatch):
    hidden, head, labels = batch
    monkeypatch.setattr(objective, "SAMPLE", 4)
    logits = head(hidden)
    found = Objective.from_config(MIX).from_logits(logits, labels, shift=False, sample=True).gradients
    wanted = expected(logits[:1, :4], labels[:1, :4], (labels != -100).sum())
    assert {name: float(norm) for name, norm in found.items()} == pytest.approx(wanted, rel=CLOSE)


def test_the_rest_is_as_without(batch):
    """Also where the head draws random numbers."""
    hidden, linear, labels = batch
    head = torch.nn.Sequential(torch.nn.Dropout(0.5), linear)
    found = []
    for sample in (False, True):
        torch.manual_seed(1)
        result = Objective.from_config(MIX).from_hidden(hidden.requires_grad_(), head, labels, sample=sample)
        gradients = torch.autograd.grad(result.loss, [hidden, linear.weight])
        found.append([result.loss.detach(), *gradients, torch.rand(1)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_no_rows(batch):
    hidden, head, labels = batch
    for given in (torch.full_like(labels, -100), labels[:0]):
        result = Objective.from_config(MIX).from_hidden(hidden[: len(given)], head, given, sample=True)
        assert {name: float(norm) for name, norm in result.gradients.items()} == dict.fromkeys(MIX, 0.0)


def test_where_all_logits_are_needed_there_is_none(batch):
    hidden, head, labels = batch
    key = {"terms": [{"loss": "cross_entropy"}, {"loss": "lovasz"}], "reference": True}
    assert Objective.from_config(key).from_logits(head(hidden), labels, sample=True).gradients == {}
