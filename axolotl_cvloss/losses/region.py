"""Losses of a set of rows: functions of class sums.

A set is a document (or the micro-batch); its classes c are the tokens that occur among its labels. Each loss takes
``intersection`` I, ``predicted`` S and ``labelled`` N, each (C,), float32 or float64, and returns a value a class,
(C,), whose mean is the value of the set, or the value of the set, a scalar.
"""

from torch import Tensor

from ..hookspecs import hookimpl
from . import reference
from .bounds import NonNegative


def generalized_dice(
    intersection: Tensor, predicted: Tensor, labelled: Tensor, smooth: NonNegative = 1e-5
) -> Tensor:
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
