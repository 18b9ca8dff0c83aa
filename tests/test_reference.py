"""reference.py against values and gradients of the paper's code, and against numbers worked out by hand."""

import math

import pytest
import torch
from naive import NAIVE

from axolotl_cvloss.losses import reference

LOSSES = ["cross_entropy", "focal", "self_adjusting_dice", "generalized_dice", "lovasz"]
CASES = ["all_classes_present", "masked_prompt", "wide_vocab", "confident", "one_token"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_papers_code(golden, case, name, dtype):
    logits = golden[f"{case}/logits"].to(dtype, copy=True).requires_grad_()
    value = getattr(reference, name)(logits, golden[f"{case}/labels"])
    value.backward()
    wanted, wanted_grad, wanted_norm = (golden[f"{case}/{name}/{what}"] for what in ("value", "grad", "norm"))
    grad = logits.grad.flatten(0, 1)[golden[f"{case}/rows"]].double()
    # Relative too, as generalized_dice is about 1e-22, where an absolute 1e-5 would pass for anything small.
    # The paper computes it in float32, which leaves its gradient there with two or three digits.
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, wanted_grad, rtol=0, atol=1e-5)
    loose = name == "generalized_dice" and wanted_norm < 1e-10
    assert (grad - wanted_grad).norm() <= (0.05 if loose else 1e-5) * wanted_grad.norm()
    torch.testing.assert_close(logits.grad.double().norm(), wanted_norm, rtol=0.05 if loose else 1e-5, atol=0)


def batch(*rows):
    """rows of probabilities -> logits (1, T, V) that require a gradient."""
    return torch.tensor([rows], dtype=torch.float64).log().requires_grad_()


# One trained row with p = 1/4 at its label and one ignored row, whose own logits must not matter.
PARTLY_IGNORED = (0.25, 0.75), (0.9, 0.1)
ONE_IGNORED = torch.tensor([[0, -100]])


@pytest.mark.parametrize(
    ("name", "trained", "ignored"),
    [
        # (1-p)^2 * -log p at p = 1/4, and at p = 1/V = 1/2
        ("focal", 9 / 16 * math.log(4), 1 / 4 * math.log(2)),
        # q = 3/4 * 1/4 = 3/16: 1 - (22/16)/(35/16); q = 1/2 * 1/2 = 1/4: 1 - (3/2)/(9/4)
        ("self_adjusting_dice", 13 / 35, 1 / 3),
    ],
)
def test_slip_ignored_rows_add_a_constant_to_the_mean(name, trained, ignored):
    logits, alone = batch(*PARTLY_IGNORED), batch(PARTLY_IGNORED[0])
    value = getattr(reference, name)(logits, ONE_IGNORED)
    value.backward()
    getattr(reference, name)(alone, ONE_IGNORED[:, :1]).backward()
    assert value.item() == pytest.approx((trained + ignored) / 2)
    assert (logits.grad[0, 1] == 0).all()
    torch.testing.assert_close(logits.grad[0, 0], alone.grad[0, 0] / 2)  # shrunk by the ignored row


def test_cross_entropy_has_no_slip():
    logits = batch(*PARTLY_IGNORED)
    value = reference.cross_entropy(logits, ONE_IGNORED)
    assert value.item() == pytest.approx(math.log(4))


def test_generalized_dice_without_absent_classes_is_one_less_than_the_correct_form():
    # I = 3/4, 1/2; S = 5/4, 3/4; N = 1, 1: -2 * 5/4 / 4
    value = reference.generalized_dice(batch((0.75, 0.25), (0.5, 0.5)), torch.tensor([[0, 1]]), smooth=0.0)
    assert value.item() == pytest.approx(-0.625)


def test_slip_generalized_dice_doubles_smooth():
    # -2 * (5/4 + 1) / (4 + 1); the usual form would be 1 - (2 * 5/4 + 1) / (4 + 1)
    value = reference.generalized_dice(batch((0.75, 0.25), (0.5, 0.5)), torch.tensor([[0, 1]]), smooth=1.0)
    assert value.item() == pytest.approx(-0.9)


def test_slip_an_absent_class_drowns_generalized_dice():
    logits = batch((0.7, 0.2, 0.1), (0.4, 0.5, 0.1))
    value = reference.generalized_dice(logits, torch.tensor([[0, 1]]))
    value.backward()
    assert -1e-18 < value.item() < 0
    assert 0 < logits.grad.norm() < 1e-18


def test_slip_generalized_dice_counts_ignored_rows_into_class_0():
    # The ignored row has p = (1/2, 1/2) and class 0: I = 1/2, 3/4; S = 3/4, 5/4; N = 1, 1.
    logits = batch((0.25, 0.75), (0.9, 0.1))
    value = reference.generalized_dice(logits, torch.tensor([[1, -100]]), smooth=0.0)
    assert value.item() == pytest.approx(-0.625)


def test_slip_generalized_dice_weighs_rows_of_the_batch_alike():
    logits = torch.randn(2, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[0, 1, 0, 1, 1, 1], [0, 1, -100, -100, -100, -100]])
    each = [reference.generalized_dice(logits[b : b + 1], labels[b : b + 1]) for b in range(2)]
    torch.testing.assert_close(reference.generalized_dice(logits, labels), (each[0] + each[1]) / 2)


def test_slip_lovasz_gains_class_0_from_ignored_rows():
    # Class 1: its one row has the largest error, 1/4, so 1/4. Class 0: the ignored row has error 1, so 1.
    value = reference.lovasz(batch((0.25, 0.75), (0.9, 0.1)), torch.tensor([[1, -100]]))
    assert value.item() == pytest.approx((1 / 4 + 1) / 2)


def test_slip_lovasz_takes_the_batch_as_one_set():
    # Two documents of one row: class 0 with p = (3/4, 1/4) and class 1 with (1/2, 1/2). Apart: (1/4 + 1/2)/2.
    # Together, class 0: errors 1/2 (other), 1/4 (member), steps 1/2, 1/2, so 3/8;
    # class 1: errors 1/2 (member), 1/4 (other), steps 1, 0, so 1/2.
    logits = batch((0.75, 0.25), (0.5, 0.5)).transpose(0, 1)
    value = reference.lovasz(logits, torch.tensor([[0], [1]]))
    assert value.item() == pytest.approx((3 / 8 + 1 / 2) / 2)


@pytest.mark.parametrize("name", LOSSES)
def test_without_a_slip_it_is_the_correct_form(name):
    # One document, nothing ignored, every class present: generalized_dice then lacks only its "1 -".
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 12, 4, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.tensor([[0, 1, 2, 3, 0, 0, 2, 1, 0, 3, 0, 0]])
    parameters = {"smooth": 0.0} if name == "generalized_dice" else {}
    value = getattr(reference, name)(logits, labels, **parameters)
    correct = NAIVE[name](logits[0], labels[0], **parameters)
    torch.testing.assert_close(value + (name == "generalized_dice"), correct)
    torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (value, correct)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_logits_are_computed_in_float32(name, dtype):
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.tensor([[1, 2, -100, 3, 1], [-100, 0, 6, 6, 5]])
    value = getattr(reference, name)(logits, labels)
    assert torch.equal(value, getattr(reference, name)(logits.float(), labels))
    assert value.isfinite()
