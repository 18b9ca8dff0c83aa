"""Sets of rows (documents, or the whole batch), the classes present in each, and what is collected of them.

A pair (d, c) is a class c present among the labels of a set d. Class sums and sorted errors live on pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ranks


@dataclass(frozen=True)
class SetCounts:
    """How many sets there are here, and how many classes in all of them together. Of a set of all processes, each has a
    share, so that sums over processes are right."""

    sets: float
    classes: float


@dataclass
class Window:
    """The sets a chunk of rows touches: local numbers of sets and columns, for small dense tables of them.

    ``row_set`` (n,) has for each row of the chunk the local number of its set, or ``sets`` for a row of no set;
    ``own_column`` (n,) the local number of the column of its target (any, for a row of no set).
    """

    pairs: slice
    columns: Tensor
    sets: int
    row_set: Tensor
    pair_set: Tensor
    pair_column: Tensor
    own_column: Tensor

    def lookup(self, values: Tensor, fill: float) -> Tensor:
        """Values on the pairs as a small table (sets + 1, columns); its last line is for rows of no set."""
        table = values.new_full((self.sets + 1, len(self.columns)), fill)
        table[self.pair_set, self.pair_column] = values[self.pairs]
        return table

    def sums(self, rows: Tensor) -> Tensor:
        """Sum the lines of (n, columns) by set and read the sums off at the pairs of this window."""
        table = rows.new_zeros(self.sets + 1, len(self.columns)).index_add_(0, self.row_set, rows)
        return table[self.pair_set, self.pair_column]


class Sets:
    """The sets of one scope and grouping over N rows.

    Args:
        labels: (N,) targets of all rows.
        members: (M,) the rows that belong to a set, rising.
        numbers: (M,) the set of each of them, not decreasing.
        vocab_size: V.
        joint: The rows of all processes make one set, of which each holds a part.
        weights: (N,) weights of all rows; a set counts by the sum of its rows', which is their number without any.
    """

    def __init__(
        self,
        labels: Tensor,
        members: Tensor,
        numbers: Tensor,
        vocab_size: int,
        joint: bool = False,
        weights: Tensor | None = None,
    ) -> None:
        numbers, sizes = torch.unique_consecutive(numbers, return_inverse=True, return_counts=True)[1:]
        pairs, row_pair, labelled = torch.unique(
            numbers * vocab_size + labels[members], return_inverse=True, return_counts=True
        )
        self.joint = joint and ranks.world_size() > 1
        self.parts = sizes
        if self.joint:
            own, pairs = pairs, ranks.joined(pairs).unique()
            place = torch.searchsorted(pairs, own)
            labelled = ranks.sum_over(torch.zeros_like(pairs).index_copy_(0, place, labelled))
            row_pair = place[row_pair]
            self.parts = sizes.new_full((min(1, len(pairs)),), len(members))
        self.counts = self.parts.tolist()
        if weights is not None:
            self.parts = weights.new_zeros(len(self.parts)).index_add(0, numbers, weights[members])
        self.members = members
        # (D,) what each set counts by: the part of it that is here, and all of it
        self.sizes = ranks.sum_over(self.parts) if self.joint else self.parts
        self.row_pair = row_pair  # (M,)
        self.labelled = labelled  # (P,) N_c
        self.pair_set = pairs // vocab_size  # (P,)
        self.pair_class = pairs % vocab_size  # (P,)
        self.classes = torch.bincount(self.pair_set, minlength=len(self)).tolist()
        self._numbers = torch.full_like(labels, -1).index_copy_(0, members, numbers)
        self._row_pair = torch.zeros_like(labels).index_copy_(0, members, row_pair)
        first = [0]
        for count in self.classes:
            first.append(first[-1] + count)
        self._first_pair = first
        self._member_list = members.cpu()
        self._number_list = numbers.cpu()

    def __len__(self) -> int:
        return len(self.counts)

    def window(self, rows: slice) -> Window | None:
        """The window of a chunk of rows, or None where no row of it belongs to a set."""
        low, high = torch.searchsorted(self._member_list, torch.tensor([rows.start, rows.stop])).tolist()
        if low == high:
            return None
        first, last = int(self._number_list[low]), int(self._number_list[high - 1])
        pairs = slice(self._first_pair[first], self._first_pair[last + 1])
        columns, pair_column = torch.unique(self.pair_class[pairs], return_inverse=True)
        sets = last + 1 - first
        numbers = self._numbers[rows]
        return Window(
            pairs=pairs,
            columns=columns,
            sets=sets,
            row_set=torch.where(numbers < 0, sets, numbers - first),
            pair_set=self.pair_set[pairs] - first,
            pair_column=pair_column,
            own_column=pair_column[(self._row_pair[rows] - pairs.start).clamp_min(0)],
        )

    def counted(self) -> SetCounts:
        share = 1 / ranks.world_size() if self.joint else 1
        return SetCounts(share * len(self), share * len(self.labelled))

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        """(N,) to the values of the rows of each set."""
        own = rows[self.members]
        return [ranks.joined(own)][: len(self)] if self.joint else own.split(self.counts)

    def intersection(self, logp: Tensor) -> Tensor:
        """I_c of each pair, (P,), from the log-probabilities (N,) of the targets."""
        p = logp[self.members].exp()
        sums = p.new_zeros(len(self.labelled)).index_add(0, self.row_pair, p)
        return ranks.sum_over(sums) if self.joint else sums

    def mean_over_classes(self, values: Tensor) -> Tensor:
        """(P,) to the mean over the classes of each set, (D,)."""
        count = torch.bincount(self.pair_set, minlength=len(self))
        return values.new_zeros(len(self)).index_add(0, self.pair_set, values) / count
