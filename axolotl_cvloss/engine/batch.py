"""What all families see of one evaluation of an objective: rows, their sets, statistics, and the sums of the terms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import ranks
from .family import checked
from .rows import Rows, Selector
from .sets import Sets, Window
from .statistics import Key
from .terms import Term

CHUNK_BYTES = {"cpu": 72 << 20}  # of logits at a time
CHUNK_BYTES_ELSEWHERE = 256 << 20

Group = tuple[Selector, str]  # what makes the sets of a term: its rows, and ``per``


@dataclass(frozen=True)
class Chunk:
    """Some rows that follow each other; ``number`` counts the chunks of a batch."""

    number: int
    rows: slice


@dataclass
class Batch:
    """One evaluation of some terms on some rows.

    rows: on the device of the logits; ``host``: the same in main memory, so that bookkeeping waits for no device.
    counts: number of rows by selector. denominators: what the sum over the rows of a selector is divided by, which for
        these rows alone is their mass.
    averaged: these are the rows of one process, and the gradients of all processes will be averaged, not summed.
    at_once: rows of a chunk at most, and what number of them divides a chunk's, where the source has a say.
    gradient: whether one is wanted.
    statistics: (N,) each, of all rows, by name.
    sums: of each term over its rows or sets, unweighted, detached. loss: of the weighted terms, detached.
    p_at: gives p of the rows of chunk number i at the columns of a window, once all chunks have been seen.
    """

    rows: Rows
    host: Rows
    counts: Mapping[Selector, int]
    denominators: Mapping[Selector, Tensor | float]
    averaged: bool
    vocab_size: int
    dtype: torch.dtype
    at_once: tuple[int, int] | None = None
    gradient: bool = False
    statistics: dict[Key, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    groups: dict[Group, Sets] = field(default_factory=dict)
    p_at: Callable[[int, Window], Tensor] = field(init=False)

    def __post_init__(self) -> None:
        device = self.rows.labels.device
        budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES_ELSEWHERE)
        most, multiple = self.at_once or (max(1, budget // (self.vocab_size * self.dtype.itemsize)), 1)
        slices = chunks_of(len(self), most, multiple)
        self.chunks = [Chunk(number, rows) for number, rows in enumerate(slices)]
        self.loss = torch.zeros((), dtype=self.dtype, device=device)
        self._windows: dict[Group, list[Window | None]] = {}

    def __len__(self) -> int:
        return len(self.host.labels)

    def sets(self, term: Term) -> Sets:
        """The sets of a term: the documents of its rows, or all its rows at once, here or on all processes."""
        group = term.rows, term.per
        if group not in self.groups:
            members = self.host.scopes[term.rows].nonzero().squeeze(1)
            documents = self.host.documents[members]
            weights = self.host.weights.get(term.rows)
            self.groups[group] = Sets(
                self.host.labels,
                members,
                documents if term.per == "document" else torch.zeros_like(documents),
                self.vocab_size,
                device=self.rows.labels.device,
                joint=term.per == "global",
                weights=None if weights is None else weights.to(self.dtype),
            )
        return self.groups[group]

    def windows(self, group: Group) -> list[Window | None]:
        """The windows of the sets of a group, one a chunk."""
        if group not in self._windows:
            self._windows[group] = [self.groups[group].window(chunk.rows) for chunk in self.chunks]
        return self._windows[group]

    def report(self, term: Term, value: Tensor) -> None:
        """Add to the sum of a term over its rows or sets."""
        value = value.detach()
        self.sums[term.name] = self.sums[term.name] + value
        self.loss = self.loss + term.weight * value / self.denominators[term.rows]

    def demand_gradient(self, term: Term, values: Tensor) -> None:
        """Raise where the values of a loss do not depend on the logits, so that it would train nothing."""
        if self.gradient and torch.is_grad_enabled() and not values.requires_grad:
            raise ValueError(
                f"loss {term.loss.name!r} returns a value that does not depend on the logits, so it would train "
                "nothing; compute it from its statistics without detach(), argmax or the like"
            )

    def row_total(self, term: Term, rows: slice, statistics: Mapping[Any, Tensor], report: bool = True) -> Tensor:
        """The weighted sum of a term that has one value a row, over some rows."""
        mask = self.rows.scopes[term.rows][rows]
        values = checked(term, term(statistics), {"one value a row": mask.shape})
        self.demand_gradient(term, values)
        if (weights := self.rows.weights.get(term.rows)) is not None:
            values = values * weights[rows]
        value = torch.where(mask, values, 0).sum()
        if report:
            self.report(term, value)
        return term.weight * value / self.denominators[term.rows]

    def set_total(self, term: Term, sets: Sets, values: Tensor) -> Tensor:
        """The weighted sum of a term over its sets, each of which counts by its rows."""
        self.demand_gradient(term, values)
        # The gradient of the rows here is that of the whole set, also where other processes hold parts of it; of its
        # value each process reports its share.
        self.report(term, (values.detach() * sets.parts).sum())
        rows = sets.parts * ranks.world_size() if sets.joint and self.averaged else sets.sizes
        return term.weight * (values * rows).sum() / self.denominators[term.rows]


def chunks_of(n: int, most: int, multiple: int = 1) -> Sequence[slice]:
    """As few as can be of at most so many rows, and of equal size: a small one at the end reads the whole head too.

    All but the last have a multiple of so many rows, by which ``most`` can be divided.
    """
    size = -(-n // max(1, -(-n // most)))
    size = -(-size // multiple) * multiple
    return [slice(i, min(i + size, n)) for i in range(0, n, size or 1)]
