"""Losses of a set of rows: functions of class sums.

A set is a document (or the micro-batch); its classes c are the tokens that occur among its labels. Each loss takes
``intersection`` I, ``predicted`` S and ``labelled`` N, each (C,), float32 or float64, and returns a value a class,
(C,), whose mean is the value of the set, or the value of the set, a scalar.
"""

from torch import Tensor

from ..hookspecs import hookimpl
from . import reference
from .bounds import NonNegative, Positive


def tversky(
    intersection: Tensor,
    predicted: Tensor,
    labelled: Tensor,
    alpha: NonNegative = 0.3,
    beta: Positive = 0.7,
    smooth: NonNegative = 1.0,
) -> Tensor:
    """Overlap with a price of its own for false positives (``alpha``) and for misses (``beta``).

    Formula: 1 - (I_c + smooth) / (I_c + alpha (S_c - I_c) + beta (N_c - I_c) + smooth), mean over c
    Source: Salehi et al. 2017, Tversky loss function for image segmentation, arXiv:1706.05721
    """
    false = alpha * (predicted - intersection) + beta * (labelled - intersection)
    return 1 - (intersection + smooth) / (intersection + false + smooth)


def dice(intersection: Tensor, predicted: Tensor, labelled: Tensor, smooth: NonNegative = 1.0) -> Tensor:
    """Dice coefficient of each class.

    Formula: 1 - (2 I_c + smooth) / (S_c + N_c + smooth), mean over c
    Source: Milletari et al. 2016, V-Net, arXiv:1606.04797
    """
    return tversky(intersection, predicted, labelled, alpha=0.5, beta=0.5, smooth=smooth / 2)


def jaccard(intersection: Tensor, predicted: Tensor, labelled: Tensor, smooth: NonNegative = 1.0) -> Tensor:
    """Intersection over union of each class.

    Formula: 1 - (I_c + smooth) / (S_c + N_c - I_c + smooth), mean over c
    Source: Rahman and Wang 2016, Optimizing Intersection-Over-Union in Deep Neural Networks
    """
    return tversky(intersection, predicted, labelled, alpha=1.0, beta=1.0, smooth=smooth)


def generalized_dice(intersection: Tensor, predicted: Tensor, labelled: Tensor, smooth: NonNegative = 1e-5) -> Tensor:
    """Dice over all classes at once, each weighted by the inverse of its squared size.

    Formula: 1 - (2 sum_c w_c I_c + smooth) / (sum_c w_c (S_c + N_c) + smooth), w_c = 1 / N_c^2
    Source: Sudre et al. 2017, Generalised Dice overlap, arXiv:1707.03237
    """
    weight = labelled**-2
    overlap = (weight * intersection).sum()
    return 1 - (2 * overlap + smooth) / ((weight * (predicted + labelled)).sum() + smooth)


@hookimpl
def cvloss_register_losses(register):  # type: ignore[no-untyped-def]
    register("generalized_dice", family="region", reference=reference.generalized_dice)(generalized_dice)
    for function in (dice, jaccard, tversky):
        register(function.__name__, family="region")(function)
