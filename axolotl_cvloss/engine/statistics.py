"""Numbers of a row that take all its logits or probabilities: how they are collected, and how they are pulled back.

They are collected once for all terms that ask for them, in one pass over a chunk, where autograd would keep several
copies of it. A loss asks for one by the name of an argument; some are taken at parameters of the loss (``at``).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Key = str | tuple[str, Any]  # a statistic, or one at the value of a parameter, or of several
FACTORED = ("logp", "lse", "mean_logit", "mean_logp")  # pulled back by ``LogitGradient`` without (n, V) of their own
BLOCK_BYTES = 2 << 20  # of a chunk at a time on a CPU, so that several passes find it in the cache


@dataclass
class Block:
    """Some rows of a chunk.

    z, p: (n, V), logits, and their softmax where it is there; while statistics are collected it takes their place.
    labels: (n,), the targets.
    largest: (n, 1), the largest logit of each row.
    values: (n, 1) each, ``logp``, ``top`` (log p of the largest) and the statistics that are known, by key.
    memo: What two statistics make use of.
    """

    labels: Tensor
    largest: Tensor
    z: Tensor
    p: Tensor
    values: dict[Key, Tensor] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def away(self) -> Tensor:
        """Distances (n, V) from the largest: far from 0, logits themselves have few digits."""
        return self.z - self.largest

    @cached_property
    def ruled_out(self) -> Tensor | None:
        """Where a logit is -inf; None where none is, which only a CPU is asked."""
        if self.z.device.type == "cpu" and bool(self.z.amin() > -torch.inf):
            return None
        return self.z == -torch.inf

    def possible(self, x: Tensor) -> Tensor:
        """x (n, V), which is overwritten, with 0 for the tokens that are ruled out."""
        return x if self.ruled_out is None else x.masked_fill_(self.ruled_out, 0)

    def at_target(self, x: Tensor) -> Tensor:
        """(n, 1) of x (n, V)."""
        return x.gather(1, self.labels[:, None])

    def others(self, x: Tensor, value: float = 0.0) -> Tensor:
        """x (n, V), which is overwritten, with a value at the targets."""
        return x.scatter_(1, self.labels[:, None], value)


@dataclass(frozen=True)
class Statistic:
    """A number of each row.

    words: Shape and meaning.
    of: ``z``, it is collected from the logits, before there are probabilities; ``p``, from these.
    collect: From a block and the parameter, the numbers (n,).
    pull: From a block and the parameter, a matrix (n, V) of its own or the logits, and ``times`` (n, 1) or a number;
        their product is the derivative of the number in each logit, divided by p where ``of`` is ``p``. None: there
        is none in the logits of other tokens than the target.
    own: The derivative in the target's logit, (n, 1), from ``values`` and the parameter. None with ``pull`` None: the
        number counts as a constant.
    also: Other statistics that it looks at, which are then in ``values``; where it is taken at a parameter, they are
        too.
    away: Of ``p``, but ``collect`` looks at ``block.away`` too.
    """

    words: str
    of: str
    collect: Callable[[Block, Any], Tensor]
    pull: Callable[[Block, Any], Tensor] | None = None
    times: Callable[[Block, Any], Tensor | float] = lambda block, _: 1.0
    own: Callable[[Block, Any], Tensor] | None = None
    also: tuple[str, ...] = ()
    away: bool = False


def _log(p: Tensor) -> Tensor:
    return p.clamp_min(torch.finfo(p.dtype).tiny).log_()


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, y)


def _finite(x: Tensor) -> Tensor:
    """The most negative number in the place of -inf, so that it times 0 is 0."""
    return x.clamp_min(torch.finfo(x.dtype).min)


def _variance(block: Block, _: Any) -> Tensor:
    count = block.values["possible"]
    away = block.possible(block.away.clone())
    away -= away.sum(1, keepdim=True) / count
    return block.possible(away).square_().sum(1) / count.squeeze(1)


def _height(block: Block, _: Any) -> Tensor:
    away = block.away if block.ruled_out is None else block.possible(block.away.clone())
    return block.at_target(block.away).squeeze(1) - away.sum(1) / block.values["possible"].squeeze(1)


def _from_mean(block: Block, _: Any) -> Tensor:
    """Logits less the mean of their row, by way of the target's."""
    return block.possible((block.z - block.values["target_logit"]).add_(block.values["height"]))


def _others_at(block: Block, temperature: Tensor | float) -> Tensor:
    """Logits at a temperature, from the largest of the row; the target's is the least number."""
    away = torch.sub(block.z, block.largest)
    return block.others(away.div_(temperature), torch.finfo(away.dtype).min)


def _odds(block: Block, temperature: Tensor | float) -> Tensor:
    target = block.at_target(block.away) / temperature
    others = _others_at(block, temperature)
    largest = others.amax(1, keepdim=True)
    # The largest p is 1 over the sum of e^(z - largest).
    lse = largest - torch.softmax(others, 1, out=others).amax(1, keepdim=True).log()
    return (lse - target).squeeze(1)


def _powers(block: Block, gamma: float) -> tuple[Tensor, Tensor]:
    """log p and p^gamma, (n, V) each, 0 at the targets. log p is bounded, so that gamma times it times 0 is 0."""
    if gamma not in block.memo:
        logp = block.z.log_softmax(1).clamp_min_(-1e30)
        block.memo[gamma] = block.others(logp), block.others((gamma * logp).exp_())
    return block.memo[gamma]


def _powers_pull(block: Block, gamma: float) -> Tensor:
    """p_j^gamma (gamma log p_j + 1), less p_j times the sum of these."""
    logp, powers = _powers(block, gamma)
    derivative = powers.mul_(logp.mul_(gamma).add_(1))
    return derivative.addcmul_(block.p, derivative.sum(1, keepdim=True), value=-1)


def _powers_own(block: Block, gamma: float) -> Tensor:
    total = gamma * block.values["other_powers", gamma] + block.values["other_power_mass", gamma]
    return -total * block.values["logp"].exp()


def _top(block: Block, k: int) -> Tensor:
    return block.p.topk(min(int(k), block.p.shape[1]), sorted=False).values


def _top_entropy(block: Block, k: int) -> Tensor:
    top = _top(block, k)
    return torch.special.entr(top / top.sum(1, keepdim=True)).sum(1)


def _own_temperature(block: Block, parameters: tuple[float, float]) -> Tensor:
    temperature, alpha = parameters
    scaled = block.away / temperature
    q = scaled.softmax(1)
    entropy = -q.amax(1).log() - _dot(q, _finite(scaled))
    # Of one token, log V is 0 and so is the entropy.
    most = torch.tensor(q.shape[1], dtype=q.dtype).log().clamp_min(torch.finfo(q.dtype).tiny).to(q.device)
    return temperature * (1 - (1 - entropy / most) / alpha)


STATISTICS: dict[str, Statistic] = {
    "mean_logit": Statistic("(N,) mean of each row's logits", "z", lambda block, _: block.z.mean(1)),
    "mean_logp": Statistic(
        "(N,) mean of the log-probabilities of all tokens in each row",
        "p",
        lambda block, _: block.away.mean(1) + block.values["top"].squeeze(1),
        away=True,
    ),
    "target_logit": Statistic(
        "(N,) logit of each row's target",
        "z",
        lambda block, _: block.at_target(block.z).squeeze(1),
        own=lambda block, _: torch.ones_like(block.largest),
    ),
    "vocab_size": Statistic(
        "(N,) number of tokens in the vocabulary; no gradient",
        "z",
        lambda block, _: block.z.new_full((len(block.z),), block.z.shape[1]),
    ),
    "possible": Statistic(
        "(N,) number of tokens that are not ruled out (by a logit of -inf); no gradient",
        "z",
        lambda block, _: (
            block.z.new_full((len(block.z),), block.z.shape[1])
            if block.ruled_out is None
            else (~block.ruled_out).sum(1).to(block.z.dtype)
        ),
    ),
    "height": Statistic(
        "(N,) target's logit less the mean of its row's logits, without tokens that are ruled out",
        "z",
        _height,
        lambda block, _: block.possible(torch.ones_like(block.z)),
        lambda block, _: -1 / block.values["possible"],
        lambda block, _: 1 - 1 / block.values["possible"],
        also=("possible",),
    ),
    "variance": Statistic(
        "(N,) variance of each row's logits, without tokens that are ruled out",
        "z",
        _variance,
        _from_mean,
        lambda block, _: 2 / block.values["possible"],
        lambda block, _: 2 / block.values["possible"] * block.values["height"],
        also=("possible", "target_logit", "height"),
    ),
    "other_squares": Statistic(
        "(N,) sum of the squares of the logits of the other tokens in each row, without those that are ruled out",
        "z",
        lambda block, _: block.possible(block.others(block.z.square())).sum(1),
        lambda block, _: block.z if block.ruled_out is None else block.possible(block.z.clone()),
        lambda block, _: 2.0,
        lambda block, _: torch.zeros_like(block.largest),
    ),
    "tempered_odds": Statistic(
        "(N,) log-odds against each row's target at a temperature: log sum_{j != y} exp((z_j - z_y) / temperature)",
        "z",
        _odds,
        lambda block, temperature: _others_at(block, temperature).softmax(1),
        lambda block, temperature: 1 / temperature,
        lambda block, temperature: torch.full_like(block.largest, -1 / temperature),
    ),
    "own_temperature": Statistic(
        "(N,) temperature (1 - (1 - H / log V) / alpha), H the entropy of softmax(z / temperature); no gradient",
        "z",
        _own_temperature,
    ),
    "own_tempered_odds": Statistic(
        "(N,) as tempered_odds, at own_temperature, which has no gradient",
        "z",
        lambda block, at: _odds(block, block.values["own_temperature", at]),
        lambda block, at: _others_at(block, block.values["own_temperature", at]).softmax(1),
        lambda block, at: 1 / block.values["own_temperature", at],
        lambda block, at: -1 / block.values["own_temperature", at],
        also=("own_temperature",),
    ),
    "other_power_mass": Statistic(
        "(N,) sum of p_j^gamma over the other tokens of each row; no gradient",
        "z",
        lambda block, gamma: _powers(block, gamma)[1].sum(1),
    ),
    "other_powers": Statistic(
        "(N,) sum of p_j^gamma log p_j over the other tokens of each row",
        "z",
        lambda block, gamma: _dot(*_powers(block, gamma)),
        _powers_pull,
        own=_powers_own,
        also=("other_power_mass",),
    ),
    "accuracy": Statistic(
        "(N,) 1 where the target is the (first) likeliest token, else 0; no gradient",
        "z",
        lambda block, _: (block.z.argmax(1) == block.labels).to(block.z.dtype),
    ),
    "entropy": Statistic(
        "(N,) entropy of each row's distribution, -sum_j p_j log p_j",
        "p",
        lambda block, _: -block.values["top"].squeeze(1) - _dot(block.p, _finite(block.away)),
        lambda block, _: _log(block.p).add_(block.values["entropy"]),
        lambda block, _: -1.0,
        lambda block, _: -block.values["logp"].exp() * (block.values["logp"] + block.values["entropy"]),
        away=True,
    ),
    "collision": Statistic(
        "(N,) sum of the squares of each row's probabilities",
        "p",
        lambda block, _: _dot(block.p, block.p),
        lambda block, _: block.p - block.values["collision"],
        lambda block, _: 2.0,
        lambda block, _: 2 * block.values["logp"].exp() * (block.values["logp"].exp() - block.values["collision"]),
    ),
    "top_entropy": Statistic("(N,) entropy of the k likeliest tokens among themselves; no gradient", "p", _top_entropy),
    "top_mass": Statistic(
        "(N,) probability of the k likeliest tokens together; no gradient",
        "p",
        lambda block, k: _top(block, k).sum(1),
    ),
}


def named(key: Key) -> tuple[Statistic, Any]:
    """A statistic and its parameter."""
    name, parameter = key if isinstance(key, tuple) else (key, None)
    return STATISTICS[name], parameter


def with_others(keys: Iterable[Key]) -> list[Key]:
    """The keys and those that their statistics look at, which come before them."""
    found: dict[Key, None] = {}
    for key in keys:
        also = [(name, key[1]) if isinstance(key, tuple) else name for name in named(key)[0].also]
        found |= dict.fromkeys([*with_others(also), key])
    return list(found)


def blocks(x: Tensor) -> Iterator[slice]:
    """Rows (n, V) a few at a time on a CPU, all at once elsewhere."""
    most = max(1, BLOCK_BYTES // max(1, x.shape[1] * x.itemsize)) if x.device.type == "cpu" else max(1, len(x))
    for first in range(0, len(x), most):
        yield slice(first, min(first + most, len(x)))


def collect(keys: Iterable[Key], logits: Tensor, labels: Tensor, kept: Tensor | None = None) -> dict[Key, Tensor]:
    """Statistics (n,) of rows of logits (n, V), ``logp`` and ``lse`` too, ``largest`` and ``top``.

    The logits become probabilities in their place; ``kept`` (n, V) gets what they were.

    log p of any logit z is (z - largest) + top. It is not z - lse: far from 0, lse has few digits.
    """
    of = {kind: [key for key in keys if named(key)[0].of == kind] for kind in "zp"}
    away = any(named(key)[0].away for key in of["p"])
    found: dict[Key, list[Tensor]] = {}
    for rows in blocks(logits):
        z = logits[rows]
        if kept is not None:
            kept[rows] = z
        block = Block(labels[rows], z.amax(1, keepdim=True), z, z)
        target = block.at_target(z)
        for key in of["z"]:
            block.values[key] = _collected(block, key)
        if away:
            _ = block.away
        torch.softmax(z, 1, out=z)
        top = block.values["top"] = z.amax(1, keepdim=True).log()
        block.values |= {"largest": block.largest, "lse": block.largest - top, "logp": target - block.largest + top}
        for key in of["p"]:
            block.values[key] = _collected(block, key)
        for name, values in block.values.items():
            found.setdefault(name, []).append(values.squeeze(1))
    return {name: torch.cat(values) for name, values in found.items()}


def _collected(block: Block, key: Key) -> Tensor:
    statistic, parameter = named(key)
    return statistic.collect(block, parameter)[:, None]
