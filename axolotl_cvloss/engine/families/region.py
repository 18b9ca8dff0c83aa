"""Losses of a set of rows, from sums over the classes of the set."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import ranks
from ..batch import Chunk, Group
from ..family import Family, SetPart, of_each_set
from ..sets import Sets, Window
from ..terms import Term
from ..views import View


class RegionPart(SetPart):
    columns_only = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._predicted = {
            (term.rows, term.per): self.batch.loss.new_zeros(len(self.batch.sets(term).labelled)) for term in self.terms
        }

    def see_p(self, chunk: Chunk, view: View) -> None:
        for group, sums in self._predicted.items():
            if (window := self.batch.windows(group)[chunk.number]) is not None:
                sums[window.pairs] += window.sums(view.p_at(window.columns))

    def finish(self) -> None:
        for group, sums in self._predicted.items():
            if self.batch.groups[group].joint:
                self._predicted[group] = ranks.sum_over(sums)

    def leaves(self, rows: slice) -> list[Tensor]:
        return list(self._predicted.values())

    def values(self, term: Term, sets: Sets, logp: Tensor) -> Tensor:
        by_class = {
            "intersection": sets.intersection(logp),
            "predicted": self._predicted[term.rows, term.per],
            "labelled": sets.labelled.to(logp.dtype),
        }
        by_row = {"logp": sets.of_rows(logp)} if term.needs("logp") else {}
        return of_each_set(term, sets, by_class, by_row, a_class=True)

    def take(self, rows: slice, cotangents: Sequence[Tensor]) -> None:
        self._cotangents = dict(zip(self._predicted, cotangents, strict=True))

    def columns(self, group: Group, chunk: Chunk, window: Window, cotangent: Tensor | None) -> Tensor | None:
        if group not in self._predicted:
            return cotangent
        own = window.lookup(self._cotangents[group], 0)[window.row_set]
        return own if cotangent is None else cotangent.add_(own)


REGION = Family(
    name="region",
    words="One value a set of tokens, from sums over each class of the set.",
    cost="two visits, frozen head: one",
    statistics={
        "intersection": "(C,) probability of class c summed over the rows labelled c",
        "predicted": "(C,) probability of class c summed over all rows of the set",
        "labelled": "(C,) number of rows labelled c",
        "logp": "(n,) log-probability of the target of each row of the set",
        "classes": "the classes of all sets: sum(x) and mean(x) of (C,) over those of each set, (S,)",
        "rows": "the rows of all sets: sum(x) and mean(x) of (n,) over those of each set, (S,)",
    },
    per_set=True,
    flat=True,
    part=RegionPart,
)
