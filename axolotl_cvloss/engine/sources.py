"""Logit sources: where a chunk of logits comes from, and where its gradient goes. Losses never know which."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class LogitSource(Protocol):
    """N rows of V logits, a chunk at a time.

    ``tensors`` are those a gradient may be asked of. ``logits`` and ``columns`` return float32 (float64 for float64
    inputs) that the caller may overwrite until the next call. After ``start``, the gradient of each chunk comes in
    by ``pull``, which may overwrite it; ``gradients`` hands out the sums, one for each of ``tensors``.
    """

    tensors: Sequence[Tensor]
    vocab_size: int
    dtype: torch.dtype

    def logits(self, rows: slice) -> Tensor: ...
    def columns(self, rows: slice, columns: Tensor) -> Tensor: ...
    def start(self, wanted: Sequence[bool]) -> None: ...
    def pull(self, rows: slice, gradient: Tensor) -> None: ...
    def gradients(self) -> list[Tensor | None]: ...


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class TensorSource:
    """Rows ``index`` of a tensor of logits (..., V)."""

    def __init__(self, logits: Tensor, index: Tensor) -> None:
        self.tensors = (logits,)
        self.flat = logits.detach().reshape(-1, logits.shape[-1])
        self.index = index
        self.vocab_size = logits.shape[-1]
        self.dtype = statistics_dtype(logits.dtype)

    def logits(self, rows: slice) -> Tensor:
        return self.flat[self.index[rows]].to(self.dtype)

    def columns(self, rows: slice, columns: Tensor) -> Tensor:
        return self.flat[self.index[rows, None], columns].to(self.dtype)

    def start(self, wanted: Sequence[bool]) -> None:
        self.grad = torch.zeros_like(self.flat)

    def pull(self, rows: slice, gradient: Tensor) -> None:
        self.grad[self.index[rows]] = gradient.to(self.grad.dtype)

    def gradients(self) -> list[Tensor | None]:
        return [self.grad.view(self.tensors[0].shape)]
