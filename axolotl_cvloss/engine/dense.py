"""Losses written the plain way, on all logits of a set: autograd does the rest, and keeps what it needs in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..rows import Rows
from .compute import Outcome, sets_of
from .evaluate import Term
from .sources import statistics_dtype


def add_dense(
    outcome: Outcome,
    logits: Tensor,
    terms: Sequence[Term],
    rows: Rows,
    counts: dict[str, int],
    denominators: dict[str, Tensor | float],
) -> Outcome:
    """The outcome of the other terms with the dense ones added; differentiable in ``logits`` (..., V)."""
    flat = logits.reshape(-1, logits.shape[-1])
    loss = outcome.loss + flat[:0].sum()
    for term in terms:
        sets = sets_of(rows, term.scope, term.per, flat.shape[1])
        outcome.means[term.name] = loss.new_zeros(())
        outcome.sets[term.name] = sets.counted()
        own = rows.index[sets.members].split(sets.counts)
        for index, labels, size in zip(own, rows.labels[sets.members].split(sets.counts), sets.parts, strict=True):
            value = _value(term, flat[index].to(statistics_dtype(flat.dtype)), labels) * size
            outcome.means[term.name] += value.detach() / max(1, counts[term.scope])
            loss = loss + term.weight * value / denominators[term.scope]
    outcome.loss = loss
    return outcome


def _value(term: Term, logits: Tensor, labels: Tensor) -> Tensor:
    probabilities = logits.softmax(1) if term.needs("probabilities") else logits
    value = term(logits=logits, probabilities=probabilities, labels=labels)
    if value.shape not in (torch.Size(), labels.shape):
        raise ValueError(
            f"loss {term.loss.name!r} must return a scalar or one value a row, shape {tuple(labels.shape)}, "
            f"not {tuple(value.shape)}"
        )
    return value.mean()
