"""``where``: a term acts on the tokens that a column of the dataset names, and nothing else is changed by it."""

import pytest
import torch
from helpers import BATCHES, Batch, make_batch
from listed import LISTED, close, each_family, evaluate, groupings, naive, objective, term

from axolotl_cvloss import Objective
from axolotl_cvloss.objective.config import ConfigError, CVLossConfig

KINDS = list(BATCHES)
BY_ROW = [name for name, (_, family, _) in LISTED.items() if family in ("token", "row", "number")]


def column(batch, seed=0):
    """0 or 1 a token."""
    return torch.randint(0, 2, batch.labels.shape, generator=torch.Generator().manual_seed(seed))


@each_family(kind=KINDS)
def test_a_term_acts_where_its_column_is_1(listed_as, kind):
    batch = make_batch(kind)
    acts = column(batch)
    for fields in groupings(listed_as):
        one = term(listed_as, **fields)
        result, gradient = evaluate(batch, {**one, "where": "acts"}, columns={"acts": acts})
        value, expected = naive(batch, {**one, "where": acts})
        close(result.loss.detach(), value)
        close(gradient, expected)


@each_family(kind=["padded", "packed"])
def test_it_is_as_if_the_other_tokens_had_no_label(listed_as, kind):
    batch = make_batch(kind)
    acts = column(batch)
    result, gradient = evaluate(batch, {**term(listed_as), "where": "acts"}, columns={"acts": acts.bool()})
    without = Batch(batch.logits, batch.labels.where(acts == 1, -100), batch.documents, batch.inputs)
    same, expected = evaluate(without, term(listed_as))
    close(result.loss, same.loss)
    close(gradient, expected)
    (name,) = result.terms
    whole, _ = evaluate(batch, term(listed_as))
    assert result.counts[name] == same.counts[name] < whole.counts[name]
    assert result.nll == whole.nll
    assert result.n_tokens == whole.n_tokens


@pytest.mark.parametrize("listed_as", BY_ROW)
def test_a_column_and_its_complement_make_the_whole(listed_as):
    batch = make_batch("packed", 3)
    acts = column(batch)
    columns = {"some": acts, "others": 1 - acts}
    parts = [evaluate(batch, {**term(listed_as), "where": name}, columns=columns)[0] for name in columns]
    whole, _ = evaluate(batch, term(listed_as))
    (name,) = whole.terms
    total = sum(part.terms[name] * part.counts[name] for part in parts)
    close(total, whole.terms[name] * whole.counts[name])


def test_other_terms_do_not_know_of_it():
    batch = make_batch("packed")
    acts = column(batch)
    terms = [
        {"loss": "cross_entropy", "weight": 0.5, "where": "good"},
        {"loss": "unlikelihood", "weight": 0.3, "where": "bad"},
        {"loss": "dice", "weight": 0.2, "scope": "sequence", "where": "bad"},
        {"loss": "lovasz", "weight": 0.4},
    ]
    result, gradient = evaluate(batch, *terms, columns={"good": 1 - acts, "bad": acts})
    columns = {"good": 1 - acts, "bad": acts, None: None}
    value, expected = naive(batch, *({**one, "where": columns[one.get("where")]} for one in terms))
    close(result.loss.detach(), value)
    close(gradient, expected)


@each_family(kind=["padded", "packed"])
def test_micro_batches_with_a_common_count_are_one_big_batch(listed_as, kind):
    batch = make_batch(kind, 12)
    acts = column(batch)
    one = {**term(listed_as), "where": "acts"}
    big, big_gradient = evaluate(batch, one, columns={"acts": acts})
    made = objective(one)
    rows = made.select_rows(batch.labels, columns={"acts": acts}, **batch.inputs)
    counts = {selector: int(mask.sum()) for selector, mask in rows.scopes.items()}
    found = []
    for i in range(len(batch.labels)):
        inputs = {name: x[i : i + 1] for name, x in batch.inputs.items()}
        part = Batch(batch.logits[i : i + 1], batch.labels[i : i + 1], batch.documents[i : i + 1], inputs)
        found.append(evaluate(part, one, columns={"acts": acts[i : i + 1]}, num_items_in_batch=counts))
    close(sum(result.loss for result, _ in found), big.loss, 1e-12)
    close(torch.cat([gradient for _, gradient in found]), big_gradient, 1e-12)


@pytest.mark.parametrize("where", [[1, 0, 1], [0, 0, 0]])
def test_a_number_an_example_is_that_of_its_tokens(where):
    batch = make_batch("padded")
    examples = torch.tensor(where)
    one = {"loss": "dice", "where": "acts"}
    result, gradient = evaluate(batch, one, columns={"acts": examples})
    tokens = examples[:, None].expand(batch.labels.shape)
    same, expected = evaluate(batch, one, columns={"acts": tokens})
    close(result.loss, same.loss)
    close(gradient, expected)
    assert not gradient[examples == 0].any()
    assert result.loss.isfinite()


def test_weights_of_examples_by_name():
    batch = make_batch("packed")
    weights = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(2))
    result = batch.result(
        Objective.from_config({"focal": 1.0, "example_weights": "importance"}), columns={"importance": weights}
    )
    close(result.loss, batch.result(Objective.from_config("focal"), example_weights=weights).loss)


def test_mistakes():
    labels = torch.zeros(2, 4, dtype=torch.long)
    acting = Objective.from_config({"focal": {"where": "acts"}})
    for columns, message in [
        ({}, r"cv_loss\.where: the batch has no column acts; give it in columns beside the labels"),
        (
            {"acts": torch.ones(3)},
            r"cv_loss\.where: acts: of shape \(3,\); expected \(2,\), one an example, or \(2, 4\)",
        ),
        ({"acts": torch.full((2, 4), 0.5)}, r"cv_loss\.where: acts has 0\.5; .* allowed are 0 and 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            acting.from_logits(torch.randn(2, 4, 7), labels, columns=columns)
    with pytest.raises(ConfigError, match=r"cv_loss\.focal\.where: must be a text, not 1"):
        CVLossConfig.parse({"focal": {"where": 1}})
    with pytest.raises(ConfigError, match="knows no where; leave it out of focal"):
        CVLossConfig.parse({"focal": {"where": "acts"}, "reference": True})
    config = CVLossConfig.parse({"focal": {"where": "acts"}, "dice": 1.0, "example_weights": "w"})
    assert [term.get("where") for term in config.dump()["terms"]] == ["acts", None]
    assert (
        CVLossConfig.parse(config.dump()).columns
        == config.columns
        == {
            "acts": "cv_loss.focal.where",
            "w": "cv_loss.example_weights",
        }
    )
