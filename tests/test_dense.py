"""Losses written the plain way on all logits of a set (family dense)."""

import pytest
import torch
from helpers import BATCHES, make_batch, naive_loss, temporary_losses
from naive import NAIVE

from axolotl_cvloss import Objective, register_loss
from axolotl_cvloss.objective.config import ConfigError


@pytest.fixture(scope="module", autouse=True)
def _strangers():
    with temporary_losses(), pytest.MonkeyPatch.context() as patch:

        @register_loss("plain_dice", family="dense")
        def plain_dice(probabilities, labels, smooth: float = 1.0):
            present = labels.unique()
            target = (labels[:, None] == present).to(probabilities.dtype)
            p = probabilities[:, present]
            return (1 - (2 * (p * target).sum(0) + smooth) / (p.sum(0) + target.sum(0) + smooth)).mean()

        @register_loss("plain_cross_entropy", family="dense")
        def plain_cross_entropy(logits, labels):
            return torch.nn.functional.cross_entropy(logits, labels, reduction="none")

        @register_loss("plain_mistake", family="dense")
        def plain_mistake(logits, labels):
            return logits

        patch.setitem(NAIVE, "plain_dice", NAIVE["dice"])
        patch.setitem(NAIVE, "plain_cross_entropy", NAIVE["cross_entropy"])
        yield


MIXES = {
    "alone": [{"loss": "plain_dice", "smooth": 0.5}],
    "one value a row": [{"loss": "plain_cross_entropy", "weight": 0.3, "scope": "sequence"}],
    "beside others": [
        {"loss": "plain_dice", "weight": 0.4, "per": "batch"},
        {"loss": "lovasz", "weight": 0.2},
        {"loss": "plain_cross_entropy", "weight": 0.4},
    ],
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", [kind for kind in BATCHES if kind != "rows"])
def test_value_and_gradient_are_those_of_the_formula(kind, mix):
    batch, terms = make_batch(kind), MIXES[mix]
    ours, theirs = (batch.logits.clone().requires_grad_() for _ in range(2))
    result = batch.result(Objective.from_config({"terms": terms}), ours)
    expected = naive_loss(batch, theirs, terms)
    torch.testing.assert_close(result.loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, leaf)[0] for x, leaf in ((result.loss, ours), (expected, theirs))),
        rtol=1e-9,
        atol=1e-12,
    )
    torch.testing.assert_close(result.nll, NAIVE["cross_entropy"](*_completion(batch)), rtol=1e-9, atol=0)


def _completion(batch):
    places, targets, _ = zip(*batch.rows(), strict=True)
    logits = batch.logits.view(*torch.atleast_2d(batch.labels).shape, -1)
    return torch.stack([logits[at] for at in places]), torch.tensor(targets)


def test_no_trained_row_is_a_connected_zero():
    logits = torch.randn(2, 4, 7, requires_grad=True)
    result = Objective.from_config("plain_dice").from_logits(logits, torch.full((2, 4), -100))
    result.loss.backward()
    assert result.loss == 0
    assert (logits.grad == 0).all()


def test_low_precision_is_computed_in_float32():
    batch = make_batch("padded", dtype=torch.bfloat16)
    terms = [{"loss": "plain_dice"}]
    expected = naive_loss(batch.to(torch.float32), batch.logits.float(), terms)
    torch.testing.assert_close(batch.result(Objective.from_config({"terms": terms})).loss, expected)


def test_hidden_states_are_refused():
    with pytest.raises(ValueError, match="family dense needs logits"):
        Objective.from_config("plain_dice").from_hidden(torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ({"plain_dice": 1.0, "head": "fused"}, "cv_loss.head: plain_dice is written on full logits"),
        ({"plain_dice": {"per": "batch", "reduce": "global"}}, "cv_loss.reduce: plain_dice is written on full logits"),
    ],
)
def test_what_cannot_work_is_refused(key, message):
    with pytest.raises(ConfigError, match=message):
        Objective.from_config(key)


def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"'plain_mistake' must return a scalar or one value a row, shape \(3,\)"):
        Objective.from_config("plain_mistake").from_logits(torch.randn(3, 7), torch.tensor([0, 1, 2]), shift=False)
