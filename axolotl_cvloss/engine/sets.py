"""Sets of rows (documents, or the whole batch), the classes present in each, and what is collected of them.

A pair (d, c) is a class c present among the labels of a set d. Class sums and sorted errors live on pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ranks
from .segments import Segments


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

    All bookkeeping is done on the labels in main memory, so that no device is waited for; where the rows of all
    processes make one set it goes through the device, which is where processes talk.

    Args:
        labels: (N,) targets of all rows, in main memory, as are members, numbers and weights.
        members: (M,) the rows that belong to a set, rising.
        numbers: (M,) the set of each of them, not decreasing.
        vocab_size: V.
        device: Where the logits are.
        joint: The rows of all processes make one set, of which each holds a part.
        weights: (N,) weights of all rows; a set counts by the sum of its rows', which is their number without any.
    """

    def __init__(
        self,
        labels: Tensor,
        members: Tensor,
        numbers: Tensor,
        vocab_size: int,
        device: torch.device,
        joint: bool = False,
        weights: Tensor | None = None,
    ) -> None:
        def to_device(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        numbers, sizes = torch.unique_consecutive(numbers, return_inverse=True, return_counts=True)[1:]
        pairs, row_pair, labelled = torch.unique(
            numbers * vocab_size + labels[members], return_inverse=True, return_counts=True
        )
        self.joint = joint and ranks.world_size() > 1
        parts = sizes
        if self.joint:
            own, pairs = pairs, ranks.joined(to_device(pairs)).cpu().unique()
            place = torch.searchsorted(pairs, own)
            labelled = torch.zeros_like(pairs).index_copy_(0, place, labelled)
            labelled = ranks.sum_over(to_device(labelled)).cpu()
            row_pair = place[row_pair]
            parts = sizes = sizes.new_full((min(1, len(pairs)),), len(members))
        if weights is not None:
            parts = weights.new_zeros(len(parts)).index_add(0, numbers, weights[members])
        pair_set, pair_class = pairs // vocab_size, pairs % vocab_size
        classes = torch.bincount(pair_set, minlength=len(parts))
        self.members = to_device(members)
        # (D,) what each set counts by: the part of it that is here, and all of it
        self.parts = to_device(parts)
        self.sizes = ranks.sum_over(self.parts) if self.joint else self.parts
        self.row_pair = to_device(row_pair)  # (M,)
        self.labelled = to_device(labelled)  # (P,) N_c
        self.pair_class = to_device(pair_class)  # (P,)
        self.classes = Segments(to_device(pair_set), classes)  # of the pairs, by set
        self._rows = Segments(to_device(numbers), sizes)  # of the members here, by set
        self._host_sets, self._host_classes = pair_set, pair_class
        self._host_first = [*self.classes.first.tolist(), len(pairs)]
        self._host_members, self._host_numbers, self._host_row_pair = members, numbers, row_pair

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def rows(self) -> Segments:
        """The rows of each set, of all processes where these make one set; see ``of_rows``."""
        if not self.joint:
            return self._rows
        count = torch.tensor([len(self.members)], device=self.members.device)
        count = ranks.sum_over(count).cpu()[: len(self)]
        return Segments(torch.zeros(int(count.sum()), dtype=torch.long, device=self.members.device), count)

    def of_rows(self, values: Tensor) -> Tensor:
        """(N,) to the values of the rows of the sets, set after set."""
        own = values[self.members]
        return ranks.joined(own) if self.joint else own

    def of_equal_size(self, classes: bool, rows: bool) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        """The sets in groups that have as many classes, or rows, or both.

        Gives the numbers (G,) of the sets, in main memory, and the places of their values among those of all classes,
        (G, C), and of all rows, (G, n); of what was not asked for, nothing that means something.
        """
        of, device = (self.classes, self.rows), self.members.device
        sizes = torch.stack([each.sizes * wanted for each, wanted in zip(of, (classes, rows), strict=True)], 1)
        for size in sizes.unique(dim=0):
            numbers = (sizes == size).all(1).nonzero().squeeze(1)
            at = [each.first[numbers, None] + torch.arange(int(n)) for each, n in zip(of, size, strict=True)]
            yield numbers, (at[0].to(device, non_blocking=True), at[1].to(device, non_blocking=True))

    def window(self, rows: slice) -> Window | None:
        """The window of a chunk of rows, or None where no row of it belongs to a set."""
        low, high = torch.searchsorted(self._host_members, torch.tensor([rows.start, rows.stop])).tolist()
        if low == high:
            return None
        numbers = self._host_numbers[low:high]
        first, last = int(numbers[0]), int(numbers[-1])
        pairs = slice(self._host_first[first], self._host_first[last + 1])
        columns, pair_column = torch.unique(self._host_classes[pairs], return_inverse=True)
        sets = last + 1 - first
        places = self._host_members[low:high] - rows.start
        row_set = torch.full((rows.stop - rows.start,), sets).index_copy_(0, places, numbers - first)
        own = torch.zeros_like(row_set).index_copy_(0, places, self._host_row_pair[low:high] - pairs.start)
        found = (columns, row_set, self._host_sets[pairs] - first, pair_column, pair_column[own])
        device = self.members.device
        columns, row_set, pair_set, pair_column, own_column = (x.to(device, non_blocking=True) for x in found)
        return Window(pairs, columns, sets, row_set, pair_set, pair_column, own_column)

    def counted(self) -> SetCounts:
        share = 1 / ranks.world_size() if self.joint else 1
        return SetCounts(share * len(self), share * len(self.labelled))

    def intersection(self, logp: Tensor) -> Tensor:
        """I_c of each pair, (P,), from the log-probabilities (N,) of the targets."""
        p = logp[self.members].exp()
        sums = p.new_zeros(len(self.labelled)).index_add(0, self.row_pair, p)
        return ranks.sum_over(sums) if self.joint else sums
