"""Entropy and accuracy beside the loss: by their definitions, wherever the logits come from, and only if asked for."""

import pytest
import torch
from helpers import BATCHES, DEVICE, VOCAB, make_batch
from torch import nn

from axolotl_cvloss import Objective
from axolotl_cvloss.engine import batch as engine_batch

OBJECTIVES = {
    "token": "focal",
    "row": {"cross_entropy": {"label_smoothing": 0.1}},
    "region": "dice",
    "ranking": {"cross_entropy": 0.6, "lovasz": 0.4},
    "prompt too": {"terms": [{"loss": "cross_entropy", "scope": "sequence"}, {"loss": "lovasz"}]},
}


def diagnosing(config):
    return Objective.from_config(config, diagnose=True)


def by_definition(batch, logits):
    """Row by row."""
    logits = logits.view(*torch.atleast_2d(batch.labels).shape, -1)
    rows = [(logits[at], target) for at, target, _ in batch.rows()]
    entropies = [-sum(p * p.log() for p in row.softmax(0)) for row, _ in rows]
    right = [float(max(range(len(row)), key=row.__getitem__) == target) for row, target in rows]
    return {"entropy": sum(entropies) / len(rows), "accuracy": torch.tensor(sum(right) / len(rows)).to(logits)}


@pytest.fixture(params=[1, 4, 1000], ids=lambda n: f"chunk{n}")
def _chunk(request, monkeypatch):
    monkeypatch.setitem(engine_batch.CHUNK_BYTES, DEVICE.type, request.param * VOCAB * 8)


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("config", OBJECTIVES.values(), ids=OBJECTIVES)
def test_of_logits(config, kind):
    batch = make_batch(kind)
    for at, target, _ in batch.rows()[::2]:
        batch.logits.view(*torch.atleast_2d(batch.labels).shape, -1)[at][target] += 9  # right in half of the rows
    if "input_ids" not in batch.inputs and "terms" in config:
        config = "dice"  # a scope of the sequence needs the tokens
    expected = by_definition(batch, batch.logits)
    with torch.no_grad():
        evaluated = batch.result(diagnosing(config))
    trained = batch.result(diagnosing(config), batch.logits.clone().requires_grad_())
    for result in (evaluated, trained):
        torch.testing.assert_close(result.diagnostics, expected)
    assert 0.4 < expected["accuracy"] < 1


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("called", [False, True], ids=["weight", "module"])
@pytest.mark.parametrize("config", OBJECTIVES.values(), ids=OBJECTIVES)
def test_of_hidden_states(config, called, frozen):
    batch = make_batch("packed")
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (
        torch.randn(*shape, 5, generator=generator, dtype=torch.float64) for shape in (batch.labels.shape, (VOCAB,))
    )
    head = weight.requires_grad_(not frozen)
    if called:
        head = nn.Sequential(nn.Linear(5, VOCAB, bias=False, dtype=torch.float64)).requires_grad_(not frozen)
        head[0].weight.data.copy_(weight)
    objective = diagnosing(config)
    extra = {"scale": 1.5, "softcap": 3.0}
    result = objective.from_hidden(hidden.requires_grad_(), head, batch.labels, **batch.inputs, **extra)
    expected = by_definition(batch, 3.0 * torch.tanh((hidden @ weight.T).detach() * 1.5 / 3.0))
    torch.testing.assert_close(result.diagnostics, expected)


@pytest.mark.parametrize("config", OBJECTIVES.values(), ids=OBJECTIVES)
def test_nothing_else_changes(config):
    batch = make_batch("packed")
    results, gradients = [], []
    for objective in (diagnosing(config), Objective.from_config(config)):
        logits = batch.logits.clone().requires_grad_()
        results.append(batch.result(objective, logits))
        gradients += torch.autograd.grad(results[-1].loss, logits)
    assert torch.equal(results[0].loss, results[1].loss)
    assert torch.equal(*gradients)
    assert results[1].diagnostics == {}


def test_the_paper_s_code():
    batch = make_batch("padded")
    result = batch.result(diagnosing({"terms": [{"loss": "lovasz"}], "reference": True}))
    torch.testing.assert_close(result.diagnostics, by_definition(batch, batch.logits))


def test_no_trained_row():
    batch = make_batch("padded")
    batch.labels[:] = -100
    for reference in (False, True):
        result = batch.result(diagnosing({"terms": [{"loss": "lovasz"}], "reference": reference}))
        assert {name: float(value) for name, value in result.diagnostics.items()} == {"entropy": 0, "accuracy": 0}


def test_the_first_of_equally_likely_tokens():
    """As argmax has it; bf16 logits often tie."""
    logits = torch.tensor([[[1.0, 1.0, 0.0]] * 3])
    result = diagnosing("cross_entropy").from_logits(logits, torch.tensor([[0, 0, 1]]))
    assert result.diagnostics["accuracy"] == 0.5
