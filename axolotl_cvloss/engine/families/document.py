"""Losses of a set of rows, from the log-probabilities of their targets."""

from typing import Any

from torch import Tensor

from ..family import Family, SetPart, of_each_set
from ..rows import REFERENCE
from ..sets import Sets
from ..terms import Term


class DocumentPart(SetPart):
    columns_only = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for term in self.terms:
            self.batch.sets(term)

    def values(self, term: Term, sets: Sets, logp: Tensor) -> Tensor:
        by_row = {"logp": sets.of_rows(logp)}
        if term.needs(REFERENCE):
            by_row[REFERENCE] = sets.of_rows(self.batch.statistics[REFERENCE])
        return of_each_set(term, sets, {}, by_row, a_class=False)


DOCUMENT = Family(
    name="document",
    words="One value a set of tokens, from the probabilities of their targets.",
    cost="two visits, frozen head: one",
    statistics={
        "logp": "(n,) log-probability of the target of each row of one set",
        REFERENCE: "(n,) the same under a reference model; no gradient",
        "rows": "the rows of all sets: sum(x) and mean(x) of (n,) over those of each set, (S,)",
    },
    per_set=True,
    part=DocumentPart,
)
