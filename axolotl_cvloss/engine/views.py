"""What the terms see of a chunk of logits, and the choice of what is behind it: PyTorch, or the kernels."""

import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .statistics import STATISTICS

if TYPE_CHECKING:
    from .gradient import LogitGradient
    from .kernels import Collected
    from .sources import LogitSource
    from .terms import Term

logger = logging.getLogger(__name__)

ENVIRONMENT = "CVLOSS_KERNELS"
COLLECTED = ("mean_logit", "mean_logp", "target_logit")  # statistics of all logits that the kernels have


class View:
    """The logits of a chunk of rows, in float32 or more; ``p`` is in their place once there is a softmax."""

    def __init__(self, logits: Tensor) -> None:
        self.z = self.p = logits
        self.vocab_size = logits.shape[1]

    def logits(self) -> Tensor:
        """(n, V), not to be changed; not after the softmax."""
        return self.z

    def at(self, columns: Tensor) -> Tensor:
        """(n, C), the logits at some columns."""
        return self.z[:, columns]

    def p_at(self, columns: Tensor) -> Tensor:
        """(n, C), the probabilities at some columns, once there is a softmax."""
        return self.p[:, columns]

    def take_others(self, labels: Tensor) -> Tensor:
        """p (n, V) with 0 at the targets."""
        return self.p.scatter_(1, labels[:, None], 0)


class FusedView(View):
    """The same by the kernels, over what came out of the matrix product.

    Args:
        raw: (n, V) logits before scale and softcap, to be overwritten.
        width: How many entries of its rows may be touched.
    """

    def __init__(self, raw: Tensor, width: int, scale: float, softcap: float | None) -> None:
        self.raw, self.vocab_size = raw, raw.shape[1]
        self.width, self.scale, self.softcap = width, scale, softcap

    def logits(self) -> Tensor:
        return self._bounded(self.raw)

    def at(self, columns: Tensor) -> Tensor:
        return self._bounded(self.raw[:, columns])

    def p_at(self, columns: Tensor) -> Tensor:
        return self.at(columns).sub_(self.largest[:, None]).add_(self.top[:, None]).exp_()

    def _bounded(self, raw: Tensor) -> Tensor:
        z = raw.float() * self.scale
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def collect(self, labels: Tensor, mean: bool, diagnose: bool) -> "Collected":
        from . import kernels

        return kernels.collect(self.raw, labels, self.scale, self.softcap, self.width, mean, diagnose)

    def know(self, largest: Tensor, top: Tensor) -> "FusedView":
        """The largest logit of each row and its log p, (n,), which probabilities are made of."""
        self.largest, self.top = largest, top
        return self

    def take_others(self, labels: Tensor) -> Tensor:
        ones = torch.ones_like(self.top)
        return self._pull_(labels, ones / self.scale, torch.zeros_like(ones), None)

    def pull(self, gradient: "LogitGradient") -> Tensor:
        """The gradient of the matrix product, in its place."""
        added = []
        for columns, values in gradient.columns:
            values = values * self.scale
            if self.softcap is not None:
                values *= 1 - (self.at(columns) / self.softcap) ** 2
            added.append((columns, values))
        dz = self._pull_(gradient.labels, gradient.slope, gradient.own, gradient.mean)
        for columns, values in added:
            dz[:, columns] = (dz[:, columns].float() + values).to(dz.dtype)
        return dz

    def _pull_(self, labels: Tensor, slope: Tensor, own: Tensor, mean: Tensor | None) -> Tensor:
        from . import kernels

        rows = self.largest, self.top, slope, own, mean
        return kernels.pull_(self.raw, labels, *rows, self.scale, self.softcap, self.width)


def fused(source: "LogitSource", terms: Sequence["Term"]) -> bool:
    """Whether the kernels serve these terms; said once in the log, with the reason."""
    reason = _against(source, terms)
    _say("PyTorch" if reason else "Triton kernels", reason)
    return not reason


def _against(source: "LogitSource", terms: Sequence["Term"]) -> str:
    wish = os.environ.get(ENVIRONMENT, "auto")
    if wish not in ("auto", "on", "off"):
        raise ValueError(f"{ENVIRONMENT}={wish!r}: allowed are auto, on and off")
    if wish == "off":
        return f"{ENVIRONMENT}=off"
    device = source.tensors[0].device.type
    if wish == "auto" and device != "cuda":
        return f"no CUDA device ({device})"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if source.not_fused:
        return source.not_fused
    for term in terms:
        if not term.loss.kind.part.columns_only:
            return f"{term.loss.name} needs all logits"
        for name in term.loss.statistics:
            if term.needs(name) and name in STATISTICS and name not in COLLECTED:
                return f"{term.loss.name} needs {name}"
    return _untrusted(source.tensors[0].device, source.product_dtype) if wish == "auto" else ""


@lru_cache
def _untrusted(device: torch.device, dtype: torch.dtype) -> str:
    from . import kernels

    if reason := kernels.trial(device, dtype):
        logger.warning(
            f"cv_loss: the Triton kernels are not used, as {reason}. {ENVIRONMENT}=off silences this warning"
        )
    return reason


@lru_cache
def _say(path: str, reason: str) -> None:
    logger.info(f"cv_loss: logits are computed by {path}" + (f": {reason}" if reason else ""))
