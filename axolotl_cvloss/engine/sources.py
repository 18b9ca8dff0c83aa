"""Logit sources: where a chunk of logits comes from, and where its gradient goes. Losses never know which."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .gradient import (
    LogitGradient,
    add_product,
    fitted,
    gradient_dtype,
    product,
    restored,
    statistics_dtype,
    wide_products,
)
from .random_state import RandomState
from .views import FusedView, View

FUSED_BYTES = 512 << 20  # of logits at a time, for the kernels


class LogitSource:
    """N rows of V logits, a chunk at a time.

    ``tensors`` are those a gradient may be asked of. ``logits`` and ``columns`` return float32 (float64 for float64
    inputs) that the caller may overwrite until the next call. After ``start``, the gradient of each chunk comes in
    by ``pull``, right after its ``logits``, and may be overwritten; ``gradients`` hands out the sums, which for float16
    tensors are in float32: the scale of the loss is still to come.
    """

    tensors: Sequence[Tensor]
    vocab_size: int
    dtype: torch.dtype
    not_fused = "logits that were given"  # why the kernels cannot serve it
    fused = False  # whether they are to
    product_dtype = torch.float32  # of what they work on
    mixes = False  # after start: gradients without p may come in, for chunks whose p was given to ``mix``

    def keeps(self, rows: slice) -> bool:
        """After start: what ``logits`` returned for these rows stays as the caller left it until their ``pull``."""
        return False

    def at_once(self) -> tuple[int, int] | None:
        """How many rows of logits at most, and what number of them divides a chunk's."""
        return None

    def view(self, rows: slice, keep: bool = False) -> View:
        """The logits, which the caller's gradients need (``keep``) or not."""
        return View(self.logits(rows), keep)

    def logits(self, rows: slice) -> Tensor:
        """(n, V)"""
        raise NotImplementedError

    def columns(self, rows: slice, columns: Tensor) -> Tensor:
        """(n, C), the logits at some columns."""
        raise NotImplementedError

    def start(self, wanted: Sequence[bool]) -> None:
        """Make room for the gradients of those of ``tensors`` that want one."""
        raise NotImplementedError

    def mix(self, rows: slice, p: Tensor) -> None:
        """Keep p @ weight of a chunk."""
        raise NotImplementedError

    def pull(self, rows: slice, gradient: LogitGradient) -> None:
        raise NotImplementedError

    def gradients(self) -> list[Tensor | None]:
        """One for each of ``tensors``."""
        raise NotImplementedError


class TensorSource(LogitSource):
    """Rows ``index`` (rising, in main memory, so that no device is asked where they are) of logits (..., V)."""

    def __init__(self, logits: Tensor, index: Tensor) -> None:
        self.tensors = (logits,)
        self.flat = logits.detach().reshape(-1, logits.shape[-1])
        self.host, self.index = index, index.to(logits.device, non_blocking=True)
        self.vocab_size = logits.shape[-1]
        self.dtype = statistics_dtype(logits.dtype)
        self.grad: Tensor | None = None

    def logits(self, rows: slice) -> Tensor:
        if self.keeps(rows):
            assert self.grad is not None
            return self._place(rows, self.grad).copy_(self._place(rows, self.flat))
        return self.flat[self.index[rows]].to(self.dtype)

    def columns(self, rows: slice, columns: Tensor) -> Tensor:
        return self.flat[self.index[rows, None], columns].to(self.dtype)

    def start(self, wanted: Sequence[bool]) -> None:
        dtype = gradient_dtype(self.flat.dtype)
        self.grad = torch.empty_like(self.flat, dtype=dtype, memory_format=torch.contiguous_format)
        unused = torch.ones(len(self.flat), dtype=torch.bool).index_fill_(0, self.host, False).nonzero().squeeze(1)
        self.grad.index_fill_(0, unused.to(self.flat.device, non_blocking=True), 0)

    def keeps(self, rows: slice) -> bool:
        """Neighbours stay in the place of their gradient, where that has the precision for it."""
        if self.grad is None or self.grad.dtype != self.dtype:
            return False
        return int(self.host[rows.stop - 1] - self.host[rows.start]) == rows.stop - 1 - rows.start

    def _place(self, rows: slice, tensor: Tensor) -> Tensor:
        first = int(self.host[rows.start])
        return tensor[first : first + rows.stop - rows.start]

    def pull(self, rows: slice, gradient: LogitGradient) -> None:
        dz = gradient.materialize()
        if not self.keeps(rows):
            assert self.grad is not None
            self.grad[self.index[rows]] = dz.to(self.grad.dtype)

    def gradients(self) -> list[Tensor | None]:
        assert self.grad is not None
        return [self.grad.view(self.tensors[0].shape)]


@dataclass
class Head:
    """A head module together with the function that runs it, where its own ``forward`` has been replaced."""

    module: nn.Module
    forward: Callable[[Tensor], Tensor]


class HeadSource(LogitSource):
    """Logits of hidden states (..., H) under a head; only a chunk of them exists at a time.

    The logits are ``affine(hidden)``, times ``scale``, then bounded by ``softcap * tanh(logits / softcap)``.
    Subclasses give the affine part.
    """

    not_fused = "a head that is called"

    def __init__(self, hidden_states: Tensor, index: Tensor, scale: float, softcap: float | None) -> None:
        self.hidden = hidden_states.detach().reshape(-1, hidden_states.shape[-1])[index]
        self.index = index
        self.scale, self.softcap = scale, softcap
        self._slope: Tensor | None = None

    def logits(self, rows: slice) -> Tensor:
        logits = self._process(self._affine(rows))
        if self.softcap is not None:  # what the gradient of this chunk is multiplied by on its way back
            self._slope = 1 - (logits / self.softcap) ** 2
        return logits

    def _affine(self, rows: slice) -> Tensor:
        raise NotImplementedError

    def _process(self, logits: Tensor) -> Tensor:
        if self.scale != 1:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def start(self, wanted: Sequence[bool]) -> None:
        self.wanted = wanted
        self.grads = [
            torch.zeros_like(t, dtype=self._grad_dtype(t), memory_format=torch.contiguous_format) if w else None
            for t, w in zip(self.tensors, wanted, strict=True)
        ]
        if self.grads[0] is not None:
            self.hidden_grad = self.grads[0].view(-1, self.hidden.shape[-1])

    def _grad_dtype(self, tensor: Tensor) -> torch.dtype:
        """Gradients of weights are summed over chunks, so in float32 at least; each hidden state gets one."""
        return gradient_dtype(tensor.dtype) if tensor is self.tensors[0] else self.dtype

    def pull(self, rows: slice, gradient: LogitGradient) -> None:
        dz = gradient.materialize()
        if self._slope is not None:
            dz *= self._slope
        self._pull_affine(rows, dz.mul_(self.scale) if self.scale != 1 else dz)

    def _pull_affine(self, rows: slice, dz: Tensor) -> None:
        raise NotImplementedError

    def gradients(self) -> list[Tensor | None]:
        return [
            None if g is None else g.to(gradient_dtype(t.dtype)) for g, t in zip(self.grads, self.tensors, strict=True)
        ]


class LinearSource(HeadSource):
    """A head of a weight (V, H) and perhaps a bias (V,): ``hidden @ weight.T + bias``.

    Matrix products run in ``compute_dtype``, that of the hidden states unless given (autocast).
    """

    def __init__(
        self,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        scale: float = 1.0,
        softcap: float | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_states, index, scale, softcap)
        compute_dtype = compute_dtype or hidden_states.dtype
        self.tensors = (hidden_states, weight) if bias is None else (hidden_states, weight, bias)
        self.hidden = self.hidden.to(compute_dtype)
        self.weight = weight.detach().to(compute_dtype)
        self.bias = None if bias is None else bias.detach()
        self.vocab_size = len(weight)
        self.dtype = statistics_dtype(compute_dtype)
        self._buffer: Tensor | None = None
        self.product_dtype = compute_dtype
        fits = compute_dtype in (torch.bfloat16, torch.float32)
        self.not_fused = "" if fits else f"products in {str(compute_dtype).removeprefix('torch.')}"

    def at_once(self) -> tuple[int, int] | None:
        if not self.fused or self.weight.device.type == "cpu":
            return None
        n, width = self.hidden.shape
        if n <= 2 * width and self.tensors[1].requires_grad:
            # Logits of all rows take no more than the float32 sums of the weight's gradient, which they spare.
            return max(1, n), 1
        return max(128, FUSED_BYTES // (self.vocab_size * self.weight.itemsize) // 128 * 128), 128

    def view(self, rows: slice, keep: bool = False) -> View:
        if not self.fused:
            return super().view(rows, keep)
        hidden = self.hidden[rows]
        padded = -(-self.vocab_size // 64) * 64  # rows of an odd V could not be read 16 bytes at a time
        if self._buffer is None or len(self._buffer) < len(hidden):
            self._buffer = hidden.new_empty(len(hidden), padded)
        raw = self._buffer[: len(hidden), : self.vocab_size]
        if self.bias is None:
            torch.mm(hidden, self.weight.T, out=raw)
        else:
            torch.addmm(self.bias.to(raw.dtype), hidden, self.weight.T, out=raw)
        return FusedView(raw, padded, self.scale, self.softcap)

    def _affine(self, rows: slice) -> Tensor:
        hidden = self.hidden[rows]
        if self.hidden.dtype == self.dtype:
            # One buffer for all chunks: fresh memory costs more than the arithmetic on it.
            if self._buffer is None or len(self._buffer) < len(hidden):
                self._buffer = hidden.new_empty(len(hidden), self.vocab_size)
            logits = torch.mm(hidden, self.weight.T, out=self._buffer[: len(hidden)])
        else:
            logits = (hidden @ self.weight.T).to(self.dtype)
        return logits if self.bias is None else logits.add_(self.bias)

    def columns(self, rows: slice, columns: Tensor) -> Tensor:
        logits = (self.hidden[rows] @ self.weight[columns].T).to(self.dtype)
        return self._process(logits if self.bias is None else logits.add_(self.bias[columns]))

    def start(self, wanted: Sequence[bool]) -> None:
        written = self.fused and len(self.hidden) > 0  # the first chunk makes the gradient of the weight
        super().start([wanted[0], wanted[1] and not written, *wanted[2:]])
        self.wanted = wanted
        self.mixes = wanted[0] and not any(wanted[1:]) and self.softcap is None
        if self.mixes:
            self._mixture = torch.empty_like(self.hidden, dtype=self.dtype)

    def mix(self, rows: slice, p: Tensor) -> None:
        self._mixture[rows] = p.to(self.weight.dtype) @ self.weight

    def _pull_fused(self, rows: slice, dz: Tensor) -> None:
        if self.wanted[0]:
            self.hidden_grad[self.index[rows]] = (dz @ self.weight).to(self.hidden_grad.dtype)
        if self.wanted[1]:
            hidden = self.hidden[rows]
            if (weight_grad := self.grads[1]) is not None:
                add_product(weight_grad, dz.T, hidden)
            else:  # of all rows it is no sum, and needs to be no wider than the gradient
                whole = len(hidden) == len(self.hidden)
                dtype = gradient_dtype(self.tensors[1].dtype) if whole else self._grad_dtype(self.tensors[1])
                self.grads[1] = product(dz.T, hidden, dtype)
        if self.bias is not None and (bias_grad := self.grads[2]) is not None:
            bias_grad += dz.sum(0, dtype=bias_grad.dtype)

    def pull(self, rows: slice, gradient: LogitGradient) -> None:
        if gradient.view is not None:
            return self._pull_fused(rows, gradient.view.pull(gradient))
        if self.softcap is not None or gradient.dense is not None:
            return super().pull(rows, gradient)
        gradient = gradient.scaled(self.scale)
        if self.wanted[0]:
            mixture = self._mixture[rows] if gradient.p is None else None
            self.hidden_grad[self.index[rows]] = gradient.times(self.weight, mixture).to(self.hidden_grad.dtype)
        if (weight_grad := self.grads[1]) is not None:
            gradient.add_outer(self.hidden[rows], weight_grad)
        if self.bias is not None and (bias_grad := self.grads[2]) is not None:
            bias_grad += gradient.sum_rows()

    def _pull_affine(self, rows: slice, dz: Tensor) -> None:
        if self.bias is not None and (bias_grad := self.grads[2]) is not None:
            bias_grad += dz.sum(0)
        dz, unit = fitted(dz, self.hidden.dtype)
        if self.wanted[0]:
            self.hidden_grad[self.index[rows]] = restored(dz @ self.weight, unit).to(self.hidden_grad.dtype)
        if (weight_grad := self.grads[1]) is not None:
            if unit is None and wide_products(dz):
                add_product(weight_grad, dz.T, self.hidden[rows])
            else:
                weight_grad += restored(dz.T @ self.hidden[rows], unit)


class ModuleSource(HeadSource):
    """A head that is called: LoRA on the head, ``modules_to_save``, quantised heads.

    It runs in the autocast that the objective was called in. What it draws at random (dropout) for a chunk is the same
    at every visit.

    Args:
        head: Called with (n, H), gives (n, V).
        parameters: Those of its parameters that train.
    """

    def __init__(
        self,
        hidden_states: Tensor,
        head: Callable[[Tensor], Tensor],
        parameters: Sequence[Tensor],
        index: Tensor,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__(hidden_states, index, scale, softcap)
        self.head = head
        self.tensors = (hidden_states, *parameters)
        self.wanted = [False] * len(self.tensors)
        device = hidden_states.device.type
        # No cache: what a visit without gradients leaves in it would be taken by one with them.
        self._autocast = partial(
            torch.autocast,
            device,
            dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=False,
        )
        self._states: dict[int, RandomState] = {}
        with torch.no_grad(), RandomState(hidden_states.device).again(), self._autocast():
            probe = head(hidden_states.detach().flatten(0, -2)[:1])
        self.vocab_size = probe.shape[-1]
        self.dtype = statistics_dtype(probe.dtype)

    def _call(self, rows: slice, hidden: Tensor) -> Tensor:
        if (state := self._states.get(rows.start)) is None:
            self._states[rows.start] = RandomState(hidden.device)
        with state.again() if state else nullcontext(), self._autocast():
            return self.head(hidden)

    def _affine(self, rows: slice) -> Tensor:
        leaf = self.hidden[rows].requires_grad_(self.wanted[0])
        with torch.set_grad_enabled(any(self.wanted)):
            self._graph = leaf, self._call(rows, leaf)
        return self._graph[1].detach().to(self.dtype, copy=True)

    def columns(self, rows: slice, columns: Tensor) -> Tensor:
        with torch.no_grad():
            return self._process(self._call(rows, self.hidden[rows])[:, columns].to(self.dtype))

    def _pull_affine(self, rows: slice, dz: Tensor) -> None:
        wanted = [i for i, w in enumerate(self.wanted) if w]
        leaf, logits = self._graph
        inputs = [leaf if i == 0 else self.tensors[i] for i in wanted]
        dz, unit = fitted(dz, logits.dtype)
        for i, grad in zip(wanted, torch.autograd.grad(logits, inputs, dz), strict=True):
            if i == 0:
                self.hidden_grad[self.index[rows]] = restored(grad, unit).to(self.hidden_grad.dtype)
            else:
                self.grads[i] += restored(grad, unit)  # type: ignore[operator]


def is_linear(head: nn.Module) -> bool:
    """It is a weight and perhaps a bias and nothing else: no adapter, not quantised, not offloaded."""
    plain = type(head).forward is nn.Linear.forward and type(head.weight) in (Tensor, nn.Parameter)
    return plain and not head.weight.is_meta


def device_of(head: Tensor | nn.Module | Head, otherwise: torch.device) -> torch.device:
    """Where a model is spread over several devices, the head may be on another one than the layer before it.

    Weights that are on no device are brought by the head's own forward.
    """
    if isinstance(head, Tensor):
        return head.device
    module = head if isinstance(head, nn.Module) else head.module
    return next((p.device for p in module.parameters() if not p.is_meta), otherwise)


def head_source(
    hidden_states: Tensor, head: Tensor | nn.Module | Head, index: Tensor, scale: float, softcap: float | None
) -> LogitSource:
    """The source for a head: its weight (V, H), or its module, which is called where it is more than a weight."""
    weight, bias = head, None
    if not isinstance(head, Tensor):
        if isinstance(head, nn.Module):
            head = Head(head, head)
        module = head.module
        if not is_linear(module):
            parameters = [p for p in module.parameters() if p.requires_grad and not p.is_meta]
            return ModuleSource(hidden_states, head.forward, parameters, index, scale, softcap)
        weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert not isinstance(bias, nn.Module)
    device = hidden_states.device.type
    compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return LinearSource(hidden_states, weight, bias, index, scale, softcap, compute_dtype)
