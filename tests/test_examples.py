"""``examples``: what documents count by, against forms that go from document to document."""

import pytest
import torch
from helpers import KNOWN, make_batch, naive_documents
from test_inputs import EXACT

from axolotl_cvloss import Objective
from axolotl_cvloss.engine.rows import COMPLETION
from axolotl_cvloss.objective.config import ConfigError, CVLossConfig

POWERS = {"tokens": 0, "square_root": 0.5, "examples": 1}
FISH = {"k": 3, "h": 2}
MIX = [
    {"loss": "cross_entropy", "weight": 0.5},
    {"loss": "dice", "weight": 0.3},
    {"loss": "focal", "weight": 0.2, "scope": "sequence"},
]
OBJECTIVES = {
    "token": [{"loss": "cross_entropy"}],
    "row": [{"loss": "squentropy"}],
    "region": [{"loss": "dice"}],
    "ranking": [{"loss": "lovasz"}],
    "document": [{"loss": "topk_cross_entropy"}],
    "goldfish": [{"loss": "cross_entropy", "goldfish": FISH}, {"loss": "dice", "weight": 0.4}],
    "mix": MIX,
}
KINDS = ["padded", "padded left", "packed", "packed, one mask", "packed, numbered mask"]


def objective_of(terms, **examples):
    return Objective.from_config({"terms": terms, "examples": examples}, **KNOWN)


def both(loss, expected, *tensors):
    torch.testing.assert_close(loss, expected, **EXACT)
    found = [torch.autograd.grad(each, tensors, retain_graph=True) for each in (loss, expected)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


# normalize


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", POWERS)
@pytest.mark.parametrize("terms", OBJECTIVES.values(), ids=OBJECTIVES)
def test_documents_count_by_a_power_of_their_rows(terms, normalize, kind):
    batch = make_batch(kind, 3)
    logits = batch.logits.requires_grad_()
    result = batch.result(objective_of(terms, normalize=normalize), logits)
    both(result.loss, naive_documents(batch, logits, terms, POWERS[normalize]), logits)
    sizes = torch.tensor([row[2] for row in batch.rows()]).unique(return_counts=True)[1].double()
    torch.testing.assert_close(result.document_weights, sizes ** (1 - POWERS[normalize]), **EXACT)
    torch.testing.assert_close(result.nll, batch.result(Objective.from_config("cross_entropy")).nll, **EXACT)


@pytest.mark.parametrize("normalize", POWERS)
def test_a_document_that_is_cut_over_chunks_is_one(normalize, monkeypatch):
    batch = make_batch("packed", 4)
    logits = batch.logits.requires_grad_()
    whole = batch.result(objective_of(MIX, normalize=normalize), logits).loss
    # A chunk of two rows.
    monkeypatch.setattr("axolotl_cvloss.engine.batch.CHUNK_BYTES", {"cpu": 2 * logits.shape[-1] * 8})
    both(batch.result(objective_of(MIX, normalize=normalize), logits).loss, whole, logits)


@pytest.mark.parametrize("normalize", POWERS)
def test_packed_is_unpacked(normalize):
    """Each document in a row of its own, padded, is the same."""
    batch = make_batch("packed", 5)
    numbers = [number for number in batch.documents.unique().tolist() if number >= 0]
    masks = [batch.documents == number for number in numbers]
    pad = torch.nn.utils.rnn.pad_sequence
    labels = pad([batch.labels[mask] for mask in masks], batch_first=True, padding_value=-100)
    ids = pad([batch.inputs["input_ids"][mask] for mask in masks], batch_first=True)
    logits = batch.logits.requires_grad_()
    apart = pad([logits[mask] for mask in masks], batch_first=True)
    inputs = {"input_ids": ids, "attention_mask": pad([mask[mask].long() for mask in masks], batch_first=True)}
    objective = objective_of(MIX, normalize=normalize)
    both(batch.result(objective, logits).loss, objective.from_logits(apart, labels, **inputs).loss, logits)


@pytest.mark.parametrize("normalize", POWERS)
@pytest.mark.parametrize("per", ["document", "batch"])
def test_micro_batches_with_the_mass_of_the_step(normalize, per):
    """``Objective.mass`` of all micro-batches makes them one big batch; of a term per batch, their mean by mass."""
    terms = [{"loss": "cross_entropy"}, {"loss": "dice", "per": per}]
    batch = make_batch("padded", 6)
    objective = objective_of(terms, normalize=normalize)
    logits = batch.logits.requires_grad_()
    lines = [{name: x[i : i + 1] for name, x in batch.inputs.items()} for i in range(len(logits))]
    masses = [objective.mass(batch.labels[i : i + 1], **line) for i, line in enumerate(lines)]
    parts = [
        objective.from_logits(logits[i : i + 1], batch.labels[i : i + 1], **line, num_items_in_batch=sum(masses)).loss
        for i, line in enumerate(lines)
    ]
    # A micro-batch is one document here, so that what is per batch is per document.
    both(
        sum(parts), naive_documents(batch, logits, [{**t, "per": "document"} for t in terms], POWERS[normalize]), logits
    )


def test_a_column_multiplies_and_does_not_divide():
    batch = make_batch("packed", 7)
    logits = batch.logits.requires_grad_()
    weights = torch.rand(int(batch.documents.max()) + 2, generator=torch.Generator().manual_seed(1)).double()
    result = batch.result(objective_of(MIX, normalize="examples"), logits, example_weights=weights[batch.documents])
    both(result.loss, naive_documents(batch, logits, MIX, 1, weights), logits)


def test_nothing_trained_is_a_connected_zero():
    batch = make_batch("padded", 8)
    logits = batch.logits.requires_grad_()
    loss = objective_of(MIX[:2], normalize="examples").from_logits(logits, torch.full_like(batch.labels, -100)).loss
    assert float(loss.detach()) == 0
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient.any()


def test_float32_stays_float32():
    batch = make_batch("padded", 9, dtype=torch.float32)
    for normalize in POWERS:
        objective = objective_of(MIX, normalize=normalize)
        for count in (None, torch.tensor(3.5, dtype=torch.float64)):
            result = batch.result(objective, num_items_in_batch=count)
            assert result.loss.dtype == torch.float32


# the key


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (3, "cv_loss.examples: must be a mapping such as {normalize: examples}, not 3"),
        ({}, "cv_loss.examples: must be a mapping such as {normalize: examples}, not {}"),
        ({"normalise": "examples"}, "cv_loss.examples.normalise: unknown field; did you mean normalize? allowed: "),
        (
            {"normalize": "rows"},
            "cv_loss.examples.normalize: must be one of tokens, examples, square_root, not 'rows'",
        ),
    ],
)
def test_mistakes_are_said(examples, message):
    with pytest.raises(ConfigError) as error:
        CVLossConfig.parse({"focal": 1.0, "examples": examples})
    assert str(error.value).startswith(message)


def test_the_papers_code_weighs_all_rows_alike():
    with pytest.raises(ConfigError, match=r"cv_loss\.reference: the paper's code weighs all rows alike"):
        CVLossConfig.parse({"focal": 1.0, "examples": {"normalize": "examples"}, "reference": True})


@pytest.mark.parametrize("examples", [{"normalize": "square_root"}])
def test_the_long_form_is_read_back(examples):
    config = CVLossConfig.parse({"focal": 1.0, "examples": examples})
    assert config.dump()["examples"].items() >= examples.items()
    assert CVLossConfig.parse(config.dump()) == config
    objective = Objective(config)
    assert objective.selectors[0] == COMPLETION
