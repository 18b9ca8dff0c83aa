"""Losses of one row, from a few numbers of the row."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..family import Family, Part
from ..rows import REFERENCE
from ..statistics import STATISTICS
from ..vocabulary import COUNTED


class TokenPart(Part):
    columns_only = True

    def total(self, rows: slice, statistics: Mapping[Any, Tensor]) -> Tensor | float:
        total: Tensor | float = 0.0
        for term in self.terms:
            total = total + self.batch.row_total(term, rows, statistics)
        return total


TOKEN = Family(
    name="token",
    words="One value a token, from a few numbers such as the probability of the target.",
    cost="one visit",
    statistics={
        "logp": "(N,) log-probability of each row's target",
        "lse": "(N,) logsumexp of each row's logits",
        **{name: statistic.words for name, statistic in STATISTICS.items()},
        **COUNTED,
        REFERENCE: "(N,) log-probability of each row's target under a reference model; no gradient",
    },
    pointwise=True,
    part=TokenPart,
)
