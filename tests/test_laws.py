"""One list of losses, many laws. Every loss that is registered is in the list; its naive version is in naive.py."""

import itertools
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import BATCHES, IGNORE, KNOWN, NUMBER_LOSSES, VOCAB, Batch, make_batch, naive_loss, temporary_losses
from naive import NAIVE, NUMBERS, set_loss

from axolotl_cvloss import Objective, available_losses, register_loss
from axolotl_cvloss.engine import compute

GOLDEN = Path(
    os.environ.get("CVLOSS_GOLDEN") or Path(__file__).resolve().parents[1] / "../shared/golden/reference_losses.npz"
)

# The list. A loss with parameters has variants: at least one, away from its defaults.
VARIANTS = {
    "cross_entropy": [{"label_smoothing": 0.1}],
    "focal": [{"gamma": 0.0}, {"gamma": 0.5, "alpha": 0.25}, {"gamma": 5.0}],
    "self_adjusting_dice": [{"detach_weight": True}, {"alpha": 0.0}, {"alpha": 0.5, "smooth": 0.1}],
    "generalized_dice": [{"smooth": 1.0}, {"smooth": 0.0}],
    "dice": [{"smooth": 0.0}],
    "jaccard": [{"smooth": 0.0}],
    "tversky": [{"alpha": 0.9, "beta": 0.1, "smooth": 0.5}],
    "lovasz": [],  # its one parameter, tolerance, has a law of its own
    "focal_tversky": [{"gamma": 2.0, "alpha": 0.6, "beta": 0.4, "smooth": 0.0}],
    "log_cosh_dice": [{"smooth": 0.0}],
    "unified_focal": [{"focal_weight": 0.3, "delta": 0.8, "gamma": 0.75, "smooth": 0.0}, {"gamma": 1.0}],
    "poly": [{"epsilon": -1.0}],
    "gce": [{"q": 1.0}, {"q": 1e-3}],
    "encouraging": [{"log_end": 0.25}, {"log_end": 0.0}],
    "dft": [{"beta": 0.5}],
    "z_regularized": [{"coefficient": 0.1}],
    "topk_cross_entropy": [{"k": 0.5}],
    "direct_coverage": [{"n": 1}, {"n": 10}],
    "asymmetric": [{"gamma_positive": 0.5, "gamma_negative": 0.5}, {"gamma_negative": 0.0}, {"label_smoothing": 0.0}],
    "squentropy": [{"coefficient": 0.01}],
    "spherical_z": [{"slope": 0.3, "offset": 2.0}],
    "ldr": [{"temperature": 0.5, "margin": 2.0}, {"temperature": 3.0}],
    "entropy_adaptive": [{"k": 3, "alpha": 2.0}, {"alpha": 0.0}],
    "confidence_penalty": [{"coefficient": 1.0}],
    "gem": [{"beta": 0.3}, {"beta": 1.0}],
    "ldam": [{"max_margin": 2.0}],
    "number_token_wasserstein": [],  # their one parameter says which rows they look at, and has a test of its own
    "number_token_mse": [],
}
# Their gradient is not that of their value, on purpose.
DETACHED = [
    "self_adjusting_dice detach_weight=True",
    "dft",
    "dft beta=0.5",
    "entropy_adaptive",
    "entropy_adaptive k=3 alpha=2.0",
    "gem",
    "gem beta=0.3",
    "gem beta=1.0",
]
# A certain and right prediction is not their minimum, and by their formula it need not be.
PERFECT_IS_NOT_BEST = [
    "cross_entropy label_smoothing=0.1",
    "self_adjusting_dice",  # (1 - p)^alpha p falls again above p = 1 / (1 + alpha)
    "self_adjusting_dice alpha=0.5 smooth=0.1",
    "self_adjusting_dice detach_weight=True",
    "z_regularized",  # these two would have the logits near 0 too
    "z_regularized coefficient=0.1",
    "asymmetric gamma_negative=0.0",  # label smoothing in full
    "asymmetric gamma_positive=0.5 gamma_negative=0.5",
    "confidence_penalty",  # which asks for entropy
    "confidence_penalty coefficient=1.0",
    "sparsemax",  # 0, its minimum, from a margin of 1 on, and so at predictions that are less than perfect
    "direct_coverage",  # 0 to rounding as soon as 256 answers are sure to have a right one
    "gem",  # its gradient leads there, but q is taken for a constant and the value may be below 0 elsewhere
    "gem beta=0.3",
    "gem beta=1.0",
    "a_row_loss",
]
# An impossible token (logit -inf) makes their value infinite, as their formula says.
NOT_WITH_IMPOSSIBLE_TOKENS = [
    "cross_entropy label_smoothing=0.1",
    "asymmetric gamma_negative=0.0",  # the same loss
    "squentropy",  # all logits are squared
    "squentropy coefficient=0.01",
    "spherical_z",  # their mean is infinite
    "spherical_z slope=0.3 offset=2.0",
    "a_row_loss",
]

# They look at the rows whose label is a number, and at the logits of numbers.

# Losses of a stranger, so that the laws hold for each family and each statistic whatever is built in.
STRANGERS = ("a_row_loss", "a_document_loss", "a_region_loss", "a_set_loss")


@pytest.fixture(scope="module", autouse=True)
def _strangers():
    with temporary_losses(), pytest.MonkeyPatch.context() as patch:

        @register_loss("a_row_loss", family="row")
        def a_row_loss(logits, labels, coefficient: float = 1.0):
            target = logits.gather(1, labels[:, None]).squeeze(1)
            squares = (logits**2).sum(1) - target**2
            return logits.logsumexp(1) - target + coefficient * squares / (logits.shape[1] - 1)

        @register_loss("a_document_loss", family="document")
        def a_document_loss(logp, power: float = 2.0):
            return 1 - (power * logp.mean()).exp()

        @register_loss("a_region_loss", family="region")
        def a_region_loss(intersection, predicted, labelled, smooth: float = 1.0):
            return 1 - (2 * intersection + smooth) / (predicted + labelled + smooth)

        @register_loss("a_set_loss", family="region")
        def a_set_loss(intersection, predicted, labelled, smooth: float = 1.0):
            return (1 - (2 * intersection + smooth) / (predicted + labelled + smooth)).mean().cosh().log()

        for name, same in zip(STRANGERS, ("squentropy", "cross_entropy", "dice", "log_cosh_dice"), strict=True):
            patch.setitem(NAIVE, name, NAIVE[same])

        def naive_document_loss(z, y):
            return 1 - NAIVE["cross_entropy"](z, y).mul(-2).exp()

        naive_document_loss.__name__ = "a_document_loss"
        set_loss(naive_document_loss)
        yield


def listed():
    for name, loss in available_losses().items():
        yield name, loss.family, {}
        for parameters in VARIANTS.get(name, []):
            yield name, loss.family, parameters
    for name, family in zip(STRANGERS, ("row", "document", "region", "region"), strict=True):
        yield name, family, {}


LISTED = {" ".join([n, *(f"{k}={v}" for k, v in p.items())]): (n, f, p) for n, f, p in listed()}
every_loss = pytest.mark.parametrize("listed_as", LISTED)


def term(listed_as, **fields):
    name, _, parameters = LISTED[listed_as]
    return {"loss": name, **parameters, **fields}


def groupings(listed_as):
    """What one set may be: nothing to choose for a loss without sets."""
    has_sets = LISTED[listed_as][1] in ("region", "ranking", "document")
    return [{"per": "document"}, {"per": "batch"}] if has_sets else [{}]


MIXTURE = [
    {"loss": "cross_entropy", "weight": 0.6, "scope": "sequence"},
    {"loss": "focal", "weight": 0.3},
    {"loss": "lovasz", "weight": 0.4},
    {"loss": "generalized_dice", "weight": 0.5, "per": "batch"},
]
# One of every family, for the engine to serve at once; not for the paper's code.
FAMILIES = [
    *MIXTURE,
    {"loss": "unified_focal", "weight": 0.3, "scope": "sequence"},
    {"loss": "a_row_loss", "weight": 0.2},
    {"loss": "a_document_loss", "weight": 0.7},
    {"loss": "number_token_mse", "weight": 0.1},
]


def objective(*terms, **options):
    return Objective.from_config({"terms": list(terms), **options}, **KNOWN)


def counted(listed_as, completion, numbers=None):
    """The rows of a step, for num_items_in_batch, where the loss looks at the numbers alone too."""
    (one,) = objective(term(listed_as)).terms
    return {"completion": completion, one.scope: completion if numbers is None else numbers}


def evaluate(batch, *terms, logits=None, **more):
    """The result of a batch, and the gradient of its logits."""
    leaf = (batch.logits if logits is None else logits).clone().requires_grad_()
    result = batch.result(objective(*terms), leaf, **more)
    return result, torch.autograd.grad(result.loss, leaf)[0]


def naive(batch, *terms):
    leaf = batch.logits.clone().requires_grad_()
    loss = naive_loss(batch, leaf, terms)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# The list itself


def test_every_loss_has_a_naive_version_and_variants():
    for name, loss in available_losses().items():
        assert name in NAIVE, f"write {name} into naive.py, from its formula and without looking at the package"
        if name not in STRANGERS:
            assert name in VARIANTS or not loss.parameters.model_fields, f"add variants of {name} to VARIANTS"


# The definition


@pytest.mark.parametrize("kind", BATCHES)
@every_loss
def test_equals_the_naive_version(listed_as, kind):
    batch = make_batch(kind, seed=len(listed_as))
    for grouping in groupings(listed_as):
        wanted, wanted_gradient = naive(batch, term(listed_as, **grouping))
        result, gradient = evaluate(batch, term(listed_as, **grouping))
        close(result.loss.detach(), wanted)
        close(gradient, wanted_gradient)


@pytest.mark.parametrize("kind", [kind for kind in BATCHES if kind != "rows"])
def test_a_mixture_of_all_families_over_two_scopes_equals_the_naive_versions(kind):
    for seed in range(3):
        batch = make_batch(kind, seed)
        wanted, wanted_gradient = naive(batch, *FAMILIES)
        result, gradient = evaluate(batch, *FAMILIES)
        close(result.loss.detach(), wanted)
        close(gradient, wanted_gradient)
        for one, value in zip(FAMILIES, result.terms.values(), strict=True):
            close(value, naive(batch, {**one, "weight": 1.0})[0])


class Recomputed(torch.autograd.Function):
    """Computes the objective anew in the backward pass, as an objective allows one backward alone."""

    @staticmethod
    def forward(ctx, logits, loss):
        ctx.save_for_backward(logits)
        ctx.loss = loss
        return loss(logits.detach()).clone()

    @staticmethod
    def backward(ctx, grad_output):
        leaf = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            return grad_output * torch.autograd.grad(ctx.loss(leaf), leaf)[0], None


@pytest.mark.parametrize("listed_as", [name for name in LISTED if name not in DETACHED])
def test_gradient_is_that_of_the_value(listed_as):
    logits = make_batch("rows", 1, vocab=5).logits[:6]
    labels = torch.tensor([0, 2, 1, IGNORE, 0, 2])
    for grouping in groupings(listed_as):
        one = objective(term(listed_as, **grouping))
        torch.autograd.gradcheck(
            lambda z: Recomputed.apply(z, lambda x: one.from_logits(x, labels, shift=False).loss),  # noqa: B023
            (logits.requires_grad_(),),
        )


# What does not matter


@pytest.mark.parametrize("kind", BATCHES)
@every_loss
def test_ignored_rows_change_nothing(listed_as, kind):
    batch = make_batch(kind, 3)
    unused = batch.unused()
    assert unused.any()
    for grouping in groupings(listed_as):
        result, gradient = evaluate(batch, term(listed_as, **grouping))
        assert (gradient[unused] == 0).all()
        for noise in (50.0, float("nan")):
            changed = batch.logits.clone()
            changed[unused] = noise * torch.randn(int(unused.sum()), VOCAB, dtype=torch.float64)
            other, other_gradient = evaluate(batch, term(listed_as, **grouping), logits=changed)
            assert torch.equal(other.loss, result.loss)
            assert torch.equal(other_gradient, gradient)
            assert torch.equal(other.nll, result.nll)


@every_loss
def test_a_neighbouring_document_changes_nothing(listed_as):
    """Packed: the gradient of a document is the same beside any neighbour, and alone."""
    batch = make_batch("packed", 4)
    document = int(batch.documents[0, 7])
    mine = batch.documents == document
    alone = Batch(batch.logits[mine][None], batch.labels[mine][None], batch.documents[mine][None])
    count = counted(listed_as, 20)
    _, wanted = evaluate(alone, term(listed_as), num_items_in_batch=count)

    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        logits, labels = batch.logits.clone(), batch.labels.clone()
        logits[~mine] = torch.randn(int((~mine).sum()), VOCAB, generator=generator, dtype=torch.float64)
        labels[~mine] = torch.randint(0, VOCAB, (int((~mine).sum()),), generator=generator)
        _, gradient = evaluate(replace(batch, labels=labels), term(listed_as), logits=logits, num_items_in_batch=count)
        close(gradient[mine], wanted[0], 1e-12)

    # The neighbours masked, their logits count nowhere.
    labels = batch.labels.where(mine, IGNORE)
    value, gradient = evaluate(replace(batch, labels=labels), term(listed_as), logits=logits)
    close(value.loss, evaluate(alone, term(listed_as))[0].loss, 1e-12)
    assert (gradient[~mine] == 0).all()


@every_loss
def test_the_order_of_rows_and_documents_changes_nothing(listed_as):
    lengths = [4, 2, 5]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    batch = make_batch("rows", 5)
    n = sum(lengths)
    batch = Batch(batch.logits[None, :n], batch.labels[None, :n], None, {"shift": False, "position_ids": position_ids})
    parts = torch.arange(n).split(lengths)
    generator = torch.Generator().manual_seed(0)
    shuffled = [part[torch.randperm(len(part), generator=generator)] for part in parts]
    for grouping in groupings(listed_as):
        result, gradient = evaluate(batch, term(listed_as, **grouping))
        for order in ([0, 1, 2], [2, 0, 1]):
            rows = torch.cat([shuffled[i] for i in order])
            positions = torch.cat([torch.arange(lengths[i]) for i in order])[None]
            moved = Batch(
                batch.logits[:, rows], batch.labels[:, rows], None, {"shift": False, "position_ids": positions}
            )
            other, other_gradient = evaluate(moved, term(listed_as, **grouping))
            close(other.loss, result.loss, 1e-12)
            close(other_gradient, gradient[:, rows], 1e-12)


@pytest.mark.parametrize("listed_as", [*LISTED, "mixture"])
def test_the_size_of_a_chunk_changes_nothing(listed_as, monkeypatch):
    for kind in ("packed", "padded"):
        batch = make_batch(kind, 6)
        terms = FAMILIES if listed_as == "mixture" else [term(listed_as)]
        n = len(batch.rows("sequence" if listed_as == "mixture" else "completion"))
        found = []
        for rows in (1, 5, n - 1, n, n + 100):
            monkeypatch.setitem(compute.CHUNK_BYTES, "cpu", rows * VOCAB * 8)
            result, gradient = evaluate(batch, *terms)
            found.append((result.loss, gradient, result.nll))
        for other in found[:-1]:
            for a, b in zip(other, found[-1], strict=True):
                close(a, b, 1e-12)


def test_logits_need_not_be_contiguous():
    batch = make_batch("padded", 7)
    wanted, wanted_gradient = evaluate(batch, *MIXTURE)
    for permuted in ((1, 0, 2), (2, 0, 1), (0, 2, 1)):
        back = [permuted.index(i) for i in range(3)]
        logits = batch.logits.permute(permuted).contiguous().permute(back)
        assert not logits.is_contiguous()
        leaf = logits.detach().requires_grad_()
        result = batch.result(objective(*MIXTURE), leaf)
        result.loss.backward()
        assert torch.equal(result.loss, wanted.loss)
        assert torch.equal(leaf.grad, wanted_gradient)


# Edges


def certain(labels, confidence, vocab=VOCAB):
    """Logits that are right about every label, with this difference to all others."""
    return confidence * torch.nn.functional.one_hot(labels.clamp_min(0), vocab).double()


@pytest.mark.parametrize("listed_as", [name for name in LISTED if name not in PERFECT_IS_NOT_BEST])
def test_a_perfect_prediction_is_the_minimum(listed_as):
    batch = make_batch("rows", 8)
    best = evaluate(batch, term(listed_as), logits=certain(batch.labels, 60.0))[0].loss
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        logits = certain(batch.labels, 0.3 * seed) + torch.randn(batch.logits.shape, generator=generator)
        assert evaluate(batch, term(listed_as), logits=logits)[0].loss > best


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("listed_as", [*LISTED, "mixture"])
def test_nothing_to_train_is_a_connected_zero(listed_as, kind):
    batch = make_batch(kind, 9)
    terms = [MIXTURE[1], MIXTURE[2]] if listed_as == "mixture" else [term(listed_as)]
    batch.labels.fill_(IGNORE)
    for count in (None, 17, torch.tensor(17)):
        leaf = batch.logits.clone().requires_grad_()
        result = batch.result(objective(*terms), leaf, num_items_in_batch=count)
        result.loss.backward()
        assert result.loss == 0
        assert result.n_tokens == 0
        assert (leaf.grad == 0).all()
        assert all(value == 0 for value in [*result.terms.values(), result.nll])


@pytest.mark.parametrize("shape", [(0,), (2, 0), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"reference": True}], ids=["default", "reference"])
def test_no_rows_at_all(shape, options):
    """Such as a batch of one token, which has nothing to predict."""
    leaf = torch.randn(*shape, VOCAB, requires_grad=True)
    one = objective({"loss": "cross_entropy"}, {"loss": "lovasz"}, **options)
    result = one.from_logits(leaf, torch.zeros(shape, dtype=torch.long))
    result.loss.backward()
    assert result.loss == 0
    assert (leaf.grad == 0).all()


@pytest.mark.parametrize("zero", [0, torch.tensor(0), torch.tensor(0.0)], ids=["int", "tensor", "float tensor"])
@pytest.mark.parametrize("scope", ["completion", "sequence"])
def test_a_count_of_zero_is_no_nan(zero, scope):
    """All micro-batches of a step are masked: their common count is 0."""
    batch = make_batch("padded", 9)
    batch.labels.fill_(IGNORE)
    result, gradient = evaluate(
        batch, {"loss": "cross_entropy", "scope": scope}, {"loss": "lovasz"}, num_items_in_batch=zero
    )
    assert result.loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("label", [VOCAB, VOCAB + 1000, -1, -99])
@every_loss
def test_a_label_outside_the_vocabulary_is_named(listed_as, label):
    batch = make_batch("padded", 10)
    batch.labels[1, 2] = label
    with pytest.raises(IndexError, match=rf"label {label} is outside the vocabulary: allowed are 0 to {VOCAB - 1}"):
        evaluate(batch, term(listed_as))


def test_a_token_outside_the_vocabulary_is_named_in_the_scope_sequence():
    batch = make_batch("padded", 10)
    batch.labels[0] = IGNORE
    batch.inputs["input_ids"][0, 3] = VOCAB
    with pytest.raises(IndexError, match=f"label {VOCAB} is outside the vocabulary"):
        evaluate(batch, {"loss": "cross_entropy", "scope": "sequence"})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_labels_of_other_integer_types(dtype):
    batch = make_batch("padded", 10)
    wanted, _ = evaluate(batch, MIXTURE[1], MIXTURE[2])
    result, _ = evaluate(replace(batch, labels=batch.labels.to(dtype)), MIXTURE[1], MIXTURE[2])
    assert torch.equal(result.loss, wanted.loss)


def test_shapes_that_do_not_fit():
    one = objective({"loss": "cross_entropy"})
    with pytest.raises(ValueError, match=r"logits \(6, 5\) and labels \(4,\) do not fit; expected"):
        one.from_logits(torch.randn(6, 5), torch.zeros(4, dtype=torch.long))


def extremes():
    """name -> logits and labels at which a careless formula gives inf or nan."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 2, 1, 0, 3, IGNORE, 3])
    random = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    impossible = random.clone()
    impossible[:, 4] = -math.inf  # no label, such as a padded vocabulary
    impossible[2, 0] = -math.inf  # the label of other rows
    return {
        "1e4": (1e4 * random, labels),
        "certain and right": (certain(labels, 1e4, 5), labels),
        "certain and wrong": (certain((labels + 1).clamp_min(0) % 5, 1e4, 5), labels),
        "uniform": (torch.zeros(8, 5, dtype=torch.float64), labels),
        "uniform and large": (torch.full((8, 5), 3e4, dtype=torch.float64), labels),
        "impossible tokens": (impossible, labels),
        "one row": (random[:1], labels[:1]),
        "one class": (random, torch.full_like(labels, 2)),
        "every class": (random, torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])),
        "two tokens": (random[:, :2], labels % 2),
        "one token": (random[:, :1], labels * 0),
    }


@pytest.mark.parametrize("case", extremes())
@every_loss
def test_extreme_logits_give_finite_values_and_gradients(listed_as, case):
    logits, labels = extremes()[case]
    if case == "impossible tokens" and listed_as in NOT_WITH_IMPOSSIBLE_TOKENS:
        pytest.skip("infinite by its formula")
    if listed_as == "a_row_loss" and case == "one token":
        pytest.skip("divides by V - 1")
    if listed_as in NUMBER_LOSSES and logits.shape[1] <= max(NUMBERS):
        pytest.skip("not all number tokens are in the vocabulary")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        # Past its largest number a half-precision logit is infinite, which is another case.
        scaled = logits.clamp(-6e4, 6e4) if case != "impossible tokens" else logits
        batch = Batch(scaled.to(dtype), labels, None, {"shift": False})
        for grouping in groupings(listed_as):
            result, gradient = evaluate(batch, term(listed_as, **grouping))
            assert result.loss.isfinite(), (dtype, grouping)
            assert gradient.isfinite().all(), (dtype, grouping)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@every_loss
def test_nan_and_infinite_logits_give_no_number(listed_as, wrong):
    batch = make_batch("rows", 11)
    batch.labels[3] = 1
    for column in (0, 1, VOCAB - 1):  # another token's, the target's, one that is no label
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            logits = batch.logits.to(dtype)
            logits[3, column] = wrong
            for grouping in groupings(listed_as):
                result, _ = evaluate(batch, term(listed_as, **grouping), logits=logits)
                assert not result.loss.isfinite() or (listed_as in NUMBER_LOSSES and column not in NUMBERS)
                assert not result.nll.isfinite()


# Precision: no worse than plain PyTorch on the same logits taken to float32.

# Beyond what the naive version loses itself: a factor, and so many units in the last place of the largest entry.
FACTOR, UNITS = 2.0, 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@every_loss
def test_precision(listed_as, dtype):
    for seed, kind in enumerate(("padded", "packed")):
        batch = make_batch(kind, 20 + seed).to(dtype)
        exact, exact_gradient = naive(batch.to(torch.float64), term(listed_as))
        plain_loss = naive_loss(batch, (leaf := batch.logits.clone().requires_grad_()).float(), [term(listed_as)])
        (plain_gradient,) = torch.autograd.grad(plain_loss, leaf)
        result, gradient = evaluate(batch, term(listed_as))
        assert result.loss.dtype == result.nll.dtype == torch.float32
        assert gradient.dtype == dtype

        def error(a, b):
            return (a.double() - b).abs().max()

        room = UNITS * torch.finfo(torch.float32).eps * exact.abs().clamp_min(1)
        assert error(result.loss, exact) <= FACTOR * error(plain_loss, exact) + room
        room = UNITS * torch.finfo(dtype).eps * exact_gradient.abs().max()
        assert error(gradient, exact_gradient) <= FACTOR * error(plain_gradient, exact_gradient) + room


@every_loss
def test_float64_stays_float64(listed_as):
    result, gradient = evaluate(make_batch("padded"), term(listed_as))
    assert {x.dtype for x in (result.loss, result.nll, gradient, *result.terms.values())} == {torch.float64}


def test_autocast_changes_nothing():
    batch = make_batch("padded").to(torch.float32)
    wanted, wanted_gradient = evaluate(batch, *MIXTURE)
    with torch.autocast("cpu", torch.bfloat16):
        result, gradient = evaluate(batch, *MIXTURE)
    assert torch.equal(result.loss, wanted.loss)
    assert torch.equal(gradient, wanted_gradient)


# Accumulation


def split(batch, sizes):
    """Micro-batches of so many lines each."""
    parts = zip(*(x.split(sizes) for x in (batch.logits, batch.labels, batch.documents)), strict=True)
    lines = {name: x.split(sizes) for name, x in batch.inputs.items()}
    return [Batch(*part, {name: x[i] for name, x in lines.items()}) for i, part in enumerate(parts)]


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("listed_as", [*LISTED, "mixture"])
def test_micro_batches_with_a_common_count_are_one_big_batch(listed_as, kind):
    batch = make_batch(kind, 12)
    terms = [term(listed_as)] if listed_as != "mixture" else [{**t, "per": "document"} for t in MIXTURE[2:]]
    terms = [*terms, *([{"loss": "cross_entropy", "scope": "sequence"}] if listed_as == "mixture" else [])]
    big, big_gradient = evaluate(batch, *terms)
    counts = {scope: len(batch.rows(scope)) for scope in ("completion", "sequence")}
    if listed_as in NUMBER_LOSSES:
        counts |= counted(listed_as, counts["completion"], sum(y in NUMBERS for _, y, _ in batch.rows()))
    given = [counts, {s: torch.tensor(n) for s, n in counts.items()}]
    if listed_as not in ("mixture", *NUMBER_LOSSES):
        given += [counts["completion"], torch.tensor(float(counts["completion"]))]
    lines = len(batch.labels)
    for sizes, count in itertools.product(([1] * lines, [1, lines - 1]), given):
        found = [evaluate(part, *terms, num_items_in_batch=count) for part in split(batch, sizes)]
        close(sum(result.loss for result, _ in found), big.loss, 1e-12)
        close(torch.cat([gradient for _, gradient in found]), big_gradient, 1e-12)


def test_the_sets_of_per_batch_are_micro_batches():
    """There the sum is the mean over micro-batches, weighted by their tokens."""
    batch = make_batch("padded", 12)
    one = {"loss": "generalized_dice", "per": "batch"}
    parts = split(batch, [1, 2])
    n = len(batch.rows())
    found = sum(evaluate(part, one, num_items_in_batch=n)[0].loss for part in parts)
    close(found, sum(naive(part, one)[0] * len(part.rows()) for part in parts) / n)


def test_where_only_the_trained_tokens_are_known_a_sequence_term_counts_by_them():
    batch = make_batch("padded", 12)
    one = {"loss": "cross_entropy", "scope": "sequence"}
    n = len(batch.rows())
    found = sum(evaluate(part, one, num_items_in_batch=n)[0].loss for part in split(batch, [1, 1, 1]))
    parts = split(batch, [1, 1, 1])
    close(found, sum(naive(part, one)[0] * len(part.rows()) for part in parts) / n)


# Sums and weights


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"loss": "focal", "gamma": 0.0}, {"loss": "cross_entropy"}),
        ({"loss": "focal", "gamma": 0.0, "alpha": 0.25}, {"loss": "cross_entropy", "weight": 0.25}),
        ({"loss": "cross_entropy", "label_smoothing": 0.0}, {"loss": "cross_entropy"}),
        (
            {"loss": "self_adjusting_dice", "alpha": 0, "detach_weight": True},
            {"loss": "self_adjusting_dice", "alpha": 0},
        ),
        ({"loss": "lovasz", "tolerance": 0.0}, {"loss": "lovasz"}),
        ({"loss": "poly", "epsilon": 0}, {"loss": "cross_entropy"}),
        ({"loss": "dft", "beta": 0}, {"loss": "cross_entropy"}),
        ({"loss": "z_regularized", "coefficient": 0}, {"loss": "cross_entropy"}),
        ({"loss": "squentropy", "coefficient": 0}, {"loss": "cross_entropy"}),
        ({"loss": "confidence_penalty", "coefficient": 0}, {"loss": "cross_entropy"}),
        ({"loss": "entropy_adaptive", "alpha": 0}, {"loss": "cross_entropy"}),
        ({"loss": "topk_cross_entropy", "k": 1}, {"loss": "cross_entropy"}),
        ({"loss": "asymmetric", "gamma_positive": 2, "label_smoothing": 0}, {"loss": "focal"}),
        (
            {"loss": "asymmetric", "gamma_negative": 0, "label_smoothing": 0.2},
            {"loss": "cross_entropy", "label_smoothing": 0.2},
        ),
        ({"loss": "tversky", "alpha": 0.5, "beta": 0.5, "smooth": 0.5}, {"loss": "dice", "smooth": 1}),
        ({"loss": "tversky", "alpha": 1, "beta": 1}, {"loss": "jaccard"}),
        ({"loss": "jaccard_metric"}, {"loss": "jaccard", "smooth": 0}),
        ({"loss": "focal_tversky", "gamma": 1}, {"loss": "tversky"}),
        ({"loss": "unified_focal", "focal_weight": 0, "delta": 0.7, "gamma": 0.75}, {"loss": "focal_tversky"}),
        (
            {"loss": "unified_focal", "focal_weight": 1, "gamma": 0.25},
            {"loss": "focal", "gamma": 0.75, "weight": 0.6},
        ),
    ],
    ids=str,
)
def test_one_loss_in_terms_of_another(a, b):
    for seed in range(3):
        batch = make_batch("padded", seed)
        (one, gradient), (other, other_gradient) = evaluate(batch, a), evaluate(batch, b)
        close(one.loss, other.loss, 1e-12)
        close(gradient, other_gradient, 1e-12)


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        ({"loss": "ldr", "margin": 0}, {"loss": "cross_entropy"}, -math.log(VOCAB)),
        ({"loss": "encouraging", "log_end": 0}, {"loss": "poly"}, -1),
        ({"loss": "dft"}, {"loss": "gce", "q": 1}, None),
        ({"loss": "gem", "beta": 1}, {"loss": "cross_entropy"}, None),
        # One document of 13 rows, of which the sum of -log p is taken.
        ({"loss": "direct_coverage", "n": 1}, {"loss": "cross_entropy", "weight": 13}, 0),
    ],
    ids=str,
)
def test_one_gradient_is_that_of_another(a, b, difference):
    for seed in range(3):
        batch = make_batch("rows", seed)
        batch.labels = batch.labels.clamp_min(0)
        (one, gradient), (other, other_gradient) = evaluate(batch, a), evaluate(batch, b)
        if difference is not None:
            close(one.loss, other.loss + difference, 1e-12)
        close(gradient, other_gradient, 1e-12)


def test_gce_lies_between_cross_entropy_and_mean_absolute_error():
    batch = make_batch("padded", 13)
    (near, gradient), (wanted, wanted_gradient) = (
        evaluate(batch, one) for one in ({"loss": "gce", "q": 1e-7}, {"loss": "cross_entropy"})
    )
    close(near.loss, wanted.loss, 1e-6)
    close(gradient, wanted_gradient, 1e-6)
    p = torch.stack([batch.logits[at].softmax(0)[y] for at, y, _ in batch.rows()])
    close(evaluate(batch, {"loss": "gce", "q": 1})[0].loss, (1 - p).mean(), 1e-12)


def test_gem_is_the_distance_to_the_largest_logit_where_q_is_sharp():
    batch = make_batch("padded", 13)
    wanted = torch.stack([batch.logits[at].max() - batch.logits[at][y] for at, y, _ in batch.rows()]).mean()
    close(evaluate(batch, {"loss": "gem", "beta": 1e-4})[0].loss, wanted)


def test_log_cosh_dice_is_log_cosh_of_the_dice_of_a_document():
    batch = make_batch("rows", 13)
    dice = evaluate(batch, {"loss": "dice"})[0].loss
    close(evaluate(batch, {"loss": "log_cosh_dice"})[0].loss, dice.cosh().log(), 1e-12)


@pytest.mark.parametrize(("loss", "scale"), [("spherical_z", 3.0), ("sparsemax", 1.0), ("gem", 1.0), ("ldr", 1.0)])
def test_shifting_logits_changes_nothing(loss, scale):
    batch = make_batch("padded", 13)
    wanted, gradient = evaluate(batch, {"loss": loss})
    moved, moved_gradient = evaluate(batch, {"loss": loss}, logits=scale * batch.logits + 5)
    close(moved.loss, wanted.loss)
    close(scale * moved_gradient, gradient)


def test_cross_entropy_is_torchs():
    batch = make_batch("padded", 13)
    for smoothing in (0.0, 0.2):
        leaf = batch.logits.clone().requires_grad_()
        wanted = torch.nn.functional.cross_entropy(
            leaf[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), label_smoothing=smoothing
        )
        result, gradient = evaluate(batch, {"loss": "cross_entropy", "label_smoothing": smoothing})
        close(result.loss.detach(), wanted.detach(), 1e-12)
        close(gradient, torch.autograd.grad(wanted, leaf)[0], 1e-12)


def test_a_mixture_is_the_weighted_sum_of_its_parts():
    for kind in ("padded", "packed"):
        batch = make_batch(kind, 14)
        mixed, gradient = evaluate(batch, *MIXTURE)
        parts = [evaluate(batch, {**t, "weight": 1.0}) for t in MIXTURE]
        weights = [t["weight"] for t in MIXTURE]
        close(mixed.loss, sum(w * part.loss for w, (part, _) in zip(weights, parts, strict=True)), 1e-12)
        close(gradient, sum(w * g for w, (_, g) in zip(weights, parts, strict=True)), 1e-12)
        for (name, value), (part, _) in zip(mixed.terms.items(), parts, strict=True):
            close(value, part.loss, 1e-12)
            close(value, part.terms[name], 1e-12)


@every_loss
def test_a_weight_scales(listed_as):
    batch = make_batch("packed", 15)
    one, gradient = evaluate(batch, term(listed_as))
    half, half_gradient = evaluate(batch, term(listed_as, weight=0.5))
    close(half.loss, one.loss / 2, 1e-12)
    close(half_gradient, gradient / 2, 1e-12)
    assert list(half.terms.values()) == list(one.terms.values())  # unweighted


@every_loss
def test_what_follows_scales_the_gradient(listed_as):
    batch = make_batch("packed", 15)
    _, gradient = evaluate(batch, term(listed_as))
    leaf = batch.logits.clone().requires_grad_()
    loss = batch.result(objective(term(listed_as)), leaf).loss
    loss *= 3  # in place, as Trainer does
    (loss**2 / 2).backward()
    close(leaf.grad, gradient * 3 * loss.detach(), 1e-12)


# What a result says


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


@pytest.mark.parametrize("listed_as", [*LISTED, "mixture", "reference"])
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


# Backward


@pytest.mark.parametrize("listed_as", [*LISTED, "mixture"])
def test_a_second_backward_says_so(listed_as):
    batch = make_batch("padded", 18)
    terms = MIXTURE if listed_as == "mixture" else [term(listed_as)]
    loss = batch.result(objective(*terms), batch.logits.clone().requires_grad_()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(
        RuntimeError, match="backward of a cv_loss objective was called twice; compute the objective anew"
    ):
        loss.backward()


@pytest.mark.parametrize("listed_as", [*LISTED, "mixture"])
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


# Lovász


@pytest.mark.parametrize("tolerance", [0.01, 0.2, 1.0])
def test_tolerance_changes_a_class_by_at_most_as_much(tolerance):
    def difference(labels):
        logits = batch.logits + certain(batch.labels, 6.0)  # a model that has learnt: small errors to leave out
        batch_ = replace(batch, logits=logits, labels=labels)
        exact, short = (evaluate(batch_, {"loss": "lovasz", "tolerance": t})[0].loss for t in (0.0, tolerance))
        return exact - short

    left_out = 0
    for seed in range(5):
        batch = make_batch("rows", seed)
        found = [difference(batch.labels)]
        for number in batch.labels.unique():
            if number != IGNORE:  # one class alone, so its value is the loss
                found.append(difference(batch.labels.where(batch.labels == number, IGNORE)))
        assert all(-1e-12 <= x <= tolerance + 1e-12 for x in found)
        left_out += sum(x > 1e-9 for x in found)
    assert left_out


# The paper's code

PAPER = ["cross_entropy", "focal", "self_adjusting_dice", "generalized_dice", "lovasz"]


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists():
        pytest.skip(f"no values of the paper's code at {GOLDEN}; set CVLOSS_GOLDEN to their .npz file")
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


GOLDEN_CASES = ["all_classes_present", "masked_prompt", "wide_vocab", "confident", "one_token"]


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_reference_mode_gives_the_papers_values(golden, case, name):
    batch = Batch(golden[f"{case}/logits"], golden[f"{case}/labels"], None, {"shift": False})
    leaf = batch.logits.clone().requires_grad_()
    result = batch.result(objective({"loss": name}, reference=True), leaf)
    result.loss.backward()
    torch.testing.assert_close(result.loss.detach(), golden[f"{case}/{name}/value"], rtol=1e-5, atol=1e-25)
    torch.testing.assert_close(leaf.grad, golden[f"{case}/{name}/grad"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_the_default_differs_from_the_papers_code_where_that_is_wrong(golden, case, name):
    labels = golden[f"{case}/labels"]
    batch = Batch(golden[f"{case}/logits"], labels, None, {"shift": False})
    # The paper takes the whole batch as the set of lovasz, and each line as one of generalized_dice.
    per = {"lovasz": {"per": "batch"}}.get(name, {})
    result, gradient = evaluate(batch, {"loss": name, **per})
    value, its_gradient = golden[f"{case}/{name}/value"], golden[f"{case}/{name}/grad"]
    masked = bool((labels == IGNORE).any())
    # In "confident" token 0 is a label too, and an error of 1 already, so masked rows cannot make it worse.
    blind = (case, name) == ("confident", "lovasz")
    same = name == "cross_entropy" or (name != "generalized_dice" and not masked) or blind
    equal = torch.isclose(result.loss, value, rtol=1e-5) and (gradient - its_gradient).norm() < 1e-4 * gradient.norm()
    assert bool(equal) == same
    if name == "generalized_dice" and case != "all_classes_present":
        # Absent classes drown the paper's, which trains nothing.
        assert its_gradient.norm() < 1e-10 < 1e-4 < gradient.norm()


def test_reference_mode_in_a_mixture():
    """The paper's recipe: cross-entropy over prompt and answer, the other loss over the answer."""
    batch = make_batch("padded", 19)
    terms = [{"loss": "cross_entropy", "weight": 0.6, "scope": "sequence"}, {"loss": "lovasz", "weight": 0.4}]
    result = batch.result(objective(*terms, reference=True))
    parts = [batch.result(objective({**t, "weight": 1.0}, reference=True)) for t in terms]
    close(result.loss, 0.6 * parts[0].loss + 0.4 * parts[1].loss, 1e-12)
    close(parts[0].loss, naive(batch, {"loss": "cross_entropy", "scope": "sequence"})[0])
    close(result.nll, naive(batch, {"loss": "cross_entropy"})[0])
    assert result.counts == {"cross_entropy": len(batch.rows("sequence")), "lovasz": len(batch.rows())}
