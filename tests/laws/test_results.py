"""What a result says, and what may be done with it: with and without gradients, and once."""

import pytest
import torch
from helpers import make_batch
from listed import MIXTURE, close, each_family, evaluate, naive, objective, term

from axolotl_cvloss import Objective


def test_terms_nll_and_counts():
    batch = make_batch("packed", 16)
    completion, sequence = len(batch.rows()), len(batch.rows("sequence"))
    assert completion < sequence
    terms = [
        {"loss": "focal", "weight": 0.5},
        {"loss": "cross_entropy", "scope": "sequence", "weight": 2.0},
        {"loss": "focal", "gamma": 5.0},
        {"loss": "lovasz", "weight": 0.0},
        {"loss": "focal", "scope": "sequence"},
    ]
    for count in (None, 1000):  # the step's count divides the loss, and not what is reported
        leaf = batch.logits.clone().requires_grad_()
        result = batch.result(objective(*terms), leaf, num_items_in_batch=count)
        assert list(result.terms) == ["focal", "cross_entropy", "focal_2", "lovasz", "focal_3"]
        assert result.n_tokens == completion
        assert result.counts == {
            "focal": completion, "cross_entropy": sequence, "focal_2": completion, "lovasz": completion,
            "focal_3": sequence,
        }  # fmt: skip
        for one, value in zip(terms, result.terms.values(), strict=True):
            close(value, naive(batch, {**one, "weight": 1.0})[0])
            assert not value.requires_grad
        close(result.nll, naive(batch, {"loss": "cross_entropy"})[0])
        assert not result.nll.requires_grad
        assert result.loss.requires_grad
        assert isinstance(result.n_tokens, int)


def test_what_is_reported_does_not_follow_the_loss():
    batch = make_batch("padded", 16)
    result = batch.result(objective({"loss": "cross_entropy"}), batch.logits.clone().requires_grad_())
    before = result.nll.clone()
    result.loss *= 100  # in place, as Trainer does
    assert torch.equal(result.nll, before)
    assert torch.equal(result.terms["cross_entropy"], before)


@each_family("mixture", "reference")
def test_without_gradients_the_value_is_the_same(listed_as):
    batch = make_batch("packed", 17)
    terms = MIXTURE if listed_as in ("mixture", "reference") else [term(listed_as)]
    if listed_as == "reference":  # which has sets of its own
        terms = [{key: value for key, value in t.items() if key != "per"} for t in terms]
    one = objective(*terms, reference=listed_as == "reference")
    leaf = batch.logits.clone().requires_grad_()
    wanted = batch.result(one, leaf)
    without = [batch.result(one)]  # logits that want no gradient
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            without.append(batch.result(one, leaf))
    for result in without:
        assert not result.loss.requires_grad
        assert torch.equal(result.loss, wanted.loss)
        assert torch.equal(result.nll, wanted.nll)
        assert result.terms == wanted.terms
    assert leaf.grad is None


def test_an_objective_can_be_printed():
    one = Objective.from_config({"cross_entropy": 0.6, "lovasz": 0.4})
    assert str(one) == "0.6 cross_entropy + 0.4 lovasz"
    assert str(objective({"loss": "focal"}, reference=True)) == "1 focal (the paper's code)"
    assert repr(one) == f"Objective({one.config.dump()})"


@each_family("mixture")
def test_a_second_backward_says_so(listed_as):
    batch = make_batch("padded", 18)
    terms = MIXTURE if listed_as == "mixture" else [term(listed_as)]
    loss = batch.result(objective(*terms), batch.logits.clone().requires_grad_()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(
        RuntimeError, match="backward of a cv_loss objective was called twice; compute the objective anew"
    ):
        loss.backward()


@each_family("mixture")
def test_a_double_backward_says_so(listed_as):
    batch = make_batch("padded", 18)
    terms = MIXTURE if listed_as == "mixture" else [term(listed_as)]
    leaf = batch.logits.clone().requires_grad_()
    loss = batch.result(objective(*terms), leaf).loss

    def penalise():  # must not be left out silently
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (leaf.sum() + gradient.pow(2).sum()).backward()

    with pytest.raises(RuntimeError, match=r"twice|second"):
        penalise()


def test_objectives_share_nothing():
    """Two results at a time, their gradients summed in the logits."""
    batch = make_batch("padded", 18)
    leaf = batch.logits.clone().requires_grad_()
    one = objective(*MIXTURE)
    a, b = batch.result(one, leaf), batch.result(one, leaf)
    (a.loss + 2 * b.loss).backward()
    close(leaf.grad, 3 * evaluate(batch, *MIXTURE)[1], 1e-12)
