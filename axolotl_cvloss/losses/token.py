"""Losses of one row: functions of log p of the target.

Each takes ``logp`` (N,), float32 or float64, and returns one value a row, (N,). p is exp(logp).

Focal weighs the tokens up that the model gets wrong; dft, encouraging and gce weigh them down. Which of the two helps
depends on how much the model knows already and on how clean the data are.
"""

from typing import Literal

import torch
from torch import Tensor

from ..engine.numerics import log_one_minus_exp, one_minus_exp
from . import reference
from .bounds import AtLeastMinus1, Fraction, FractionBelow1, NonNegative, Positive, PositiveFraction
from .hookspecs import hookimpl


def cross_entropy(logp: Tensor, mean_logp: Tensor | None, label_smoothing: Fraction = 0.0) -> Tensor:
    """The negative log-likelihood of the target; with label smoothing, of a target mixed with the uniform one.

    Formula: -(1 - label_smoothing) log p - label_smoothing mean_j log p_j
    Source: label smoothing: Szegedy et al. 2016, arXiv:1512.00567
    Helps: nearly always; the usual loss, and the safe part of a mixture with any other.
    Hurts: where a few wrong labels have p near 0, as their gradient is as large as it gets; label smoothing spends
        probability on the whole vocabulary.

    Args:
        logp: (N,), log p of the target.
        mean_logp: (N,), mean of the log p of all tokens; None without label smoothing.
        label_smoothing: Share of the uniform distribution in the target.
    """
    if mean_logp is None:
        return -logp
    return -(1 - label_smoothing) * logp - label_smoothing * mean_logp


def focal(logp: Tensor, gamma: NonNegative = 2.0, alpha: Positive = 1.0) -> Tensor:
    """Cross-entropy with less weight on tokens the model already gets right.

    Formula: -alpha (1 - p)^gamma log p
    Source: Lin et al. 2017, Focal Loss for Dense Object Detection, arXiv:1708.02002
    Helps: where most tokens are easy and the few hard ones decide, as in formulas and short answers.
    Hurts: with wrong labels, which are the hardest tokens of all; and the model ends up less sure of what it knows.

    Args:
        logp: (N,), log p of the target.
        gamma: 0 is cross-entropy; a larger one leaves easy tokens out.
        alpha: Factor of the value.
    """
    # The derivative of 0^gamma is infinite for gamma < 1, and the value 0 * log p is 0: keep away from 0.
    return -alpha * one_minus_exp(logp).clamp_min(_tiny(logp)) ** gamma * logp


def self_adjusting_dice(
    logp: Tensor, alpha: NonNegative = 1.0, smooth: Positive = 1.0, detach_weight: bool = False
) -> Tensor:
    """Dice of a single token, with the weight (1 - p)^alpha on its probability.

    With alpha 1 the value rises again above p = 0.5, so alone it punishes confidence. ``detach_weight`` treats
    (1 - p)^alpha as a constant, and then it does not.

    Formula: 1 - (2 q + smooth) / (q + 1 + smooth), q = (1 - p)^alpha p
    Source: Li et al. 2020, Dice Loss for Data-imbalanced NLP Tasks, arXiv:1911.02855
    Helps: beside cross-entropy, where rare labels matter; published for tagging and classification.
    Hurts: alone, as its gradient vanishes at p = 0 and turns around at p = 1 / (1 + alpha).

    Args:
        logp: (N,), log p of the target.
        alpha: Power of the weight; 0 is the Dice loss of p.
        smooth: Added above and below.
        detach_weight: Whether the weight is a constant.
    """
    log_weight = alpha * one_minus_exp(logp).clamp_min(_tiny(logp)).log()
    log_q = logp + (log_weight.detach() if detach_weight else log_weight)
    return one_minus_exp(log_q) / (log_q.exp() + 1 + smooth)  # (1 - q) / (q + 1 + s), which does not cancel near 0


def poly(logp: Tensor, epsilon: AtLeastMinus1 = 1.0) -> Tensor:
    """Cross-entropy with another weight on the first term of its expansion in 1 - p; known as Poly-1.

    Formula: -log p + epsilon (1 - p)
    Source: Leng et al. 2022, PolyLoss, arXiv:2204.12511
    Helps: a small change of cross-entropy with one number to tune; published for images.
    Hurts: little; a larger epsilon makes the model surer of itself. No evidence in fine-tuning yet.

    Args:
        logp: (N,), log p of the target.
        epsilon: 0 is cross-entropy; -1 leaves the first term out.
    """
    return epsilon * one_minus_exp(logp) - logp


def gce(logp: Tensor, q: PositiveFraction = 0.7) -> Tensor:
    """Between cross-entropy (q near 0) and the mean absolute error 1 - p (q = 1): tokens with small p count less.

    The comp-sum loss of Mao et al. with tau = 1 + q.

    Formula: (1 - p^q) / q
    Source: Zhang and Sabuncu 2018, Generalized Cross Entropy Loss, arXiv:1805.07836; Mao et al. 2023, arXiv:2304.07288
    Helps: with wrong or noisy labels, as one of them cannot dominate.
    Hurts: where much is new to the model: the gradient is p^q times that of cross-entropy, so tokens with p near 0
        are hardly learnt.

    Args:
        logp: (N,), log p of the target.
        q: Near 0 it is cross-entropy, 1 is the mean absolute error.
    """
    return one_minus_exp(q * logp) / q


def encouraging(logp: Tensor, log_end: FractionBelow1 = 0.75) -> Tensor:
    """Cross-entropy with a bonus for tokens the model gets right: they go on being trained.

    Formula: -log p + b, b = log(1 - p) up to p = log_end, and its tangent at log_end beyond
    Source: Zhao et al. 2022, Well-classified Examples are Underestimated, arXiv:2110.06537
    Helps: where the model is mostly right and should become surer; the authors advise a low log_end where it is not.
    Hurts: calibration, and data with wrong labels that the model believes already; values are below 0.

    Args:
        logp: (N,), log p of the target.
        log_end: p from which on the bonus is a straight line.
    """
    end = 1 - log_end
    wrong = one_minus_exp(logp)
    return wrong.clamp_min(end).log() - (1 - wrong / end).clamp_min(0) - logp


def dft(logp: Tensor, beta: NonNegative = 1.0) -> Tensor:
    """Dynamic fine-tuning: cross-entropy with weight p^beta, held constant, so unlikely tokens count less.

    The gradient with beta 1 is that of -p, the mean absolute error; TRL and LLaMA-Factory have it with beta 1.

    Formula: -sg(p)^beta log p, sg without gradient
    Source: Wu et al. 2025, On the Generalization of SFT, arXiv:2508.05629; beta is ours, 1 is the paper's
    Helps: strong base models on data near to what they know, such as mathematics.
    Hurts: where much is new to the model, as tokens with p near 0 are hardly learnt; and its value is no measure of
        progress.

    Args:
        logp: (N,), log p of the target.
        beta: Power of the weight; 0 is cross-entropy.
    """
    return -(beta * logp).exp().detach() * logp


def z_regularized(logp: Tensor, lse: Tensor, coefficient: NonNegative = 1e-4) -> Tensor:
    """Cross-entropy with a penalty that keeps logits from drifting, known as z-loss.

    Formula: -log p + coefficient lse^2, lse = log sum_j exp(z_j)
    Source: Chowdhery et al. 2022, PaLM, arXiv:2204.02311
    Helps: long training in low precision, where logits drift.
    Hurts: little in short fine-tuning, where it rarely matters; a large coefficient pulls at the logits of a base model
        that was trained without it.

    Args:
        logp: (N,), log p of the target.
        lse: (N,), log of the sum of the exponentials of the row's logits.
        coefficient: Of its square; 0 is cross-entropy.
    """
    return coefficient * lse**2 - logp


def ldam(logp: Tensor, rarity: Tensor, max_margin: Positive = 0.5) -> Tensor:
    """Cross-entropy that asks rare tokens to win by a margin. How often tokens occur is counted in the training set.

    The paper's code also multiplies the logits by 30, as its network's are cosines; ours are not.

    Formula: cross-entropy after z_y <- z_y - m_y, m_y = max_margin (n_min / n_y)^(1/4), n_y the count of the target
    Source: Cao et al. 2019, Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, arXiv:1906.07413
    Helps: classes of very unequal size, in images. No evidence in fine-tuning yet.
    Hurts: most tokens are rare, so nearly all get a margin; the model becomes surer than the data say.

    Args:
        logp: (N,), log p of the target.
        rarity: (N,), (n_min / n_y)^(1/4).
        max_margin: That of the rarest token.
    """
    margin = max_margin * rarity
    # log of (p e^-m + 1 - p), which the margin makes of the sum of all exp(z)
    return margin - logp + (logp.exp() * torch.expm1(-margin)).log1p()


def thresholded(logp: Tensor, threshold: Fraction = 0.1, keep: Literal["above", "below"] = "above") -> Tensor:
    """Cross-entropy of the tokens whose p is at least a threshold, or of the others (``keep: below``).

    The mean is over all trained tokens, those that are left out too. The second source divides by those that are kept.

    Formula: -log p where sg(p) >= threshold (keep: above) or sg(p) < threshold (keep: below), else 0
    Source: Liu et al. 2026, ProFit, arXiv:2601.09195; Beyond Log Likelihood, 2025, arXiv:2510.00526
    Helps: above: strong base models on data near to what they know, where unlikely tokens are a matter of wording.
    Hurts: above: what is new to the model is never learnt, as a token below the threshold gets no gradient at all.

    Args:
        logp: (N,), log p of the target.
        threshold: 0 with ``keep: above`` is cross-entropy.
        keep: Which tokens train.
    """
    left_out = logp.exp() < threshold if keep == "above" else logp.exp() >= threshold
    return -logp.masked_fill(left_out, 0)


def unlikelihood(logp: Tensor) -> Tensor:
    """Moves probability away from the target: for text that the model must not write.

    ``where``, a column of 0 and 1 in the dataset, says which tokens these are; without it, all that are trained.

    Formula: -log(1 - p)
    Source: Welleck et al. 2019, Neural Text Generation with Unlikelihood Training, arXiv:1908.04319; on marked tokens
        beside cross-entropy on the others: SLUNG, arXiv:2505.03052
    Helps: tokens that are marked as bad (toxic, wrong, repeated) in a text whose other tokens are trained as usual.
    Hurts: on any text that is right, and beside cross-entropy on the same tokens, which it undoes.

    Args:
        logp: (N,), log p of the target.
    """
    return -log_one_minus_exp(logp)


def weighted_cross_entropy(logp: Tensor, scarcity: Tensor, power: NonNegative = 0.5, cap: Positive = 10.0) -> Tensor:
    """Cross-entropy with more weight on rare tokens. How often tokens occur is counted in the training set.

    Formula: -min(cap, (n_mean / n_y)^power) log p, n_y the count of the target, n_mean the mean of those that occur
    Source: the usual weights of classes in segmentation; power and cap ours
    Helps: rare tokens that decide an answer, such as one class name of many.
    Hurts: most tokens are rare by chance, and become too likely; punctuation and the end of the text, which are
        frequent, count least. No evidence in fine-tuning yet.

    Args:
        logp: (N,), log p of the target.
        scarcity: (N,), n_mean / n_y.
        power: 0 is cross-entropy, 1 gives each token of the vocabulary the same weight in sum.
        cap: Largest weight.
    """
    return -(scarcity**power).clamp_max(cap) * logp


def anchored(logp: Tensor, reference_logp: Tensor, coefficient: NonNegative = 0.1) -> Tensor:
    """dft, with a pull back to a reference model: an estimate of the KL divergence from the reference, on the target.

    The gradient of the pull in log p is coefficient (1 - p_ref / p). The source has the divergence over the whole
    vocabulary, which the reference's log-probabilities of the targets alone do not tell.

    Formula: -sg(p) log p + coefficient (e^r - 1 - r), r = clamp(log p_ref - log p, -20, 20), sg without gradient
    Source: Anchored Supervised Fine-Tuning (ASFT), 2025, arXiv:2509.23753; the estimate k3 is Schulman's
    Helps: as dft, with less drift from the base model; its authors' experiments, with the whole divergence.
    Hurts: where much is new to the model, as dft; and where the model comes to believe a token far less than the
        reference does, e^r makes the gradient large.

    Args:
        logp: (N,), log p of the target.
        reference_logp: (N,), the same under the reference model.
        coefficient: Of the pull; 0 is dft.
    """
    r = (reference_logp - logp).clamp(-20, 20)
    return dft(logp) + coefficient * (r.expm1() - r)


def prior_weighted(logp: Tensor, reference_logp: Tensor) -> Tensor:
    """Cross-entropy with the probability that a reference model gives the target as weight: dft with a fixed weight.

    Formula: -p_ref log p
    Source: PriFT, 2026, arXiv:2606.09396
    Helps: as dft, and the weights do not follow the model that trains; its authors' experiments.
    Hurts: where much is new to the reference, as those tokens are hardly learnt, however long the training.

    Args:
        logp: (N,), log p of the target.
        reference_logp: (N,), the same under the reference model.
    """
    return -reference_logp.exp() * logp


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


@hookimpl
def cvloss_register_losses(register):  # type: ignore[no-untyped-def]
    smoothing = {"mean_logp": "label_smoothing"}
    register("cross_entropy", family="token", reference=reference.cross_entropy, only_if=smoothing)(cross_entropy)
    register("focal", family="token", reference=reference.focal)(focal)
    register("self_adjusting_dice", family="token", reference=reference.self_adjusting_dice)(self_adjusting_dice)
    register("ldam", family="token")(ldam)
    for function in (poly, gce, encouraging, dft, z_regularized, thresholded, unlikelihood, weighted_cross_entropy):
        register(function.__name__, family="token")(function)
    register("anchored", family="token")(anchored)
    register("prior_weighted", family="token")(prior_weighted)
