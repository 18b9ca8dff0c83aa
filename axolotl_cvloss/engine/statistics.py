"""Numbers of a row that take all its logits or probabilities: how they are collected, and how they are pulled back.

They are collected once for all terms that ask for them, in a few passes over a chunk, where autograd would keep several
copies of it. A loss asks for one by the name of an argument; some are taken at a parameter of the loss (``at``).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Key = str | tuple[str, float]  # a statistic, or one at the value of a parameter
FACTORED = ("logp", "lse", "mean_logit", "mean_logp")  # pulled back by ``LogitGradient`` without (n, V) of their own
BLOCK_BYTES = 4 << 20  # of a chunk at a time on a CPU, so that several passes find it in the cache


@dataclass(frozen=True)
class Statistic:
    """A number of each row.

    words: Shape and meaning.
    of: ``z``, it is collected from the logits; ``p``, from the probabilities.
    collect: From z or p (n, V), the targets (n,) and the parameter, the numbers (n,).
    pull: From z or p (n, V), the numbers of the rows (n, 1) by name, and the parameter, the derivative of the number
        in each logit: itself for z, what p is to be multiplied by for p. None: the number counts as a constant.
    own: From the numbers (n, 1) and the parameter the derivative in the target's logit, where ``pull`` is not precise
        or does not know the target.
    also: Another statistic that ``pull`` looks at.
    """

    words: str
    of: str
    collect: Callable[[Tensor, Tensor, float], Tensor]
    pull: Callable[[Tensor, Mapping[str, Tensor], float], Tensor] | None = None
    own: Callable[[Tensor, float], Tensor] | None = None
    also: str = ""


def _tempered(z: Tensor, temperature: float) -> Tensor:
    """z / temperature, from the largest of the row: far from 0 a quotient has few digits."""
    return (z - z.amax(1, keepdim=True)).div_(temperature)


def _tempered_logp(z: Tensor, labels: Tensor, temperature: float) -> Tensor:
    scaled = _tempered(z, temperature)
    return scaled.gather(1, labels[:, None]).squeeze(1) - scaled.logsumexp(1)


def _tempered_pull(z: Tensor, rows: Mapping[str, Tensor], temperature: float) -> Tensor:
    return _tempered(z, temperature).softmax(1).div_(-temperature)


def _top_entropy(p: Tensor, labels: Tensor, k: float) -> Tensor:
    top = p.topk(min(int(k), p.shape[1]), sorted=False).values
    return torch.special.entr(top / top.sum(1, keepdim=True)).sum(1)


STATISTICS: dict[str, Statistic] = {
    "mean_logit": Statistic(
        "(N,) mean of each row's logits",
        "z",
        lambda z, labels, _: z.mean(1),
    ),
    "mean_logp": Statistic(
        "(N,) mean of the log-probabilities of all tokens in each row",
        "z",
        lambda z, labels, _: z.log_softmax(1).mean(1),
    ),
    "variance": Statistic(
        "(N,) variance of each row's logits",
        "z",
        lambda z, labels, _: z.var(1, correction=0),
        lambda z, rows, _: (z - rows["mean_logit"]).mul_(2 / z.shape[1]),
        also="mean_logit",
    ),
    "squares": Statistic(
        "(N,) sum of the squares of each row's logits",
        "z",
        lambda z, labels, _: torch.einsum("nv,nv->n", z, z),
        lambda z, rows, _: 2 * z,
    ),
    "target_logit": Statistic(
        "(N,) logit of each row's target",
        "z",
        lambda z, labels, _: z.gather(1, labels[:, None]).squeeze(1),
        own=lambda value, _: torch.ones_like(value),
    ),
    "tempered_logp": Statistic(
        "(N,) log-probability of each row's target at another temperature: log softmax(z / temperature)",
        "z",
        _tempered_logp,
        _tempered_pull,
        own=lambda value, temperature: -value.expm1() / temperature,
    ),
    "entropy": Statistic(
        "(N,) entropy of each row's distribution, -sum_j p_j log p_j",
        "p",
        lambda p, labels, _: torch.special.entr(p).sum(1),
        lambda p, rows, _: p.clamp_min(torch.finfo(p.dtype).tiny).log_().add_(rows["entropy"]).neg_(),
    ),
    "collision": Statistic(
        "(N,) sum of the squares of each row's probabilities",
        "p",
        lambda p, labels, _: torch.einsum("nv,nv->n", p, p),
        lambda p, rows, _: (p - rows["collision"]).mul_(2),
    ),
    "top_entropy": Statistic("(N,) entropy of the k likeliest tokens among themselves; no gradient", "p", _top_entropy),
    "top_mass": Statistic(
        "(N,) probability of the k likeliest tokens together; no gradient",
        "p",
        lambda p, labels, k: p.topk(min(int(k), p.shape[1]), sorted=False).values.sum(1),
    ),
}


def named(key: Key) -> tuple[Statistic, float]:
    """A statistic and its parameter."""
    name, parameter = key if isinstance(key, tuple) else (key, 0.0)
    return STATISTICS[name], parameter


def blocks(x: Tensor) -> Iterator[slice]:
    """Rows (n, V) a few at a time on a CPU, all at once elsewhere."""
    most = max(1, BLOCK_BYTES // max(1, x.shape[1] * x.itemsize)) if x.device.type == "cpu" else max(1, len(x))
    for first in range(0, len(x), most):
        yield slice(first, min(first + most, len(x)))


def collect(key: Key, x: Tensor, labels: Tensor) -> Tensor:
    """A statistic (n,) of the rows of z or p (n, V)."""
    statistic, parameter = named(key)
    return torch.cat([statistic.collect(x[b], labels[b], parameter) for b in blocks(x)]) if len(x) else x.new_zeros(0)
