"""Losses written the plain way, on all logits of a set: autograd does the rest, and keeps what it needs in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import Batch
from ..family import Family, checked
from ..gradient import statistics_dtype
from ..terms import Term


def _on_logits(terms: Sequence[Term], logits: Tensor, batch: Batch) -> Tensor:
    flat = logits.reshape(-1, logits.shape[-1])
    loss = flat[:0].sum()
    batch.gradient = logits.requires_grad  # so far it said what the terms of other families want
    for term in terms:
        sets = batch.sets(term)
        sizes = sets.rows.sizes.tolist()
        index = batch.rows.index[sets.members].split(sizes)
        labels = batch.rows.labels[sets.members].split(sizes)
        values = [_value(term, flat[i].to(statistics_dtype(flat.dtype)), y) for i, y in zip(index, labels, strict=True)]
        if values:
            loss = loss + batch.set_total(term, sets, torch.stack(values))
    return loss


DENSE = Family(
    name="dense",
    words="Written on all logits of a set of tokens.",
    cost="all logits in memory",
    statistics={
        "logits": "(n, V) logits of the rows of one set, float32 or float64",
        "probabilities": "(n, V) their softmax",
        "labels": "(n,) their targets",
    },
    per_set=True,
    on_logits=_on_logits,
)


def _value(term: Term, logits: Tensor, labels: Tensor) -> Tensor:
    probabilities = logits.softmax(1) if term.needs("probabilities") else logits
    value = term({"logits": logits, "probabilities": probabilities, "labels": labels})
    return checked(term, value, {"a scalar": (), "one value a row": labels.shape}).mean()
