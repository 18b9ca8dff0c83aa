"""Single losses where the laws do not reach: many tokens, long documents, packages that are not there."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import make_batch, temporary_losses
from naive import NAIVE

from axolotl_cvloss import Objective, available_losses, register_loss
from axolotl_cvloss.engine.statistics import SORTED
from axolotl_cvloss.losses.registry import get_loss
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
    logits = torch.randn(4, 3 * SORTED, generator=generator, dtype=torch.float64)
    logits[0] *= 1e-3  # nearly all of them are in the support
    labels = torch.tensor([5, 0, 7, 2])
    value, gradient = evaluate("sparsemax", logits, labels)
    assert int((gradient[0] != 0).sum()) > SORTED
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


def test_a_loss_without_its_package_is_refused_before_anything_is_loaded():
    with temporary_losses():

        @register_loss("needy", family="token", requires="a_package_that_nobody_has")
        def needy(logp):
            return -logp

        message = r"cv_loss\.needy: needy needs the package a_package_that_nobody_has, .* pip install a_package_that"
        with pytest.raises(ConfigError, match=message):
            Objective.from_config({"needy": 1.0})
        message = message.replace(r"cv_loss\.needy", r"cv_loss\.terms\[0\]")
        with pytest.raises(ConfigError, match=message):
            Objective.from_config({"terms": ["needy"]})


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


# One loss in terms of another


LABELS = torch.tensor([0, 1, 2, 1, 5, 3])


def some_logits():
    return 2 * torch.randn(6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def on_some_rows(key, **known):
    leaf = some_logits().requires_grad_()
    loss = Objective.from_config(key, **known).from_logits(leaf, LABELS, shift=False).loss
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


EQUAL = {
    "thresholded at 0": ({"thresholded": {"threshold": 0.0}}, "cross_entropy"),
    "above and below": (
        {"terms": [{"loss": "thresholded", "threshold": 0.2, "keep": keep} for keep in ("above", "below")]},
        "cross_entropy",
    ),
    "tofu without gamma": ({"tofu": {"gamma": 0.0, "temperature": 1.0}}, "cross_entropy"),
    "sed nowhere": ({"sed": {"threshold": 0.0}}, "cross_entropy"),
    "sed without coefficient": ({"sed": {"coefficient": 0.0, "threshold": 2.0}}, "cross_entropy"),
    "sed and its largest k": ({"sed": {"k": 100}}, "cross_entropy"),
    "idft without exponent": ({"idft": {"low": 0.0, "high": 0.0}}, "cross_entropy"),
    "idft and a large beta": ({"idft": {"beta": 1e12}}, "dft"),
    "weighted_cross_entropy without power": ({"weighted_cross_entropy": {"power": 0.0}}, "cross_entropy"),
}


@pytest.mark.parametrize("case", EQUAL)
def test_is_another_loss(case):
    one, other = EQUAL[case]
    known = {"label_counts": torch.tensor([3, 1, 4])} if "weighted" in case else {}
    torch.testing.assert_close(on_some_rows(one, **known), on_some_rows(other))


def test_weighted_cross_entropy_of_tokens_as_frequent_as_each_other_is_cross_entropy():
    known = {"label_counts": torch.full((7,), 12)}
    torch.testing.assert_close(on_some_rows("weighted_cross_entropy", **known), on_some_rows("cross_entropy"))


@pytest.mark.parametrize("gamma", [0.5, 2.0, 3.0])
def test_tofu_at_temperature_1_has_the_gradient_of_focal(gamma):
    _, gradient = on_some_rows({"tofu": {"gamma": gamma, "temperature": 1.0}})
    torch.testing.assert_close(gradient, on_some_rows({"focal": {"gamma": gamma}})[1])


def test_tofu_without_gamma_is_cross_entropy_at_a_temperature():
    value, gradient = on_some_rows({"tofu": {"gamma": 0.0, "temperature": 1.7}})
    leaf = (some_logits() / 1.7).requires_grad_()
    wanted = torch.nn.functional.cross_entropy(leaf, LABELS)
    torch.testing.assert_close(value, 1.7 * wanted.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, leaf)[0])


def test_deft_is_gce_with_the_sum_of_squares_for_its_q():
    for logits, label in zip(some_logits().split(1), LABELS.split(1), strict=True):
        q = float((logits.softmax(1) ** 2).sum())
        torch.testing.assert_close(evaluate("deft", logits, label), evaluate({"gce": {"q": q}}, logits, label))


def test_deft_has_the_gradient_of_cross_entropy_with_the_weight_p_to_the_a():
    leaf = some_logits().requires_grad_()
    p = leaf.softmax(1)
    weight = p[torch.arange(6), LABELS] ** (p**2).sum(1)
    wanted = (-weight.detach() * leaf.log_softmax(1)[torch.arange(6), LABELS]).mean()
    torch.testing.assert_close(on_some_rows("deft")[1], torch.autograd.grad(wanted, leaf)[0])


def test_brier_is_0_at_the_target_and_2_at_another_token():
    sure = 1e3 * torch.nn.functional.one_hot(torch.tensor([0, 0]), 4).double()
    for label, wanted in ((0, 0.0), (2, 2.0)):
        value, gradient = evaluate("brier", sure, torch.tensor([label] * 2))
        assert value == wanted
        assert (gradient == 0).all()


def test_sed_above_1_pulls_on_every_row():
    value, _ = on_some_rows({"sed": {"threshold": 1.5, "coefficient": 3.0}})
    p = some_logits().softmax(1)[torch.arange(6), LABELS]
    torch.testing.assert_close(value, (-p.log() + 3 * (p - 0.5) ** 2).mean())


def test_unlikelihood_of_an_impossible_token_is_0_and_of_a_certain_one_finite():
    logits = torch.tensor([[0.0, -1e3], [-1e3, 0.0]])
    value, gradient = evaluate("unlikelihood", logits[:1], torch.tensor([1]))
    assert value == 0
    assert (gradient == 0).all()
    value, gradient = evaluate("unlikelihood", logits[:1], torch.tensor([0]))
    assert 80 < value < 100
    assert gradient.isfinite().all()


def with_reference(key, reference_logps, logits=None):
    leaf = (some_logits() if logits is None else logits).clone().requires_grad_()
    result = Objective.from_config(key).from_logits(leaf, LABELS, shift=False, reference_logps=reference_logps)
    return result.loss.detach(), torch.autograd.grad(result.loss, leaf)[0]


def own_logps():
    """Of the targets, under the model itself."""
    return some_logits().log_softmax(1)[torch.arange(6), LABELS]


def test_what_a_reference_changes_is_nothing_where_it_is_the_model_itself():
    for one, other in (("anchored", "dft"), ("prior_weighted", "dft"), ("importance_weighted", "cross_entropy")):
        value, gradient = with_reference(one, own_logps())
        wanted, wanted_gradient = on_some_rows(other)
        torch.testing.assert_close(value, wanted)
        torch.testing.assert_close(gradient, wanted_gradient)


def test_prior_weighted_by_a_reference_that_is_sure_is_cross_entropy():
    torch.testing.assert_close(with_reference("prior_weighted", torch.zeros(6)), on_some_rows("cross_entropy"))


def test_anchored_without_coefficient_is_dft():
    torch.testing.assert_close(
        with_reference({"anchored": {"coefficient": 0.0}}, -torch.rand(6, generator=torch.Generator().manual_seed(0))),
        on_some_rows("dft"),
    )


def test_the_anchor_has_the_derivative_1_minus_the_ratio_in_log_p():
    reference = torch.linspace(-5, -0.01, 6, dtype=torch.float64)
    anchored = get_loss("anchored").function
    logp = own_logps().requires_grad_()
    value = anchored(logp, reference, coefficient=1.0) - anchored(logp, reference, coefficient=0.0)
    (slope,) = torch.autograd.grad(value.sum(), logp)
    torch.testing.assert_close(slope, 1 - (reference - logp.detach()).exp())


def test_importance_weighted_weighs_each_document_by_its_mean_ratio_up_to_the_cap():
    """Packed: three documents of two rows, half, twice and a hundred times as likely as under the reference."""
    ratios = torch.tensor([0.5, 2.0, 100.0], dtype=torch.float64)
    reference = own_logps() - ratios.log().repeat_interleave(2) + torch.tensor([0.3, -0.3]).repeat(3)
    positions = torch.tensor([[0, 1] * 3])
    leaf = some_logits()[None].requires_grad_()
    given = {"shift": False, "position_ids": positions, "reference_logps": reference[None]}
    result = Objective.from_config("importance_weighted").from_logits(leaf, LABELS[None], **given)
    weights = torch.tensor([0.5, 2.0, 16.0], dtype=torch.float64).repeat_interleave(2)
    torch.testing.assert_close(result.loss.detach(), -(weights * own_logps()).mean())
    wanted = torch.autograd.grad(-(weights * leaf.log_softmax(2)[0, torch.arange(6), LABELS]).mean(), leaf)[0]
    torch.testing.assert_close(torch.autograd.grad(result.loss, leaf)[0], wanted)


@pytest.mark.parametrize("name", ["anchored", "prior_weighted", "importance_weighted"])
def test_a_loss_without_its_reference_says_so(name):
    with pytest.raises(ValueError, match=f"1 {name} needs reference_logps beside the labels"):
        on_some_rows(name)


@pytest.mark.parametrize("shape", [(1, 5), (6, 1), (12,)])
def test_a_reference_of_another_shape_says_so(shape):
    with pytest.raises(ValueError, match=r"cv_loss.reference_logps: of shape .* expected \(1, 6\), one a token"):
        with_reference("prior_weighted", torch.zeros(shape))


def test_the_number_of_a_token_counts_for_the_row_that_predicts_it():
    """With the shift, and the tokens of the prompt where a term looks at these too."""
    logits = torch.randn(1, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([[3, 1, 4, 2]])
    labels = tokens.clone()
    labels[0, 1] = -100
    p = torch.tensor([[0.9, 0.5, 0.25, 0.125]], dtype=torch.float64)
    logp = logits.log_softmax(2)[0, torch.arange(3), tokens[0, 1:]]
    for scope, rows in (("completion", [1, 2]), ("sequence", [0, 1, 2])):
        objective = Objective.from_config({"prior_weighted": {"scope": scope}})
        result = objective.from_logits(logits, labels, input_ids=tokens, reference_logps=p.log())
        torch.testing.assert_close(result.loss, -(p[0, 1:] * logp)[rows].mean())
