"""The losses as the paper's own code has them, on the logits and labels of a batch, ignored rows and all.

Not a family to register losses in: with ``reference: true`` the form that a loss has there takes its place.
"""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..batch import Batch
from ..family import Family
from ..gradient import statistics_dtype
from ..rows import COMPLETION, IGNORE_INDEX
from ..terms import Loss, Term


def _on_logits(terms: Sequence[Term], logits: Tensor, batch: Batch) -> Tensor:
    logits = (logits if logits.dim() == 3 else logits[None]).to(statistics_dtype(logits.dtype))
    loss = logits.flatten()[:0].sum()
    if not batch.counts[COMPLETION]:
        return loss
    everything = batch.rows.aligned.new_full((batch.rows.aligned.numel(),), IGNORE_INDEX)
    everything[batch.rows.index] = batch.rows.labels
    for term in terms:
        target = batch.rows.aligned if term.rows == COMPLETION else everything.view_as(batch.rows.aligned)
        # The paper's training step cuts off the columns before the first labelled token of the batch.
        first = int((target != IGNORE_INDEX).any(0).nonzero()[0]) if batch.rows.shifted else 0
        value = term({"logits": logits[:, first:], "labels": target[:, first:]}) * batch.counts[term.rows]
        batch.report(term, value)
        loss = loss + term.weight * value / batch.denominators[term.rows]
    return loss


PAPER = Family(
    name="paper",
    words="The paper's own code, on all logits of a batch.",
    cost="all logits in memory",
    statistics={
        "logits": "(B, T, V) logits, float32 or float64",
        "labels": "(B, T) labels in line with them, -100 for rows to ignore",
    },
    on_logits=_on_logits,
)


def as_in_the_paper(loss: Loss) -> Loss:
    """The form that a loss has in the paper's code, as a loss."""
    form = loss.reference
    assert form is not None  # the config has seen to it
    known = inspect.signature(form).parameters

    def function(logits: Tensor, labels: Tensor, **parameters: Any) -> Tensor:
        return form(logits, labels, **{name: value for name, value in parameters.items() if name in known})

    return replace(loss, kind=PAPER, function=function, statistics=("logits", "labels"), only_if={})
