"""Two losses as a package of their own."""

import math
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from axolotl_cvloss import hookimpl


def huberised(logp: Tensor, tau: Annotated[float, Gt(1)] = 10.0) -> Tensor:
    """Cross-entropy with a bounded gradient in p, for wrong labels.

    Formula: -log p where p > 1 / tau, and its tangent there, log tau + 1 - tau p, elsewhere
    Source: Menon et al. 2020, Can gradient clipping mitigate label noise?
    """
    return torch.where(logp > -math.log(tau), -logp, math.log(tau) + 1 - tau * logp.exp())


def fowlkes_mallows(intersection: Tensor, predicted: Tensor, labelled: Tensor) -> Tensor:
    """The geometric mean of precision and recall of each class, where Dice takes the harmonic one.

    Formula: 1 - I_c / sqrt(S_c N_c), mean over c
    Source: Fowlkes and Mallows 1983, A method for comparing two hierarchical clusterings
    """
    return 1 - intersection / (predicted * labelled).sqrt()


@hookimpl
def cvloss_register_losses(register):
    register("huberised", family="token")(huberised)
    register("fowlkes_mallows", family="region")(fowlkes_mallows)
