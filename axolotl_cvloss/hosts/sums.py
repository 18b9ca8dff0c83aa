"""Sums over the micro-batches of one process, for what a trainer logs."""

import math

import torch
from torch import Tensor

FEW = 16  # micro-batches whose values are fetched from the accelerator at once


class Sums:
    """What is logged of any number of micro-batches of one process: sums, so that none of them is kept.

    A column is a value that is logged. It has five sums: of the value, of rows, of sets, of classes, and of the mass of
    the rows. Values come from the accelerator, which would have to be waited for each time; so those of a few
    micro-batches are fetched at once.
    """

    def __init__(self, columns: int) -> None:
        self._waiting: list[tuple[int, Tensor, Tensor]] = []
        self._sums = torch.zeros(5, columns, dtype=torch.float64)
        self._steps, self._step = 0, -1

    def add(self, step: int, values: Tensor, counts: Tensor) -> None:
        """The values of the first columns, on the accelerator, and the (4, columns) counts."""
        self._waiting.append((step, values, counts))

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def fold(self) -> list[tuple[int, Tensor]]:
        """Fetch what waits. The step and the values of each micro-batch of which some are not finite."""
        waiting, self._waiting, wrong = self._waiting, [], []
        for step, values, counts in waiting:
            values = values.cpu().double()  # in this order: not every accelerator has float64
            self._sums[0, : len(values)] += values
            self._sums[1:] += counts
            self._steps, self._step = self._steps + (step != self._step), step
            if not values.isfinite().all():
                wrong.append((step, values))
        return wrong

    def taken(self) -> Tensor:
        """All sums and the number of steps, (5 * columns + 1,). They begin anew."""
        found = torch.cat([self._sums.flatten(), torch.tensor([float(self._steps)], dtype=torch.float64)])
        self.__init__(self._sums.shape[1])  # type: ignore[misc]
        return found


class Weighed:
    """What the documents of some steps count by on one process: the smallest, the largest, and sums."""

    def __init__(self) -> None:
        self.found = torch.tensor([math.inf, -math.inf, 0.0, 0.0], dtype=torch.float64)

    def add(self, weights: Tensor) -> None:
        """Those of one micro-batch, (D,)."""
        if len(weights):
            smallest, largest, total, squares = self.found
            least, most = torch.minimum(smallest, weights.min()), torch.maximum(largest, weights.max())
            self.found = torch.stack([least, most, total + weights.sum(), squares + weights.square().sum()])

    def taken(self) -> Tensor:
        """The smallest and the largest, the sum, and the sum of squares, (4,). They begin anew."""
        found = self.found
        self.found = Weighed().found
        return found
