"""What the terms see of a chunk of logits, and the choice of what is behind it: PyTorch, or the kernels."""

import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .statistics import STATISTICS, Key, blocks, collect

if TYPE_CHECKING:
    from .gradient import LogitGradient
    from .kernels import More
    from .sources import LogitSource
    from .terms import Term

logger = logging.getLogger(__name__)

ENVIRONMENT = "CVLOSS_KERNELS"
# Statistics of all logits that the kernels have.
COLLECTED = (
    *("mean_logit", "mean_logp", "target_logit", "vocab_size", "entropy", "accuracy", "collision"),
    *("other_squares", "possible", "tempered_odds"),
)


class View:
    """The logits of a chunk of rows, in float32 or more; ``p`` is in their place once there is a softmax.

    Args:
        keep: Where gradients need the logits, they stay, and there is no ``p``.
    """

    p: Tensor | None = None

    def __init__(self, logits: Tensor, keep: bool = False) -> None:
        self.z, self.vocab_size, self.keep = logits, logits.shape[1], keep

    def logits(self) -> Tensor:
        """(n, V), not to be changed; not after the softmax."""
        return self.z

    def at(self, columns: Tensor) -> Tensor:
        """(n, C), the logits at some columns."""
        return self.z[:, columns]

    def p_at(self, columns: Tensor) -> Tensor:
        """(n, C), the probabilities at some columns, once there is a softmax."""
        if self.p is not None:
            return self.p[:, columns]
        return self.at(columns).sub_(self.largest[:, None]).add_(self.top[:, None]).exp_()

    def collect(self, keys: Sequence[Key], labels: Tensor) -> dict[Key, Tensor]:
        """Statistics (n,), as ``statistics.collect``; then there is a softmax."""
        found = collect(keys, self.z, labels, self.keep)
        self.largest, self.top = found["largest"], found["top"]
        self.p = None if self.keep else self.z
        return found

    def know(self, largest: Tensor, top: Tensor) -> "View":
        """Of a chunk seen before, the largest logit of each row and its log p, (n,); then there is a softmax."""
        self.largest, self.top = largest, top
        if not self.keep:
            for rows in blocks(self.z):
                torch.softmax(self.z[rows], 1, out=self.z[rows])
            self.p = self.z
        return self

    def take_others(self, labels: Tensor) -> Tensor:
        """p (n, V) with 0 at the targets."""
        assert self.p is not None
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

    def _bounded(self, raw: Tensor) -> Tensor:
        z = raw.float() * self.scale
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def collect(self, keys: Sequence[Key], labels: Tensor) -> dict[Key, Tensor]:
        from . import kernels

        names = {key[0] if isinstance(key, tuple) else key for key in keys}
        tempered = next((key for key in keys if isinstance(key, tuple)), None)  # the only one at a parameter
        found = kernels.collect(
            self.raw,
            labels,
            self.scale,
            self.softcap,
            self.width,
            mean=not names.isdisjoint(("mean_logit", "mean_logp")),
            entropy="entropy" in names,
            accuracy="accuracy" in names,
            collision="collision" in names,
            squares=not names.isdisjoint(("other_squares", "possible")),
            temperature=None if tempered is None else float(tempered[1]),
        )
        self.know(found.largest, found.top)
        logp = found.target - found.largest + found.top
        values: dict[Key, Tensor | None] = {
            **{"logp": logp, "lse": found.largest - found.top, "target_logit": found.target},
            **{"entropy": found.entropy, "accuracy": found.accuracy, "collision": found.collision},
            **{"other_squares": found.squares, "possible": found.possible},
            "vocab_size": torch.full_like(logp, self.vocab_size),
        }
        if found.distance is not None:
            values |= {"mean_logit": found.target + found.distance, "mean_logp": logp + found.distance}
        if tempered is not None:
            values[tempered] = found.odds
        asked = ("logp", "lse", *keys)
        known = {key: x for key, x in values.items() if key in asked and x is not None}
        return {**known, "largest": found.largest, "top": found.top}

    def know(self, largest: Tensor, top: Tensor) -> "FusedView":
        self.largest, self.top = largest, top
        return self

    def take_others(self, labels: Tensor) -> Tensor:
        ones = torch.ones_like(self.top)
        return self._pull_(labels, ones / self.scale, torch.zeros_like(ones))

    def pull(self, gradient: "LogitGradient") -> Tensor:
        """The gradient of the matrix product, in its place."""
        added = []
        for columns, values in gradient.columns:
            values = values * self.scale
            if self.softcap is not None:
                values *= 1 - (self.at(columns) / self.softcap) ** 2
            added.append((columns, values))
        dz = self._pull_(gradient.labels, gradient.slope, gradient.own, gradient.mean, self._more(gradient))
        for columns, values in added:
            dz[:, columns] = (dz[:, columns].float() + values).to(dz.dtype)
        return dz

    @staticmethod
    def _more(gradient: "LogitGradient") -> "More":
        """What the kernel adds: it makes the matrices of ``STATISTICS`` itself."""
        from . import kernels

        times, more = gradient.more, kernels.More()
        if "entropy" in times or "collision" in times:
            zero = torch.zeros_like(gradient.slope)
            more.bend = times.get("entropy", zero), times.get("collision", zero)
        more.steep = times.get("other_squares")
        for key, factor in times.items():
            if isinstance(key, tuple):
                more.temperature, more.sharp = float(key[1]), (factor, gradient.values[key])
        return more

    def _pull_(
        self, labels: Tensor, slope: Tensor, own: Tensor, mean: Tensor | None = None, more: "More | None" = None
    ) -> Tensor:
        from . import kernels

        rows = self.largest, self.top, slope, own, mean
        return kernels.pull_(self.raw, labels, *rows, self.scale, self.softcap, self.width, more)


def scale_(gradient: Tensor, by: Tensor, fused: bool) -> None:
    """Multiply a gradient by the scale of the loss, which is often 1: then it need not be read."""
    if fused and gradient.dtype in (torch.bfloat16, torch.float32):
        from . import kernels

        kernels.scale_(gradient, by)
    elif by.device.type != "cpu" or by != 1:  # a device is not asked, as the host would wait
        gradient.mul_(by)


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
    if len({term.key("tempered_odds") for term in terms if term.needs("tempered_odds")}) > 1:
        return "odds at several temperatures"
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
