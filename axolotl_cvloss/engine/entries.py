"""The errors a ranking term can see: a few of the p at the present classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ranks
from .numerics import one_minus_exp
from .sets import Sets, Window


@dataclass
class Entries:
    """Errors of rows at classes that are not theirs, for a ranking term: the few that matter, chunk after chunk."""

    values: Tensor  # (M,) p_i[c]
    pairs: Tensor  # (M,) the pair (set of i, c)
    rows: Tensor  # (M,) i within its chunk
    columns: Tensor  # (M,) c within the columns of the chunk's window
    chunks: list[slice]  # of M, one a chunk


def collect_entries(
    sets: Sets,
    logp: Tensor,
    tolerance: float,
    windows: Sequence[Window | None],
    p_at: Callable[[int, Window], Tensor],
) -> Entries:
    """The errors of other rows at the present classes, at or above the smallest error among the rows of the class.

    Below that one the Jaccard loss of the class stays 1, so nothing counts any more.

    Args:
        logp: (N,) log-probabilities of the targets.
        tolerance: Errors below it are left out too.
        windows: One a chunk.
        p_at: Gives p of the rows of chunk number i at the columns of its window.
    """
    own = one_minus_exp(logp[sets.members])
    limit = own.new_full((len(sets.labelled),), torch.inf).scatter_reduce(0, sets.row_pair, own, "amin")
    if sets.joint:
        limit = ranks.least_of(limit)
    limit.clamp_min_(tolerance)
    numbers = torch.arange(len(limit), device=limit.device)
    found = [(logp[:0], numbers[:0], numbers[:0], numbers[:0])]
    chunks, count = [], 0
    for number, window in enumerate(windows):
        if window is not None:
            p = p_at(number, window)
            keep = (p >= window.lookup(limit, torch.inf)[window.row_set]) & (p > 0)
            keep.scatter_(1, window.own_column[:, None], False)
            rows, columns = keep.nonzero(as_tuple=True)
            pairs = window.lookup(numbers, -1)[window.row_set[rows], columns]
            found.append((p[rows, columns], pairs, rows, columns))
        size = len(found[-1][0]) if window is not None else 0
        chunks.append(slice(count, count + size))
        count += size
    values, pairs, rows, columns = (torch.cat(part) for part in zip(*found, strict=True))
    return Entries(values, pairs, rows, columns, chunks)


def sorted_errors(sets: Sets, logp: Tensor, entries: Entries) -> dict[str, Tensor]:
    """All errors that matter, by pair and from large to small."""
    own = one_minus_exp(logp[sets.members])
    errors = torch.cat([own, entries.values])
    segment = torch.cat([sets.row_pair, entries.pairs])
    foreground = torch.arange(len(errors), device=errors.device) < len(own)
    if sets.joint:
        errors, segment, foreground = (ranks.joined(part) for part in (errors, segment, foreground))
    order = errors.detach().argsort(descending=True)
    order = order[segment[order].argsort(stable=True)]
    return {"errors": errors[order], "segment": segment[order], "foreground": foreground[order]}
