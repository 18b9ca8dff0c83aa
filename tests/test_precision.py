"""float32 against float64: digits that the losses and the engine must not lose, whatever a processor rounds.

Tolerances are a number of roundings, each of half an epsilon.
"""

import pytest
import torch
from helpers import KNOWN

from axolotl_cvloss import Objective, available_losses
from axolotl_cvloss.engine.gradient import LogitGradient
from axolotl_cvloss.engine.numerics import log_one_minus_exp, one_minus_exp

EPS = torch.finfo(torch.float32).eps
NEITHER = {"gem", "sparsemax", "spherical_z"}  # take neither log p nor odds
TOKEN = [name for name, loss in available_losses().items() if loss.family == "token" and loss.built_in]
TOKEN = [name for name in TOKEN if name not in NEITHER]
# Their value depends on a common offset of the logits.
ABSOLUTE = {"squentropy", "z_regularized"}
OBJECTIVES = {
    **{name: name for name, loss in available_losses().items() if loss.built_in and name not in ABSOLUTE},
    "label smoothing": {"cross_entropy": {"weight": 1.0, "label_smoothing": 0.2}},
}
# A few of those that the kernels serve.
FUSED = [
    "cross_entropy",
    "label smoothing",
    "focal",
    "generalized_dice",
    "lovasz",
    "topk_cross_entropy",
    "number_token_mse",
]


def evaluate(key, logits, labels, head=False, **known):
    """``head``: the logits are the weight of a head under unit vectors, which the product leaves as they are."""
    leaf = logits.clone().requires_grad_()
    objective = Objective.from_config(key, **known)
    objective.diagnose = True
    given = {"shift": False, "reference_logps": -torch.linspace(0.1, 4, len(labels))}
    if head:
        result = objective.from_hidden(torch.eye(len(leaf)), leaf.T, labels, **given)
    else:
        result = objective.from_logits(leaf, labels, **given)
    return result, torch.autograd.grad(result.loss, leaf)[0]


@pytest.mark.parametrize("offset", [-1e4, 1e4])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_common_offset_of_the_logits_costs_no_digit(name, offset):
    check_offset(name, offset)


@pytest.mark.parametrize(("name", "offset"), [(name, (-1e4, 1e4)[i % 2]) for i, name in enumerate(FUSED)])
def test_a_common_offset_costs_the_kernels_no_digit(kernels_on, name, offset):
    check_offset(name, offset, head=True)


def check_offset(name, offset, head=False):
    """The logits are multiples of 2^-9, so that they have the same distances, exactly, around 1e4 and around 0."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(9, 12, generator=generator)).mul(512).round() / 512
    labels = torch.randint(0, 8, (9,), generator=generator)
    moved = logits + offset
    assert torch.equal(moved - offset, logits)
    exact, exact_gradient = evaluate(OBJECTIVES[name], logits.double(), labels, **KNOWN)
    found, gradient = evaluate(OBJECTIVES[name], moved, labels, head, **KNOWN)
    bound = 32 * EPS
    assert abs(found.loss - exact.loss) <= bound * (exact.loss.abs() + 1)
    assert (gradient - exact_gradient).abs().max() <= bound * (exact_gradient.abs().max() + 1e-3)
    assert abs(found.nll - exact.nll) <= bound * exact.nll
    for key, value in exact.diagnostics.items():
        assert abs(found.diagnostics[key] - value) <= bound * value


@pytest.mark.parametrize("function", [one_minus_exp, log_one_minus_exp])
def test_one_minus_exp_keeps_its_digits(function):
    x = -torch.logspace(-6.5, 1.4, 300)
    leaves = [x.to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64)]
    values = [function(leaf) for leaf in leaves]
    gradients = [torch.autograd.grad(v.sum(), leaf)[0] for v, leaf in zip(values, leaves, strict=True)]
    for found, exact in (values, gradients):
        torch.testing.assert_close(found.double(), exact, rtol=8 * EPS, atol=0)


@pytest.mark.parametrize("function", [one_minus_exp, log_one_minus_exp])
def test_one_minus_exp_at_its_ends(function):
    leaf = torch.tensor([0.0, -torch.inf], requires_grad=True)
    value = function(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    assert value[1] == (1 if function is one_minus_exp else 0)
    assert not value.isnan().any()
    assert gradient.isfinite().all()
    assert gradient[1] == 0


OTHERS = {"lse": 1.0, "vocab_size": 1000.0}  # what else a loss is given, where it is not a half
ODDS = ("tempered_odds", "own_tempered_odds")  # given in the place of log p


@pytest.mark.parametrize("name", TOKEN)
def test_losses_of_log_p_keep_their_digits(name):
    """From p = e^-25 to p = 1 - 1e-6; log p itself is given, and is exact in both."""
    loss = available_losses()[name]
    logp = -torch.logspace(-6, 1.4, 200)
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = next((name for name in ODDS if name in loss.statistics), "logp")
        x = logp if leaf == "logp" else log_one_minus_exp(logp.double()).sub(logp).float()
        x = x.to(dtype).requires_grad_()
        chosen = {s: None if s in loss.only_if else torch.full_like(x, OTHERS.get(s, 0.5)) for s in loss.statistics}
        chosen = {s: {"logp": logp.to(dtype), leaf: x}.get(s, chosen[s]) for s in loss.statistics}
        value = loss.function(**chosen, **loss.parameters().model_dump())
        found.append((value.detach().double(), torch.autograd.grad(value.sum(), x)[0].double()))
    (value, gradient), (exact, exact_gradient) = found
    p = logp.double().exp()
    # These add a constant of order 1 to what vanishes at p = 1, and all of it is the value.
    constant = float(name in ("brier", "encouraging", "ldam", "z_regularized"))
    assert ((value - exact).abs() <= 16 * EPS * (exact.abs() + constant)).all()
    # That of self_adjusting_dice is a difference of two parts of the size of p (1 - p), and 0 in between.
    assert ((gradient - exact_gradient).abs() <= 32 * EPS * (exact_gradient.abs() + p * (1 - p))).all()


@pytest.mark.parametrize("head", [False, True], ids=["PyTorch", "kernels"])
def test_lovasz_of_a_large_vocabulary_keeps_its_digits(head, request):
    """V = 300,000 and p near 1e-6; the derivative of 1 - p is p, which must not come out of a difference."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 300_000, generator=generator)
    labels = torch.tensor([5, 5, 7, 299_999, 8, 7])
    _, exact = evaluate("lovasz", logits.double(), labels)
    if head:
        request.getfixturevalue("kernels_on")
    _, gradient = evaluate("lovasz", logits, labels, head)
    rows = torch.arange(6)
    # A softmax of logits of about 5 and a sum over 3e5 of them: some tens of roundings.
    torch.testing.assert_close(gradient[rows, labels].double(), exact[rows, labels], rtol=64 * EPS, atol=0)


@pytest.mark.parametrize("extra", [{}, {"mean_logp": torch.tensor([0.25], dtype=torch.float64)}], ids=["plain", "mean"])
@pytest.mark.parametrize("logp", [-1e-6, -0.5, -14.0])
def test_the_gradient_at_the_target_keeps_its_digits(logp, extra):
    """a (1 - p) and l p are each formed from log p, and not as a - a p or as l - l (1 - p)."""
    for pull, rest in ((1.0, 0.0), (0.0, 1.0)):
        found = []
        for dtype in (torch.float32, torch.float64):
            x = torch.tensor([logp], dtype=torch.float32).to(dtype)
            cotangents = {"logp": torch.full_like(x, pull), "lse": torch.full_like(x, rest)}
            cotangents.update({name: values.to(dtype) for name, values in extra.items()})
            given = {"logp": x, "largest": x}
            found.append(LogitGradient.build(None, torch.tensor([0]), cotangents, [], given).own.double())
        torch.testing.assert_close(*found, rtol=8 * EPS, atol=0)
