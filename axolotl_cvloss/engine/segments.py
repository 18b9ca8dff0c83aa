"""Values in segments, such as those of the rows of each set, behind each other in one tensor."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Which segment each of n values belongs to.

    index: (n,) the number of the segment of each value, not decreasing.
    sizes: (S,) how many values each segment has, int64, in main memory.
    """

    index: Tensor
    sizes: Tensor

    def __len__(self) -> int:
        return len(self.sizes)

    @cached_property
    def first(self) -> Tensor:
        """(S,) the place of the first value of each segment, in main memory."""
        return self.sizes.cumsum(0) - self.sizes

    def rank(self, values: Tensor) -> Tensor:
        """(n,) the place of each value in its segment when sorted downwards: 0 for the largest. NaN comes first."""
        order = values.detach().argsort(descending=True)
        order = order[self.index[order].argsort(stable=True)]
        first = self.first.to(values.device, non_blocking=True)[self.index]
        return torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device) - first)

    def sum(self, values: Tensor) -> Tensor:
        """(n,) to the sum of each segment, (S,)."""
        if len(self) == 1:
            return values.sum()[None]
        # One value after the other is added: a long segment would lose digits in float32. Apple's GPUs have no other.
        wide = values if values.device.type == "mps" else values.double()
        return wide.new_zeros(len(self)).index_add(0, self.index, wide).to(values.dtype)

    def mean(self, values: Tensor) -> Tensor:
        """(n,) to the mean of each segment, (S,)."""
        return self.sum(values) / self.sizes.to(values.device, non_blocking=True)
