"""Losses of the sorted errors of each class of a set of rows."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..batch import Chunk, Group
from ..entries import Entries, collect_entries, sorted_errors
from ..family import Family, SetPart, checked
from ..sets import Sets, Window
from ..terms import Term


class RankingPart(SetPart):
    columns_only = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for term in self.terms:
            self.batch.sets(term)
        self._entries: dict[str, Entries] = {}  # by the name of a term

    def finish(self) -> None:
        for term in self.terms:
            windows = self.batch.windows((term.rows, term.per))
            tolerance = term.parameters.get("tolerance", 0.0)
            logp = self.batch.statistics["logp"]
            self._entries[term.name] = collect_entries(self.batch.sets(term), logp, tolerance, windows, self.batch.p_at)

    def leaves(self, rows: slice) -> list[Tensor]:
        return [entries.values for entries in self._entries.values()]

    def values(self, term: Term, sets: Sets, logp: Tensor) -> Tensor:
        labelled = sets.labelled.to(logp.dtype)
        errors = sorted_errors(sets, logp, self._entries[term.name])
        value = term({"labelled": labelled, **errors})
        return sets.classes.mean(checked(term, value, {"one value a class": labelled.shape}))

    def take(self, rows: slice, cotangents: Sequence[Tensor]) -> None:
        self._cotangents = dict(zip(self._entries, cotangents, strict=True))

    def columns(self, group: Group, chunk: Chunk, window: Window, cotangent: Tensor | None) -> Tensor | None:
        for term in self.terms:
            if (term.rows, term.per) != group:
                continue
            if cotangent is None:
                cotangent = self.batch.loss.new_zeros(len(window.row_set), len(window.columns))
            entries = self._entries[term.name]
            part = entries.chunks[chunk.number]
            at = entries.rows[part], entries.columns[part]
            cotangent.index_put_(at, self._cotangents[term.name][part], accumulate=True)
        return cotangent


RANKING = Family(
    name="ranking",
    words="One value a set of tokens, from the errors of each class in their order.",
    cost="two visits, frozen head: one",
    statistics={
        "errors": "(M,) errors, by class and from large to small within a class",
        "foreground": "(M,) bool, whether the row of an error is labelled with the class",
        "segment": "(M,) index 0..C-1 of the class of an error",
        "labelled": "(C,) number of rows labelled with the class",
    },
    per_set=True,
    flat=True,
    part=RankingPart,
)
