"""One loss in terms of another, mixtures and weights."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import IGNORE, VOCAB, make_batch
from listed import MIXTURE, certain, close, each_family, evaluate, objective, term


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


@each_family()
def test_a_weight_scales(listed_as):
    batch = make_batch("packed", 15)
    one, gradient = evaluate(batch, term(listed_as))
    half, half_gradient = evaluate(batch, term(listed_as, weight=0.5))
    close(half.loss, one.loss / 2, 1e-12)
    close(half_gradient, gradient / 2, 1e-12)
    assert list(half.terms.values()) == list(one.terms.values())  # unweighted


@each_family()
def test_what_follows_scales_the_gradient(listed_as):
    batch = make_batch("packed", 15)
    _, gradient = evaluate(batch, term(listed_as))
    leaf = batch.logits.clone().requires_grad_()
    loss = batch.result(objective(term(listed_as)), leaf).loss
    loss *= 3  # in place, as Trainer does
    (loss**2 / 2).backward()
    close(leaf.grad, gradient * 3 * loss.detach(), 1e-12)


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
