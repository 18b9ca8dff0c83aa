"""Losses of one row: functions of log p of the target.

Each takes ``logp`` (N,), float32 or float64, and returns one value a row, (N,). p is exp(logp).

Focal weighs the tokens up that the model gets wrong; dft, encouraging and gce weigh them down. Which of the two helps
depends on how much the model knows already and on how clean the data are.
"""

import torch
from torch import Tensor

from ..engine.numerics import one_minus_exp
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
    """
    log_weight = alpha * one_minus_exp(logp).clamp_min(_tiny(logp)).log()
    log_q = logp + (log_weight.detach() if detach_weight else log_weight)
    return one_minus_exp(log_q) / (log_q.exp() + 1 + smooth)  # (1 - q) / (q + 1 + s), which does not cancel near 0


def poly(logp: Tensor, epsilon: AtLeastMinus1 = 1.0) -> Tensor:
    """Cross-entropy with another weight on the first term, 1 - p, of its expansion in powers of 1 - p (Poly-1).

    Formula: -log p + epsilon (1 - p)
    Source: Leng et al. 2022, PolyLoss, arXiv:2204.12511
    Helps: a small change of cross-entropy with one number to tune; published for images.
    Hurts: little; a larger epsilon makes the model surer of itself. No evidence in fine-tuning yet.
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
    """
    return one_minus_exp(q * logp) / q


def encouraging(logp: Tensor, log_end: FractionBelow1 = 0.75) -> Tensor:
    """Cross-entropy with a bonus for tokens the model gets right, so that they go on being trained.

    Formula: -log p + b, b = log(1 - p) up to p = log_end, and its tangent at log_end beyond
    Source: Zhao et al. 2022, Well-classified Examples are Underestimated, arXiv:2110.06537
    Helps: where the model is mostly right and should become surer; the authors advise a low log_end where it is not.
    Hurts: calibration, and data with wrong labels that the model believes already; values are below 0.
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
    """
    return -(beta * logp).exp().detach() * logp


def z_regularized(logp: Tensor, lse: Tensor, coefficient: NonNegative = 1e-4) -> Tensor:
    """Cross-entropy with a penalty that keeps logits from drifting, known as z-loss.

    Formula: -log p + coefficient lse^2, lse = log sum_j exp(z_j)
    Source: Chowdhery et al. 2022, PaLM, arXiv:2204.02311
    Helps: long training in low precision, where logits drift.
    Hurts: little in short fine-tuning, where it rarely matters; a large coefficient pulls at the logits of a base model
        that was trained without it.
    """
    return coefficient * lse**2 - logp


def ldam(logp: Tensor, rarity: Tensor, max_margin: Positive = 0.5) -> Tensor:
    """Cross-entropy that asks rare tokens to win by a margin. How often tokens occur is counted in the training set.

    The paper's code also multiplies the logits by 30, as its network's are cosines; ours are not.

    Formula: cross-entropy after z_y <- z_y - m_y, m_y = max_margin (n_min / n_y)^(1/4), n_y the count of the target
    Source: Cao et al. 2019, Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, arXiv:1906.07413
    Helps: classes of very unequal size, in images. No evidence in fine-tuning yet.
    Hurts: most tokens are rare, so nearly all get a margin; the model becomes surer than the data say.
    """
    margin = max_margin * rarity
    # log of (p e^-m + 1 - p), which the margin makes of the sum of all exp(z)
    return margin - logp + (logp.exp() * torch.expm1(-margin)).log1p()


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


@hookimpl
def cvloss_register_losses(register):  # type: ignore[no-untyped-def]
    smoothing = {"mean_logp": "label_smoothing"}
    register("cross_entropy", family="token", reference=reference.cross_entropy, only_if=smoothing)(cross_entropy)
    register("focal", family="token", reference=reference.focal)(focal)
    register("self_adjusting_dice", family="token", reference=reference.self_adjusting_dice)(self_adjusting_dice)
    for function in (poly, gce, encouraging, dft, z_regularized, ldam):
        register(function.__name__, family="token")(function)
