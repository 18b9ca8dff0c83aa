"""Weights of documents from their losses.

A set of D documents has losses L (D,) and masses m (D,), float64 in main memory: what each counts by without weights,
such as 1 or its number of rows. All weights here have the mean 1 by mass, so that what sums are divided by stays as it
is. They are constants: no gradient goes through them.
"""

import math

import torch
from torch import Tensor

from . import ranks


def reweighted(losses: Tensor, masses: Tensor, by: str, r: float) -> Tensor:
    """Weights that go with the softmax of f(h) / r, where h is -1 at the smallest loss of the set and 1 at the largest.

    Formula: f = min(h + 1, 1) (linear), 1 - h^2 (quadratic) or |h| (extremes)
    Source: Sow et al. 2025, Dynamic Loss-Based Sample Reweighting, arXiv:2502.06733
    """
    low, high = losses.min(), losses.max()
    h = torch.zeros_like(losses) if low == high else (2 * losses - high - low) / (high - low)
    f = {"linear": (h + 1).clamp(max=1), "quadratic": 1 - h**2, "extremes": h.abs()}[by]
    weights = ((f - f.max()) / r).exp()
    return weights * masses.sum() / (weights * masses).sum()


def worst(losses: Tensor, masses: Tensor, share: float, reg: float) -> Tensor:
    """Weights whose mean of the losses is that of the worst share of the documents (conditional value at risk).

    Documents of equal losses have equal weights. With ``reg`` the weights are the smooth form,
    min(exp((L - eta) / reg), 1 / share), where eta makes their mean 1.

    Source: Levy et al. 2020, Large-Scale Methods for Distributionally Robust Optimization, arXiv:2010.05893
    """
    order = losses.argsort(descending=True, stable=True)
    masses = masses[order] / masses.sum()
    before = masses.cumsum(0) - masses  # of the documents with larger losses
    if reg:
        # The first k have the largest weight there is; eta follows from the others. The least k for which these stay
        # below it is right.
        scaled = losses[order] / reg
        rest = (masses.log() + scaled).flip(0).logcumsumexp(0).flip(0)
        eta = rest - torch.log1p(-(before / share).clamp(max=1))
        fits = scaled - eta <= -math.log(share) + 1e-12 * scaled.abs().clamp_min(1)
        fits[before >= share] = False
        k = int(fits.nonzero()[0]) if fits.any() else int((before < share).sum()) - 1
        found = (scaled - eta[k]).exp().clamp(max=1 / share)
        found[:k] = 1 / share
    else:
        group = torch.unique_consecutive(losses[order], return_inverse=True)[1]
        whole = torch.zeros_like(losses).index_add_(0, group, masses)
        kept = torch.minimum(whole, (share - (whole.cumsum(0) - whole)).clamp_min(0))
        found = (kept / (share * whole))[group]
    return torch.empty_like(losses).index_copy_(0, order, found / (found * masses).sum())


def of_all_processes(losses: Tensor, masses: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and masses of the documents of all processes, and which of them are here, bool."""
    if ranks.world_size() == 1:
        return losses, masses, torch.ones(len(losses), dtype=torch.bool)
    here = torch.distributed.get_rank()
    every = ranks.joined(torch.stack([losses, masses, torch.full_like(losses, here)], 1).to(device)).cpu()
    return every[:, 0], every[:, 1], every[:, 2] == here
