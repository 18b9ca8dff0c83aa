"""Losses of one row: functions of log p of the target.

Each takes ``logp`` (N,), float32 or float64, and returns one value a row, (N,). p is exp(logp).
"""

import torch
from torch import Tensor

from ..hookspecs import hookimpl
from . import reference
from .bounds import Fraction, NonNegative, Positive


def cross_entropy(logp: Tensor, lse: Tensor, mean_logit: Tensor | None, label_smoothing: Fraction = 0.0) -> Tensor:
    """The negative log-likelihood of the target; with label smoothing, of a target mixed with the uniform one.

    Formula: -(1 - label_smoothing) log p - label_smoothing mean_j log p_j
    Source: label smoothing: Szegedy et al. 2016, arXiv:1512.00567
    """
    if mean_logit is None:
        return -logp
    return -(1 - label_smoothing) * logp - label_smoothing * (mean_logit - lse)


def focal(logp: Tensor, gamma: NonNegative = 2.0, alpha: Positive = 1.0) -> Tensor:
    """Cross-entropy with less weight on tokens the model already gets right.

    Formula: -alpha (1 - p)^gamma log p
    Source: Lin et al. 2017, Focal Loss for Dense Object Detection, arXiv:1708.02002
    """
    wrong = -logp.expm1()  # 1 - p without cancellation near p = 1
    # The derivative of 0^gamma is infinite for gamma < 1, and the value 0 * log p is 0: keep away from 0.
    return -alpha * wrong.clamp_min(_tiny(logp)) ** gamma * logp


def self_adjusting_dice(
    logp: Tensor, alpha: NonNegative = 1.0, smooth: Positive = 1.0, detach_weight: bool = False
) -> Tensor:
    """Dice of a single token, with the weight (1 - p)^alpha on its probability.

    With alpha 1 the value rises again above p = 0.5, so alone it punishes confidence. ``detach_weight`` treats
    (1 - p)^alpha as a constant, and then it does not.

    Formula: 1 - (2 q + smooth) / (q + 1 + smooth), q = (1 - p)^alpha p
    Source: Li et al. 2020, Dice Loss for Data-imbalanced NLP Tasks, arXiv:1911.02855
    """
    weight = (-logp.expm1()).clamp_min(_tiny(logp)) ** alpha
    q = (weight.detach() if detach_weight else weight) * logp.exp()
    return 1 - (2 * q + smooth) / (q + 1 + smooth)


def _tiny(x: Tensor) -> float:
    return torch.finfo(x.dtype).tiny


@hookimpl
def cvloss_register_losses(register):  # type: ignore[no-untyped-def]
    smoothing = {"mean_logit": "label_smoothing"}
    register("cross_entropy", family="token", reference=reference.cross_entropy, only_if=smoothing)(cross_entropy)
    register("focal", family="token", reference=reference.focal)(focal)
    register("self_adjusting_dice", family="token", reference=reference.self_adjusting_dice)(self_adjusting_dice)
