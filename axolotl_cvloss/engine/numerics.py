"""Functions of log-probabilities that keep their digits, value and derivative, in float32 too."""

import math

import torch
from torch import Tensor

LOG_HALF = -math.log(2)


def one_minus_exp(x: Tensor) -> Tensor:
    """1 - exp(x) for x <= 0: 1 - p from log p.

    expm1 alone is right in its value only: torch forms its derivative as 1 + expm1(x), which cancels where p is small,
    and 1 - exp(x) cancels where p is near 1.
    """
    return torch.where(x > LOG_HALF, -x.expm1(), 1 - x.exp())


def log_one_minus_exp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, log(1 - p) from log p; at p = 1 the log of the smallest number, without gradient."""
    tiny = torch.finfo(x.dtype).tiny
    return torch.where(x > LOG_HALF, (-x.expm1()).clamp_min(tiny).log(), (-x.clamp_max(LOG_HALF).exp()).log1p())
