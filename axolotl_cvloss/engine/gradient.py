"""The gradient of a chunk of logits: p times one number a row, and values at a few columns."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from .numerics import one_minus_exp
from .sets import Window
from .statistics import FACTORED, Block, Key, blocks, named
from .views import FusedView, View


@dataclass
class LogitGradient:
    """dz = slope * p + own at the target's column + values at columns + mean / V + dense.

    p (n, V) has 0 at the target's column, whose whole gradient is in ``own`` (n,): near p = 1 that is a small
    difference of large numbers, so it must be formed before any matrix product. p is None where a source has kept
    p @ weight instead.
    """

    p: Tensor | None
    slope: Tensor
    labels: Tensor
    own: Tensor
    columns: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (C,) and (n, C)
    mean: Tensor | None = None
    dense: Tensor | None = None
    view: FusedView | None = None  # has p, in place of it, and adds what follows
    more: Mapping[Key, Tensor] = field(default_factory=dict)  # what matrices of statistics that are not in p count
    values: Mapping[Key, Tensor] = field(default_factory=dict)  # of the rows

    @classmethod
    def build(
        cls,
        view: View | None,
        labels: Tensor,
        cotangents: Mapping[Key, Tensor],
        columns: list[tuple[Window, Tensor]],
        values: Mapping[Key, Tensor],
    ) -> "LogitGradient":
        """From the cotangents a of log p, l of lse, m of the mean logit, k of the mean log p, and b of p at columns:

        dz = a (onehot - p) + l p + m / V + k (1 / V - p) + p (b - <b, p>); ``columns`` has p b for the columns of
        windows. Further cotangents are of other statistics. ``values`` has log p, the largest logits and their log p,
        and all statistics. What the view has and ``columns`` are overwritten.
        """
        # (pull + own column) (1 - p) + rest p at the target, pull + own column + rest elsewhere: no difference of
        # large numbers, and 1 - p from log p.
        zero, logp = torch.zeros_like(values["logp"]), values["logp"]
        pull, rest = cotangents.get("logp", zero), cotangents.get("lse", zero)
        mean = cotangents.get("mean_logit")
        if (mean_logp := cotangents.get("mean_logp")) is not None:
            rest = rest - mean_logp
            mean = mean_logp if mean is None else mean + mean_logp
        for window, weighted in columns:
            own_column = window.own_column[:, None]
            pull = pull + weighted.gather(1, own_column).squeeze(1)
            weighted.scatter_(1, own_column, 0)
            rest = rest - weighted.sum(1)
        slope, own = rest - pull, pull * one_minus_exp(logp) + rest * logp.exp()
        of_rows, times = _of_rows(labels, values), {}
        wants_p = bool(columns) or not cotangents.keys().isdisjoint(("logp", "lse", "mean_logp"))
        for key, cotangent in cotangents.items():
            if key in FACTORED:
                continue
            statistic, parameter = named(key)
            if statistic.own is not None:
                own = own + cotangent * statistic.own(of_rows, parameter).squeeze(1)
            if statistic.slope is not None:
                slope, wants_p = slope + cotangent * statistic.slope(of_rows, parameter).squeeze(1), True
            if statistic.pull is not None:
                times[key] = (cotangent[:, None] * statistic.times(of_rows, parameter)).squeeze(1)
        found = [(window.columns, weighted) for window, weighted in columns]
        if view is None or isinstance(view, FusedView):
            return cls(None, slope, labels, own, found, mean, view=view, more=times, values=values)
        if times or view.p is None:
            slope = _bend(view, of_rows, slope if wants_p else None, times)
        return cls(view.z.scatter_(1, labels[:, None], 0), slope, labels, own, found, mean)

    def scaled(self, factor: float) -> "LogitGradient":
        if factor == 1:
            return self
        return LogitGradient(
            self.p,
            self.slope * factor,
            self.labels,
            self.own * factor,
            [(index, values * factor) for index, values in self.columns],
            None if self.mean is None else self.mean * factor,
            None if self.dense is None else self.dense * factor,
        )

    def materialize(self) -> Tensor:
        """dz itself, (n, V), in the place of p."""
        assert self.p is not None
        gradient = self.p.mul_(self.slope[:, None])
        for index, values in self.columns:
            gradient.index_add_(1, index, values)
        gradient.scatter_add_(1, self.labels[:, None], self.own[:, None])
        if self.mean is not None:
            gradient += self.mean[:, None] / gradient.shape[1]
        if self.dense is not None:
            gradient += self.dense
        return gradient

    def times(self, weight: Tensor, mixture: Tensor | None = None) -> Tensor:
        """dz @ weight, (n, H), for a weight (V, H), without forming dz; ``mixture`` is p @ weight where it is known."""
        dtype = self.slope.dtype
        if mixture is None:
            assert self.p is not None
            mixture = self.p.to(weight.dtype) @ weight
        product = mixture.to(dtype).mul_(self.slope[:, None])
        product += weight[self.labels].to(dtype).mul_(self.own[:, None])
        for index, values in self.columns:
            values, unit = fitted(values, weight.dtype)
            product += restored(values @ weight[index], unit)
        if self.mean is not None:
            product += self.mean[:, None] * weight.mean(0, dtype=dtype)
        return product

    def add_outer(self, hidden: Tensor, total: Tensor) -> None:
        """Add dz.T @ hidden to a total (V, H), without forming dz."""
        assert self.p is not None
        slope, unit = fitted(self.slope, hidden.dtype)
        sloped = hidden * slope[:, None]
        if unit is None:
            add_product(total, self.p.to(hidden.dtype).T, sloped)
        else:
            total += restored(self.p.to(hidden.dtype).T @ sloped, unit)
        hidden = hidden.to(total.dtype)
        total.index_add_(0, self.labels, hidden * self.own[:, None])
        for index, values in self.columns:
            total.index_add_(0, index, values.T @ hidden)
        if self.mean is not None:
            total += (self.mean @ hidden) / len(total)

    def sum_rows(self) -> Tensor:
        """dz summed over the rows, (V,)."""
        assert self.p is not None
        total = self.slope @ self.p
        total.index_add_(0, self.labels, self.own)
        for index, values in self.columns:
            total.index_add_(0, index, values.sum(0))
        if self.mean is not None:
            total += self.mean.sum() / len(total)
        return total


def _of_rows(labels: Tensor, values: Mapping[Key, Tensor]) -> Block:
    """A block for what takes no more than the statistics of rows."""
    columns = {key: x[:, None] for key, x in values.items()}
    return Block(labels, columns["largest"], labels, labels, columns)


def _bend(view: View, of_rows: Block, slope: Tensor | None, times: Mapping[Key, Tensor]) -> Tensor:
    """Put what statistics add to the gradient into the place of p, by rows in a unit of their own; the new slope.

    Args:
        slope: (n,), of p; None: p is not needed.
        times: (n,), what the matrices of statistics count.
    """
    parts = ([] if slope is None else [slope.abs()]) + [factor.abs() for factor in times.values()]
    unit = sum(parts, torch.zeros_like(of_rows.largest.squeeze(1))).clamp_min(torch.finfo(view.z.dtype).tiny)
    share = {key: (factor / unit)[:, None] for key, factor in times.items()}
    rooms: list[Tensor] = []
    for rows in blocks(view.z):
        here = {key: x[rows] for key, x in of_rows.values.items()}
        place = view.z[rows]
        block = Block(of_rows.labels[rows], here["largest"], place, place, here, rooms=rooms)
        if slope is not None and view.p is None:
            block.p = torch.softmax(place, 1, out=block.room())
        matrices = {key: _pulled(block, key) for key in share}
        others = [(matrix, share[key][rows]) for key, matrix in matrices.items() if not named(key)[0].over_p]
        total: Tensor | None = None
        if slope is not None:
            factor = (slope / unit)[rows, None]
            for key, matrix in matrices.items():
                if named(key)[0].over_p:
                    factor = torch.addcmul(factor, matrix, share[key][rows], out=block.room())
            total = torch.mul(block.p, factor, out=block.p if others else place)
        for number, (matrix, ours) in enumerate(others, start=1):
            out = place if number == len(others) else matrix
            total = torch.mul(matrix, ours, out=out) if total is None else torch.addcmul(total, matrix, ours, out=out)
        if total is None:
            place.zero_()
    return unit


def _pulled(block: Block, key: Key) -> Tensor:
    statistic, parameter = named(key)
    assert statistic.pull is not None
    return statistic.pull(block, parameter)


def fitted(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Values (n, ...) in the dtype of a product, and the unit they are in.

    float16 ends at 6e-8, and the gradient of one row among 100,000 lies near there: it loses its digits before any
    scale of the loss comes to it. So in float16 the largest value becomes 1, or less where so many rows are summed that
    the sum might be too large.
    """
    if dtype != torch.float16 or not values.numel():
        return values.to(dtype), None
    unit = values.abs().amax().clamp_min(torch.finfo(values.dtype).tiny) * max(1.0, len(values) / 64)
    return (values / unit).to(dtype), unit


def restored(product: Tensor, unit: Tensor | None) -> Tensor:
    """A product of fitted values, in the unit it would have without fitting."""
    return product if unit is None else product.to(unit.dtype).mul_(unit)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a total, without rounding to a smaller dtype first where the device has such a product."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif wide_products(total):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in another dtype than theirs."""
    if left.dtype != dtype and wide_products(left):
        return torch.mm(left, right, out_dtype=dtype)
    return (left @ right).to(dtype)


def wide_products(tensor: Tensor) -> bool:
    """Whether its device multiplies bf16 into float32, in this torch."""
    return tensor.device.type == "cuda" and _widens(tensor.device)


@lru_cache
def _widens(device: torch.device) -> bool:
    ones, total = torch.ones(16, 16, dtype=torch.bfloat16, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
        return bool((total == 17).all()) and bool((torch.mm(ones, ones, out_dtype=torch.float32) == 16).all())
    except (RuntimeError, TypeError):
        return False


def cotangents(total: Tensor | float, leaves: Iterable[Tensor]) -> list[Tensor]:
    """The gradient of a total for each of its leaves, zeros where it does not depend on one."""
    leaves = list(leaves)
    found = cotangents_or_none(total, leaves)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def cotangents_or_none(total: Tensor | float, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """The same, None where it does not depend on one."""
    if not isinstance(total, Tensor) or not total.requires_grad:
        return [None] * len(leaves)
    return list(torch.autograd.grad(total, leaves, allow_unused=True))


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of the gradient of a tensor until the scale of the loss has come to it, in the backward pass."""
    return torch.float32 if dtype == torch.float16 else dtype


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
