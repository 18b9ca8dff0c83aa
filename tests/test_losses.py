"""Single losses where the laws do not reach: many tokens, long documents, packages that are not there."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import make_batch, temporary_losses
from naive import NAIVE

from axolotl_cvloss import Objective, available_losses, register_loss
from axolotl_cvloss.losses import row
from axolotl_cvloss.objective.config import ConfigError


def evaluate(key, logits, labels):
    leaf = logits.clone().requires_grad_()
    loss = Objective.from_config(key).from_logits(leaf, labels, shift=False).loss
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def test_each_says_what_it_is_and_when_to_take_it():
    for name, loss in available_losses().items():
        for field in ("summary", "formula", "source", "helps", "hurts"):
            assert getattr(loss, field), (name, field)


def test_sparsemax_where_more_logits_count_than_it_sorts_at_first():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3 * row.SORTED, generator=generator, dtype=torch.float64)
    logits[0] *= 1e-3  # nearly all of them are in the support
    labels = torch.tensor([5, 0, 7, 2])
    value, gradient = evaluate("sparsemax", logits, labels)
    assert int((gradient[0] != 0).sum()) > row.SORTED
    leaf = logits.clone().requires_grad_()
    wanted = NAIVE["sparsemax"](leaf, labels)
    torch.testing.assert_close(value, wanted.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, leaf)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 256, 10**9])
def test_direct_coverage_of_a_document_whose_probability_is_no_number(dtype, n):
    """Of 2,000 tokens, P is 0 in any float, and the loss is the sum of -log p less log n."""
    logits = torch.zeros(2000, 8, dtype=dtype)
    labels = torch.arange(2000) % 8
    value, gradient = evaluate({"direct_coverage": {"n": n}}, logits, labels)
    total, total_gradient = evaluate({"cross_entropy": 2000}, logits, labels)
    torch.testing.assert_close(value, total - math.log(n))
    torch.testing.assert_close(gradient, total_gradient)


def test_direct_coverage_is_smooth_where_its_forms_meet():
    """P from 1 down to e^-60, past the places at which another form takes over."""
    n, places = 256, [1e-9, 0.1, math.log(2), 0.7, 3.0, 20.0, 35.9 + math.log(256), 36.1 + math.log(256), 60.0]
    for x in places:
        # One row of two tokens, with log p = -x.
        logits = torch.tensor([[0.0, math.log(math.expm1(x)) if x < 30 else x]], dtype=torch.float64)
        value, gradient = evaluate({"direct_coverage": {"n": n}}, logits, torch.tensor([0]))
        p, wrong = math.exp(-x), -math.expm1(-x)
        missed = n * (math.log1p(-p) if p < 0.5 else math.log(wrong))
        wanted = -math.log1p(-math.exp(missed)) if missed < -0.5 else -math.log(-math.expm1(missed))
        assert float(value) == pytest.approx(wanted, rel=1e-12, abs=1e-30)
        factor = n * wrong ** (n - 1) * p / -math.expm1(missed)  # what the gradient of -log p is multiplied by
        assert float(gradient[0, 1]) == pytest.approx(factor * wrong, rel=1e-9, abs=1e-30)


def test_a_row_of_equal_logits_has_a_finite_gradient_under_spherical_z():
    _, gradient = evaluate("spherical_z", torch.full((1, 5), 3e4), torch.tensor([2]))
    assert gradient.abs().max() < 1e4


def test_a_loss_without_its_package_is_refused_before_anything_is_loaded(monkeypatch):
    with temporary_losses():

        @register_loss("needy", family="token", requires="a_package_that_nobody_has")
        def needy(logp):
            return -logp

        message = r"cv_loss\.needy: needy needs the package a_package_that_nobody_has, .* pip install a_package_that"
        with pytest.raises(ConfigError, match=message):
            Objective.from_config({"needy": 1.0})
    monkeypatch.setitem(sys.modules, "entmax", None)  # as if it were not installed
    with pytest.raises(
        ConfigError, match=r"cv_loss\.terms\[0\]: sparsemax needs the package entmax, .* install entmax"
    ):
        Objective.from_config({"terms": ["sparsemax"]})


def host_loss(function, batch, **parameters):
    leaf = batch.logits.clone().requires_grad_()
    loss = function(SimpleNamespace(logits=leaf), batch.labels.clone(), **parameters)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def test_dft_is_trls():
    trainer = pytest.importorskip("trl.trainer.sft_trainer", reason="trl is not installed")
    batch = make_batch("padded")
    leaf = batch.logits.clone().requires_grad_()
    result = batch.result(Objective.from_config("dft"), leaf)
    wanted = host_loss(trainer.dft_loss, batch)
    torch.testing.assert_close((result.loss.detach(), torch.autograd.grad(result.loss, leaf)[0]), wanted)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_entropy_adaptive_is_axolotls_over_the_largest_entropy(alpha):
    eaft = pytest.importorskip("axolotl.monkeypatch.loss.eaft", reason="axolotl is not installed")
    batch = make_batch("padded", dtype=torch.float32, vocab=40)
    leaf = batch.logits.clone().requires_grad_()
    result = batch.result(Objective.from_config({"entropy_adaptive": {"alpha": alpha}}), leaf)
    wanted = [x / math.log(20) ** alpha for x in host_loss(eaft.eaft_loss, batch, alpha=alpha)]
    torch.testing.assert_close([result.loss.detach(), torch.autograd.grad(result.loss, leaf)[0]], wanted)


@pytest.mark.parametrize("name", ["squentropy", "spherical_z"])
def test_a_token_that_is_ruled_out_is_as_if_it_were_not_there(name):
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 3])
    more = torch.cat([logits, torch.full((4, 2), -math.inf, dtype=torch.float64)], 1)
    value, gradient = evaluate(name, more, labels)
    wanted, wanted_gradient = evaluate(name, logits, labels)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(gradient[:, :7], wanted_gradient)
    assert (gradient[:, 7:] == 0).all()
