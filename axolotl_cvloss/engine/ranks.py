"""Over all processes: sums, minima and lists of what each of them holds, for terms with ``reduce: global`` and for
decisions that all must take alike.

Every process must come here the same number of times. One process alone is left as it is.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over(values: Tensor) -> Tensor:
    """The sum over all processes; differentiable in the part of this one."""
    return values if world_size() == 1 else values - values.detach() + _reduced(values, dist.ReduceOp.SUM)


def least_of(values: Tensor) -> Tensor:
    """The smallest of each value over all processes, detached."""
    return values if world_size() == 1 else _reduced(values, dist.ReduceOp.MIN)


def everywhere(yes: bool, device: torch.device) -> bool:
    """In all processes. One that went another way alone would call other collectives, and the rest would wait."""
    return bool(least_of(torch.tensor(int(yes), device=device)))


def joined(values: Tensor) -> Tensor:
    """The values (n, ...) of all processes behind each other; differentiable in the part of this one."""
    if world_size() == 1:
        return values
    sent = values.detach().to(torch.uint8) if values.dtype == torch.bool else values.detach()
    counts = [torch.zeros(1, dtype=torch.long, device=values.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(values)], device=values.device))
    lengths = [int(count) for count in counts]
    padded = sent.new_zeros(max(lengths), *sent.shape[1:])
    padded[: len(sent)] = sent
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    parts = [part[:length].to(values.dtype) for part, length in zip(parts, lengths, strict=True)]
    parts[dist.get_rank()] = values
    return torch.cat(parts)


def _reduced(values: Tensor, operation: Any) -> Tensor:
    total = values.detach().clone()
    dist.all_reduce(total, operation)
    return total
