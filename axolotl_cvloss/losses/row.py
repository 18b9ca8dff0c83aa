"""Losses of one row that need all its logits.

Each takes ``logits`` (n, V), float32 or float64, and ``labels`` (n,), and returns one value a row, (n,). Autograd
differentiates them on a chunk of rows at a time, so what they cost is time, and a few times the memory of a chunk.

A logit may be -inf (a token that is ruled out); q log p and the like are 0 there.
"""

import torch
from torch import Tensor

from .bounds import PositiveFraction
from .hookspecs import hookimpl

SORTED = 128  # logits that sparsemax sorts at first; it takes more where they do not do


def sparsemax(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of sparsemax, a softmax with exact zeros: 0 as soon as the target's logit is 1 above all others.

    Needs the package entmax.

    Formula: <q, z> - z_y + (1 - |q|^2) / 2, q the projection of z onto the simplex
    Source: Martins and Astudillo 2016, From Softmax to Sparsemax, arXiv:1602.02068
    Helps: where answers are meant to be sampled with sparsemax; tokens with a margin of 1 train no more.
    Hurts: models that are sampled with softmax, which all hosts do: a margin of 1 is little there. Mix it with
        cross-entropy. No evidence in fine-tuning yet.

    Args:
        logits: (n, V), of the rows.
        labels: (n,), the targets.
    """
    from entmax import sparsemax_loss

    sound = logits.amax(1).isfinite()  # the library fails on the other rows, or returns a number
    values = sparsemax_loss(_finite(_shifted(logits.where(sound[:, None], 0))), labels, k=SORTED)
    return values.where(sound, torch.nan)


def gem(logits: Tensor, labels: Tensor, beta: PositiveFraction = 0.7) -> Tensor:
    """Moves probability to the target from the likely tokens alone, which keeps the rest of the distribution.

    Its gradient is q less the target, where cross-entropy has p less the target; beta 1 is cross-entropy's gradient.
    The paper's form with h linear; its code has a second one, with the weights sigmoid(0.01 (z_j - z_y)).

    Formula: -log p + sum_j q_j log p_j, q = sg(softmax(log p / beta)), sg without gradient
    Source: Li et al. 2024, Preserving Diversity in Supervised Fine-Tuning, arXiv:2408.16673
    Helps: keeping the diversity of answers, as a cold start for reinforcement learning or for sampling many.
    Hurts: where one exact answer is wanted, little is known. The value falls below 0 and is no measure of progress.

    Args:
        logits: (n, V), of the rows.
        labels: (n,), the targets.
        beta: Temperature of q; a small one takes from the likeliest tokens alone.
    """
    shifted = _shifted(logits)
    q = (shifted.detach() / beta).softmax(1)
    # log p is z - lse, and q sums to 1, so lse cancels.
    return torch.einsum("nv,nv->n", q, _finite(shifted)) - _at(shifted, labels)


def _at(values: Tensor, labels: Tensor) -> Tensor:
    """The entry of each row at its label."""
    return values.gather(1, labels[:, None]).squeeze(1)


def _shifted(logits: Tensor) -> Tensor:
    """Logits less the largest of their row, where a common offset does not count: far from 0 they have few digits."""
    return logits - logits.detach().amax(1, keepdim=True)


def _finite(values: Tensor) -> Tensor:
    """The most negative number in the place of -inf, so that it times 0 is 0."""
    return values.clamp_min(torch.finfo(values.dtype).min)


@hookimpl
def cvloss_register_losses(register):  # type: ignore[no-untyped-def]
    register("gem", family="row")(gem)
    register("sparsemax", family="row", requires="entmax")(sparsemax)
