"""``examples``: what documents count by, against forms that go from document to document."""

import pytest
import torch
from helpers import KNOWN, make_batch, naive_documents, naive_weights, nlls
from test_inputs import EXACT

from axolotl_cvloss import Objective
from axolotl_cvloss.engine.examples import reweighted
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


# reweight and cvar

SHARES = {  # of the losses 1 to 5 at r = 1
    "linear": [0.0926, 0.1526, 0.2516, 0.2516, 0.2516],
    "quadratic": [0.1117, 0.2365, 0.3036, 0.2365, 0.1117],
    "extremes": [0.2793, 0.1694, 0.1027, 0.1694, 0.2793],
}
FIVE = torch.arange(1.0, 6.0, dtype=torch.float64)


@pytest.mark.parametrize("by", SHARES)
def test_the_weights_of_five_losses(by):
    found = reweighted(FIVE, torch.ones(5, dtype=torch.float64), by, 1.0)
    torch.testing.assert_close(found / 5, torch.tensor(SHARES[by], dtype=torch.float64), atol=5e-5, rtol=0)


WEIGHED = {
    **{by: {"reweight": {"by": by, "r": 0.7, "warmup": 0.0}} for by in SHARES},
    "worst half": {"cvar": {"share": 0.5}},
    "worst third": {"cvar": {"share": 0.3}},
    "smooth": {"cvar": {"share": 0.5, "reg": 0.05}},
    "very smooth": {"cvar": {"share": 0.2, "reg": 2.0}},
}


@pytest.mark.parametrize("kind", ["padded left", "packed"])
@pytest.mark.parametrize("normalize", POWERS)
@pytest.mark.parametrize("examples", WEIGHED.values(), ids=WEIGHED)
def test_documents_weigh_by_their_losses(examples, normalize, kind):
    """The value, and the gradient with weights that are constants; by mass their mean is 1."""
    batch = make_batch(kind, 10)
    logits = batch.logits.requires_grad_()
    result = batch.result(objective_of(MIX, normalize=normalize, **examples), logits)
    known = nlls(batch, logits)
    losses, sizes = (torch.tensor(x, dtype=torch.float64) for x in zip(*known.values(), strict=True))
    masses = sizes ** (1 - POWERS[normalize])
    weights = naive_weights(losses, masses, examples)
    of_each = dict(zip(known, weights.tolist(), strict=True))
    both(result.loss, naive_documents(batch, logits, MIX, POWERS[normalize], of_each), logits)
    torch.testing.assert_close(result.document_weights, weights * masses, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(float((weights * masses).sum()), float(masses.sum()))
    alike = batch.result(objective_of(MIX, normalize=normalize), logits)
    for other in (alike, batch.result(objective_of(MIX, normalize=normalize, **examples), logits, weigh=False)):
        assert float(other.loss.detach()) == pytest.approx(float(alike.loss.detach()), rel=1e-12)
        assert not torch.allclose(other.loss, result.loss)


def test_the_worst_share_goes_from_the_mean_to_the_largest():
    batch = make_batch("packed", 11)
    losses = [loss for loss, _ in nlls(batch, batch.logits).values()]
    for share, expected in ((1.0, sum(losses) / len(losses)), (1 / len(losses), max(losses)), (1e-3, max(losses))):
        for reg in (0.0, 1e-4):
            objective = objective_of([{"loss": "cross_entropy"}], cvar={"share": share, "reg": reg})
            found = float(batch.result(objective).loss)
            assert found == pytest.approx(expected, rel=1e-9), (share, reg)


def test_the_gradient_of_the_worst_share_is_that_of_the_mean_of_these_documents():
    batch = make_batch("padded", 12)
    logits = batch.logits.requires_grad_()
    losses = {d: loss for d, (loss, _) in nlls(batch, logits).items()}
    two = sorted(losses, key=losses.get)[-2:]
    loss = batch.result(objective_of([{"loss": "cross_entropy"}], cvar={"share": 2 / len(losses)}), logits).loss
    (found,) = torch.autograd.grad(loss, logits)

    def mean(x):
        rows = [(at, y, d) for at, y, d in batch.rows() if d in two]
        each = {d: [-x[at].log_softmax(-1)[y] for at, y, own in rows if own == d] for d in two}
        return sum(sum(values) / len(values) for values in each.values()) / 2

    (expected,) = torch.autograd.grad(mean(logits), logits)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("losses", [[2.0], [2.0, 2.0, 2.0], [0.0, 1e-300, 5.0]], ids=["one", "equal", "far"])
@pytest.mark.parametrize("examples", WEIGHED.values(), ids=WEIGHED)
def test_weights_at_the_edges(examples, losses):
    losses = torch.tensor(losses, dtype=torch.float64)
    found = objective_of(MIX, **examples).weights_of(losses, torch.ones_like(losses))
    assert found.isfinite().all()
    torch.testing.assert_close(float(found.mean()), 1.0)
    if losses[0] == losses[-1]:
        torch.testing.assert_close(found, torch.ones_like(found))


def test_warm_up_weighs_alike():
    batch = make_batch("padded", 13)
    objective = objective_of(MIX, reweight={"warmup": 0.5})
    before, after = (batch.result(objective, progress=p).loss for p in (0.49, 0.5))
    assert float(before) == pytest.approx(float(batch.result(objective_of(MIX, normalize="examples")).loss), rel=1e-12)
    assert float(after) != pytest.approx(float(before), rel=1e-3)


def test_known_weights_are_taken():
    batch = make_batch("packed", 14)
    logits = batch.logits.requires_grad_()
    documents = sorted({d for _, _, d in batch.rows()})
    weights = torch.rand(len(documents), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    objective = objective_of(MIX, cvar=True)
    loss = batch.result(objective, logits, document_weights=weights).loss
    both(loss, naive_documents(batch, logits, MIX, 1, dict(zip(documents, weights.tolist(), strict=True))), logits)
    with pytest.raises(ValueError, match=r"document_weights: of shape \(1,\); expected"):
        batch.result(objective, logits, document_weights=weights[:1])


def test_hidden_states_are_looked_at_in_chunks(monkeypatch):
    batch = make_batch("packed", 15)
    hidden = torch.randn(*batch.labels.shape, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    head = torch.nn.Linear(5, batch.logits.shape[-1], bias=False, dtype=torch.float64)
    monkeypatch.setattr("axolotl_cvloss.engine.batch.CHUNK_BYTES", {"cpu": 2 * batch.logits.shape[-1] * 8})
    hidden.requires_grad_()
    objective = objective_of(MIX, reweight={"warmup": 0})
    fused = objective.from_hidden(hidden, head, batch.labels, **batch.inputs).loss
    both(fused, batch.result(objective, head(hidden)).loss, hidden, head.weight)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({"reweight": True, "cvar": 0.5}, "cv_loss.examples: reweight and cvar are two weights of the same documents"),
        ({"look": "batch"}, "cv_loss.examples.look: there is nothing to look at without reweight or cvar"),
        ({"cvar": 1.5}, "cv_loss.examples.cvar.share: must be a finite number > 0 and <= 1, not 1.5"),
        ({"reweight": "hard"}, "cv_loss.examples.reweight.by: must be one of linear, quadratic, extremes, not 'hard'"),
        ({"reweight": {"r": 0}}, "cv_loss.examples.reweight.r: must be a finite number > 0, not 0"),
        ({"reweight": 3}, "cv_loss.examples.reweight: must be true, false, or a mapping such as {by: linear, "),
        ({"cvar": {"a": 0.5}}, "cv_loss.examples.cvar.a: unknown field; allowed: share, reg"),
        ({"cvar": True, "look": "epoch"}, "cv_loss.examples.look: must be one of step, batch, not 'epoch'"),
    ],
)
def test_mistakes_of_weights_are_said(examples, message):
    with pytest.raises(ConfigError) as error:
        CVLossConfig.parse({"focal": 1.0, "examples": examples})
    assert str(error.value).startswith(message)


def test_sets_of_many_documents_are_refused():
    for weights in ({"cvar": 0.5}, {"reweight": True}):
        with pytest.raises(ConfigError, match="a set of dice has many of them; allowed with it: per: document"):
            CVLossConfig.parse({"dice": {"per": "batch"}, "examples": weights})


def test_spellings():
    long = {"normalize": "examples", "look": "step"}
    for given, meant in (
        ({"cvar": True}, {**long, "cvar": {"share": 0.5, "reg": 0.0}}),
        ({"cvar": 0.2, "normalize": "tokens"}, {**long, "normalize": "tokens", "cvar": {"share": 0.2, "reg": 0.0}}),
        ({"reweight": True}, {**long, "reweight": {"by": "linear", "r": 0.4, "warmup": 0.1}}),
        (
            {"reweight": "extremes", "look": "batch"},
            {**long, "look": "batch", "reweight": {"by": "extremes", "r": 0.4, "warmup": 0.1}},
        ),
        ({"normalize": "square_root", "cvar": False}, {"normalize": "square_root"}),
    ):
        config = CVLossConfig.parse({"focal": 1.0, "examples": given})
        assert config.dump()["examples"] == meant
        assert CVLossConfig.parse(config.dump()) == config
