"""Losses of the sorted errors of each class of a set of rows.

The error of row i at class c is 1 - p_i[c] where the row is labelled c, and p_i[c] elsewhere. The engine hands over
the errors that can matter: those at or above the smallest error among the rows labelled c.
"""

import torch
from torch import Tensor

from . import reference
from .bounds import Fraction
from .hookspecs import hookimpl


def lovasz(errors: Tensor, foreground: Tensor, segment: Tensor, labelled: Tensor, tolerance: Fraction = 0.0) -> Tensor:
    """The Lovasz extension of the Jaccard loss, for each class; a surrogate of the intersection over union.

    ``tolerance`` leaves out errors of other rows below it; the value of a class changes by at most as much.

    Formula: mean over c of sum_k e_(k) (J_k - J_(k-1)), errors e sorted downwards, J_k the Jaccard loss when the
        k largest errors are the mistakes
    Source: Berman et al. 2018, The Lovasz-Softmax loss, arXiv:1705.08790
    Helps: exact match on short answers and formulas, beside cross-entropy: the paper names it with focal as the
        losses that gain most.
    Hurts: alone, as it is flat where the model is far off; long free text has had little testing.

    Args:
        errors: (M,), the errors of all classes, class after class, each sorted downwards.
        foreground: (M,), whether the row of the error is labelled with the class.
        segment: (M,), the class of the error.
        labelled: (C,), number of rows labelled with the class.
        tolerance: Errors of other rows below it are left out; read by the engine, not here.
    """
    first = torch.searchsorted(segment, torch.arange(len(labelled), device=segment.device))
    hits = _running_count(foreground, first, segment)
    misses = _running_count(~foreground, first, segment)
    total = labelled[segment]
    jaccard = 1 - (total - hits) / (total + misses)
    before = jaccard.roll(1)
    before[first] = 0
    return torch.zeros_like(labelled).index_add(0, segment, errors * (jaccard - before))


def _running_count(chosen: Tensor, first: Tensor, segment: Tensor) -> Tensor:
    """How many are chosen up to each place of its segment; ``first`` holds the first place of each segment."""
    running = chosen.long().cumsum(0)
    return running - (running - chosen.long())[first][segment]


@hookimpl
def cvloss_register_losses(register):  # type: ignore[no-untyped-def]
    register("lovasz", family="ranking", reference=reference.lovasz)(lovasz)
