"""Losses of a set of rows that see the log-probabilities of its targets.

A set is a document (or the micro-batch). Each loss takes ``logp`` (n,), float32 or float64, of the rows of all sets,
with ``rows``, which says whose they are, and returns one value a set, (S,).
"""

import math

import torch
from torch import Tensor

from ..engine.numerics import log_one_minus_exp
from ..engine.segments import Segments
from .bounds import Number, Positive, PositiveFraction
from .hookspecs import hookimpl


def topk_cross_entropy(logp: Tensor, rows: Segments, k: PositiveFraction = 0.1) -> Tensor:
    """Cross-entropy of the hardest tokens of each document alone: the fraction ``k`` of them, at least one.

    Formula: mean of the k n largest -log p of n
    Source: Wu et al. 2016, Bridging Category-level and Instance-level Semantic Image Segmentation, arXiv:1605.06885
    Helps: where most tokens are learnt and train no more; mix it with cross-entropy, which keeps the rest.
        With k 0.3 it gained most where we measured, on tagging from scratch (docs/evidence.md).
    Hurts: with wrong labels, which are the hardest tokens of all. From a pretrained start there is no
        evidence yet; the default of k is ours.

    Args:
        logp: (n,), log p of the target of each row.
        rows: The rows of the sets (n,), and whose they are.
        k: The fraction of the tokens that counts.
    """
    wanted = (k * rows.sizes.double()).long().clamp_min(1).to(logp.device, non_blocking=True)
    hard = rows.rank(-logp) < wanted[rows.index]  # a NaN is the largest, and is seen
    return rows.sum(torch.where(hard, -logp, 0)) / wanted


def direct_coverage(logp: Tensor, rows: Segments, n: Number = 256) -> Tensor:
    """Minus the log of the chance that one of ``n`` sampled answers is the whole document: pass@n.

    The gradient is that of the document's sum of -log p, times a factor that falls from 1 to 0 once P n passes 1. As
    every loss of sets it is weighted by the tokens of the document; the paper counts each example once.

    Formula: -log(1 - (1 - P)^n), P = product of p over the document
    Source: Chen et al. 2025, Rethinking Fine-Tuning when Scaling Test-Time Compute, arXiv:2502.07154; default of n ours
    Helps: where many answers are sampled and one right one is enough (pass@n, search), as it does not make the model
        surer than that needs.
    Hurts: the first answer (pass@1), which cross-entropy trains further. Long documents have P near 0, and then it is
        the sum of -log p alone.

    Args:
        logp: (n,), log p of the target of each row.
        rows: The rows of the sets (n,), and whose they are.
        n: How many answers are sampled.
    """
    log_probability = rows.sum(logp)
    # Below, (1 - P)^n is 1 - n P to rounding; P itself may be too small for a number.
    least = -36 - math.log(n)
    inside = log_probability.clamp_min(least)
    value = -log_one_minus_exp(n * log_one_minus_exp(inside))
    return torch.where(log_probability < least, -log_probability - math.log(n), value)


def importance_weighted(logp: Tensor, reference_logp: Tensor, rows: Segments, cap: Positive = 16.0) -> Tensor:
    """Cross-entropy with a weight of each document: how much likelier it has become than under a reference model.

    The weight is held constant. At the start, with the model itself as the reference, it is cross-entropy.

    Formula: -w mean(log p), w = sg(min(cap, exp(mean(log p - log p_ref)))) of the document, sg without gradient
    Source: Qin and Springenberg 2025, Supervised Fine Tuning on Curated Data is Reinforcement Learning (iw-SFT),
        arXiv:2507.12856; there in this form for batches of one document
    Helps: data chosen for their quality, where it is a tighter bound of the expected reward; its authors' experiments.
    Hurts: documents that the model unlearns lose their weight, and are learnt ever less. No measure of progress.

    Args:
        logp: (n,), log p of the target of each row.
        reference_logp: (n,), the same under the reference model.
        rows: The rows of the sets (n,), and whose they are.
        cap: Largest weight.
    """
    weight = rows.mean(logp - reference_logp).exp().clamp_max(cap).detach()
    return -weight * rows.mean(logp)


@hookimpl
def cvloss_register_losses(register):  # type: ignore[no-untyped-def]
    for function in (topk_cross_entropy, direct_coverage, importance_weighted):
        register(function.__name__, family="document")(function)
