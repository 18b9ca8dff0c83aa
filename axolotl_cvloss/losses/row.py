"""Losses of one row that need more of its logits than log p of the target.

Each takes ``logits`` (n, V), float32 or float64, and ``labels`` (n,), and returns one value a row, (n,). Autograd
differentiates them on a chunk of rows at a time, so what they cost is time, and a few times the memory of a chunk.

A logit may be -inf (a token that is ruled out); p log p and the like are 0 there, and means over the vocabulary, as
that of squentropy, leave it out.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .bounds import Fraction, NonNegative, NumberFrom2, Positive, PositiveFraction
from .hookspecs import hookimpl
from .token import focal

CONSTANT = 1e-6  # variance below which a row of logits counts as constant
SORTED = 128  # logits that sparsemax sorts at first; it takes more where they do not do


def asymmetric(
    logits: Tensor,
    labels: Tensor,
    gamma_positive: NonNegative = 0.0,
    gamma_negative: NonNegative = 4.0,
    label_smoothing: Fraction = 0.1,
) -> Tensor:
    """Focal with label smoothing, where only tokens that are likely and wrong feel the smoothing.

    Without label smoothing it is focal, which costs less.

    Formula: -(1 - s + s/V) (1 - p)^gamma_positive log p - (s/V) sum_{j != y} p_j^gamma_negative log p_j,
        s = label_smoothing
    Source: Ridnik et al. 2020, Asymmetric Loss for Multi-Label Classification, arXiv:2009.14119, its form for one label
    Helps: in the place of label smoothing; published for images.
    Hurts: with a large vocabulary the second part is all but 0. No evidence in fine-tuning yet.

    Args:
        logits: (n, V), of the rows.
        labels: (n,), the targets.
        gamma_positive: Power of focal, on the target.
        gamma_negative: The same for the other tokens; a large one leaves out those that are unlikely.
        label_smoothing: Share of the uniform distribution in the target.
    """
    logp = _log_softmax(logits)
    target = _at(logp, labels)
    share = label_smoothing / logits.shape[1]
    value = (1 - label_smoothing + share) * focal(target, gamma_positive)
    if not label_smoothing:
        return value
    terms = (gamma_negative * logp).exp() * logp
    return value - share * (terms.sum(1) - _at(terms, labels))


def squentropy(logits: Tensor, labels: Tensor, coefficient: NonNegative = 1.0) -> Tensor:
    """Cross-entropy and the mean square of the other tokens' logits, which pulls them to 0.

    Formula: -log p + coefficient / (V - 1) sum_{j != y} z_j^2
    Source: Hui et al. 2023, Cut your Losses with Squentropy, arXiv:2302.03952; coefficient is ours, 1 is the paper's
    Helps: calibration, in models trained from scratch with it.
    Hurts: base models, whose logits were never near 0: most of the gradient moves the logits of unlikely tokens. Take
        a small coefficient. No evidence in fine-tuning yet.

    Args:
        logits: (n, V), of the rows.
        labels: (n,), the targets.
        coefficient: Of the squares; 0 is cross-entropy.
    """
    others = logits.masked_fill(logits == -torch.inf, 0).scatter(1, labels[:, None], 0)
    count = (_possible(logits) - 1).clamp_min(1).to(logits.dtype)  # an integer would make it a float32
    return _cross_entropy(logits, labels) + coefficient / count * torch.einsum("nv,nv->n", others, others)


def spherical_z(logits: Tensor, labels: Tensor, slope: Positive = 1.0, offset: float = 10.0) -> Tensor:
    """How many standard deviations the target's logit stands above the mean of its row; no softmax.

    A row whose logits are all equal has no spread; its standard deviation is taken as 0.001.

    Formula: softplus(slope (offset - (z_y - mean z) / std z)) / slope
    Source: de Brebisson and Vincent 2016, The Z-loss, arXiv:1604.08859; the paper tunes slope and offset, defaults ours
    Helps: ranking the target among the first few; shifting or scaling the logits changes nothing.
    Hurts: it does not train probabilities: alone, p and sampling from it drift. No evidence in fine-tuning yet.

    Args:
        logits: (n, V), of the rows.
        labels: (n,), the targets.
        slope: Of the softplus; a large one makes it a hinge.
        offset: Standard deviations that the target is wanted above the mean.
    """
    shifted, count = _shifted(logits), _possible(logits)
    ruled_out = logits == -torch.inf
    mean = shifted.masked_fill(ruled_out, 0).sum(1) / count
    away = (shifted - mean[:, None]).masked_fill(ruled_out, 0)
    variance = torch.einsum("nv,nv->n", away, away) / count
    height = (_at(shifted, labels) - mean) / variance.clamp_min(CONSTANT).sqrt()
    return F.softplus(offset - height, beta=slope, threshold=40)


def ldr(logits: Tensor, labels: Tensor, temperature: Positive = 1.0, margin: NonNegative = 0.1) -> Tensor:
    """Cross-entropy with a temperature and a margin (label-distributionally robust, LDR-KL).

    With temperature 1 and margin 0 it is cross-entropy less log V; near temperature 0 it is the hinge loss of the
    strongest other token.

    Formula: temperature log mean_k exp((z_k - z_y + margin [k != y]) / temperature)
    Source: Zhu et al. 2021, Label Distributionally Robust Losses, arXiv:2112.14869; defaults ours
    Helps: a margin above the other tokens; a temperature above 1 counts all wrong tokens more alike.
    Hurts: away from temperature 1 the model's probabilities are those at another temperature. No evidence in
        fine-tuning yet.

    Args:
        logits: (n, V), of the rows.
        labels: (n,), the targets.
        temperature: Near 0 the strongest other token alone counts.
        margin: How far the target's logit is wanted above the others.
    """
    scaled = _shifted(logits) / temperature
    # A margin on all others is one off the target.
    scaled.scatter_add_(1, labels[:, None], scaled.new_full((len(labels), 1), -margin / temperature))
    return temperature * (_cross_entropy(scaled, labels) - math.log(logits.shape[1]))


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


def entropy_adaptive(logits: Tensor, labels: Tensor, alpha: NonNegative = 1.0, k: NumberFrom2 = 20) -> Tensor:
    """Cross-entropy with the model's own uncertainty as weight: where it is sure, right or wrong, it is left alone.

    The uncertainty is the entropy H of the ``k`` likeliest tokens, as a fraction of the largest possible. The paper's
    code divides by 3.0, which is log 20 to 0.2%; Axolotl's ``use_eaft`` does not divide, so its values are about 3
    times as large with alpha 1.

    Formula: -sg(H / log k)^alpha log p, sg without gradient
    Source: Diao et al. 2026, Entropy-Adaptive Fine-Tuning, arXiv:2601.02151
    Helps: keeping what the base model can do, where the data contradict what it is sure of.
    Hurts: correcting a model that is sure and wrong, which it gives up on.

    Args:
        logits: (n, V), of the rows.
        labels: (n,), the targets.
        alpha: Power of the uncertainty; 0 is cross-entropy.
        k: How many of the likeliest tokens it is taken from.
    """
    top = logits.detach().topk(min(k, logits.shape[1]), sorted=False).values.softmax(1)
    weight = (torch.special.entr(top).sum(1) / math.log(k)) ** alpha
    return weight * _cross_entropy(logits, labels)


def confidence_penalty(logits: Tensor, labels: Tensor, coefficient: NonNegative = 0.1) -> Tensor:
    """Cross-entropy with a reward for entropy: the model does not become too sure.

    Formula: -log p - coefficient H, H = -sum_j p_j log p_j
    Source: Pereyra et al. 2017, Regularizing Neural Networks by Penalizing Confident Output Distributions,
        arXiv:1701.06548; the paper tunes the coefficient, default ours
    Helps: small data sets, on which the model would become overconfident, and the diversity of samples.
    Hurts: exact answers, as every other token is kept likelier than the data say.

    Args:
        logits: (n, V), of the rows.
        labels: (n,), the targets.
        coefficient: Of the entropy; 0 is cross-entropy.
    """
    logp = _log_softmax(logits)
    return coefficient * (logp.exp() * logp).sum(1) - _at(logp, labels)


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


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _at(values: Tensor, labels: Tensor) -> Tensor:
    """The entry of each row at its label."""
    return values.gather(1, labels[:, None]).squeeze(1)


def _shifted(logits: Tensor) -> Tensor:
    """Logits less the largest of their row, where a common offset does not count: far from 0 they have few digits."""
    return logits - logits.detach().amax(1, keepdim=True)


def _possible(logits: Tensor) -> Tensor:
    """How many tokens of each row are not ruled out."""
    return (logits.detach() != -torch.inf).sum(1)


def _finite(values: Tensor) -> Tensor:
    """The most negative number in the place of -inf, so that it times 0 is 0."""
    return values.clamp_min(torch.finfo(values.dtype).min)


def _log_softmax(logits: Tensor) -> Tensor:
    return _finite(logits.log_softmax(1))


@hookimpl
def cvloss_register_losses(register):  # type: ignore[no-untyped-def]
    for function in (asymmetric, squentropy, spherical_z, ldr, entropy_adaptive, confidence_penalty, gem):
        register(function.__name__, family="row")(function)
    register("sparsemax", family="row", requires="entmax")(sparsemax)
