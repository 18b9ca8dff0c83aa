"""Nothing to train, labels and logits that cannot be, and logits at the ends of what numbers can say."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import BATCHES, IGNORE, VOCAB, Batch, make_batch
from listed import (
    MIXTURE,
    NOT_WITH_IMPOSSIBLE_TOKENS,
    certain,
    each_family,
    each_loss,
    evaluate,
    groupings,
    objective,
    of_numbers,
    term,
)
from naive import NUMBERS


@each_family("mixture", kind=list(BATCHES))
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
def test_a_label_outside_the_vocabulary_is_named(label):
    """Before any loss sees it."""
    batch = make_batch("padded", 10)
    batch.labels[1, 2] = label
    with pytest.raises(IndexError, match=rf"label {label} is outside the vocabulary: allowed are 0 to {VOCAB - 1}"):
        evaluate(batch, *MIXTURE)


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


@each_loss(case=list(extremes()))
def test_extreme_logits_give_finite_values_and_gradients(listed_as, case):
    logits, labels = extremes()[case]
    if case == "impossible tokens" and listed_as in NOT_WITH_IMPOSSIBLE_TOKENS:
        pytest.skip("infinite by its formula")
    if listed_as == "a_row_loss" and case == "one token":
        pytest.skip("divides by V - 1")
    if of_numbers(listed_as) and logits.shape[1] <= max(NUMBERS):
        pytest.skip("not all number tokens are in the vocabulary")
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        # Past its largest number a half-precision logit is infinite, which is another case.
        scaled = logits.clamp(-6e4, 6e4) if case != "impossible tokens" else logits
        batch = Batch(scaled.to(dtype), labels, None, {"shift": False})
        for grouping in groupings(listed_as):
            result, gradient = evaluate(batch, term(listed_as, **grouping))
            assert result.loss.isfinite(), (dtype, grouping)
            assert gradient.isfinite().all(), (dtype, grouping)


@each_loss(wrong=[math.nan, math.inf])
def test_nan_and_infinite_logits_give_no_number(listed_as, wrong):
    batch = make_batch("rows", 11)
    batch.labels[3] = 1
    for column in (0, 1, VOCAB - 1):  # another token's, the target's, one that is no label
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            logits = batch.logits.to(dtype)
            logits[3, column] = wrong
            for grouping in groupings(listed_as):
                result, _ = evaluate(batch, term(listed_as, **grouping), logits=logits)
                assert not result.loss.isfinite() or (of_numbers(listed_as) and column not in NUMBERS)
                assert not result.nll.isfinite()
