"""Numbers of a row that take all its logits or probabilities: how they are collected, and how they are pulled back.

They are collected once for all terms that ask for them, in one pass over a chunk, where autograd would keep several
copies of it. A loss asks for one by the name of an argument; some are taken at parameters of the loss (``at``).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Key = str | tuple[str, Any]  # a statistic, or one at the value of a parameter, or of several
FACTORED = ("logp", "lse", "mean_logit", "mean_logp")  # pulled back by ``LogitGradient`` without (n, V) of their own
SORTED = 32  # logits of a row that are sorted at first, for sparsemax; more of them where these do not do
BLOCK_BYTES = 2 << 20  # of a chunk at a time on a CPU, so that several passes find it in the cache


@dataclass
class Block:
    """Some rows of a chunk.

    labels: (n,), the targets.
    largest: (n, 1), the largest logit of each row.
    z, p: (n, V), logits, and their softmax where it is there, which may have taken their place.
    values: (n, 1) each, ``logp``, ``top`` (log p of the largest) and the statistics that are known, by key.
    memo: What two statistics make use of.
    rooms: Buffers as large as z, which blocks after each other write into: fresh memory costs more than arithmetic.
    """

    labels: Tensor
    largest: Tensor
    z: Tensor
    p: Tensor
    values: dict[Key, Tensor] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)
    rooms: list[Tensor] = field(default_factory=list)
    taken: int = 0

    def room(self) -> Tensor:
        """(n, V) to write into, which nothing else of this block has."""
        if self.taken == len(self.rooms):
            self.rooms.append(torch.empty_like(self.z, memory_format=torch.contiguous_format))
        self.taken += 1
        return self.rooms[self.taken - 1][: len(self.z)]

    @cached_property
    def away(self) -> Tensor:
        """Distances (n, V) from the largest: far from 0, logits themselves have few digits."""
        return torch.sub(self.z, self.largest, out=self.room())

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
    of: ``z``, it is collected from the logits, before there are probabilities; ``p``, afterwards.
    collect: From a block and the parameter, the numbers (n,).
    pull: From a block and the parameter, a matrix (n, V) of its own, the logits or p. None: the derivative is 0 in the
        logits of other tokens than the target.
    times, slope: From ``values`` and the parameter, (n, 1) or a number. The derivative in the logits of the others is
        ``times`` the matrix, plus ``slope`` (None: 0) times p.
    own: The same for the derivative in the target's logit. None with ``pull`` None: the number counts as a constant.
    also: Other statistics that it looks at, which are then in ``values``; where it is taken at a parameter, they are
        too.
    away: Of ``p``, but ``collect`` looks at ``block.away`` too.
    over_p: ``pull`` looks at p alone, and its matrix is divided by p.
    """

    words: str
    of: str
    collect: Callable[[Block, Any], Tensor]
    pull: Callable[[Block, Any], Tensor] | None = None
    times: Callable[[Block, Any], Tensor | float] = lambda block, _: 1.0
    slope: Callable[[Block, Any], Tensor] | None = None
    own: Callable[[Block, Any], Tensor] | None = None
    also: tuple[str, ...] = ()
    away: bool = False
    over_p: bool = False


def _finite(block: Block, x: Tensor) -> Tensor:
    """The most negative number in the place of -inf, so that it times 0 is 0."""
    return torch.clamp(x, min=torch.finfo(x.dtype).min, out=block.room())


def _entropy(block: Block, q: Tensor, scaled: Tensor) -> Tensor:
    """Entropy (n,) of q (n, V), which is the softmax of what is 0 at the largest of each row."""
    return -q.amax(1).log() - _finite(block, scaled).mul_(q).sum(1)


def _logp(block: Block, _: Any) -> Tensor:
    return torch.clamp(block.p, min=torch.finfo(block.p.dtype).tiny, out=block.room()).log_()


def _mean_away(block: Block) -> Tensor:
    if "mean away" not in block.memo:
        away = block.away if block.ruled_out is None else block.possible(block.room().copy_(block.away))
        block.memo["mean away"] = away.sum(1, keepdim=True) / block.values["possible"]
    return block.memo["mean away"]


def _variance(block: Block, _: Any) -> Tensor:
    from_mean = block.possible(torch.sub(block.away, _mean_away(block), out=block.room()))
    return from_mean.square_().sum(1) / block.values["possible"].squeeze(1)


def _from_mean(block: Block, _: Any) -> Tensor:
    """Logits less the mean of their row, by way of the target's."""
    away = torch.sub(block.z, block.values["target_logit"], out=block.room())
    return block.possible(away.add_(block.values["height"]))


def _others(block: Block, by: Tensor | float) -> Tensor:
    """Distances from the largest logit of the row, times a number; the target's is the least number."""
    scaled = torch.mul(block.away, by, out=block.room())
    return block.others(scaled, torch.finfo(scaled.dtype).min)


def _softmax_of_others(block: Block, by: Tensor | float) -> tuple[Tensor, Tensor]:
    """Of ``_others`` the softmax (n, V) and the logsumexp (n, 1)."""
    others = _others(block, by)
    largest = others.amax(1, keepdim=True)
    q = torch.softmax(others, 1, out=others)
    return q, largest - q.amax(1, keepdim=True).log()  # the largest is 1 over the sum of e^(x - largest)


def _odds(block: Block, temperature: Tensor | float) -> Tensor:
    by = 1 / temperature
    block.memo["odds", temperature], lse = _softmax_of_others(block, by)
    return (lse - block.at_target(block.away) * by).squeeze(1)


def _odds_pull(block: Block, temperature: Tensor | float) -> Tensor:
    others = _others(block, 1 / temperature)
    return torch.softmax(others, 1, out=others)


def _lead(block: Block, temperature: float) -> Tensor:
    mean = _finite(block, block.away).mul_(block.memo["odds", temperature]).sum(1, keepdim=True)
    return (_part_of_others(block, temperature) * (mean - block.at_target(block.away))).squeeze(1)


def _part_of_others(block: Block, temperature: float) -> Tensor:
    return block.values["tempered_odds", temperature].sigmoid()


def _sparse_depth(block: Block, _: Any, k: int = SORTED) -> Tensor:
    k = min(k, block.z.shape[1])
    top = block.away.topk(k).values
    over = top.cumsum(1) - 1
    size = (top * torch.arange(1, k + 1, device=top.device) > over).sum(1, keepdim=True)
    if k < block.z.shape[1] and bool((size == k).any()):  # all that were looked at are in the support
        return _sparse_depth(block, _, 4 * k)
    depth = -over.gather(1, size.clamp_min(1) - 1) / size
    block.memo["sparse"] = (top + depth).clamp_min(0)
    return depth.squeeze(1)


def _sparse_max(block: Block, _: Any) -> Tensor:
    """In the support a logit is q less the depth, from the largest."""
    squares = block.memo["sparse"].square().sum(1, keepdim=True)
    return (squares / 2 - block.values["sparse_depth"] - block.at_target(block.away)).squeeze(1)


def _sparse_own(block: Block, _: Any) -> Tensor:
    away = block.values["target_logit"] - block.largest
    return (away + block.values["sparse_depth"]).clamp_min(0) - 1


def _exponent(block: Block, gamma: float) -> float:
    """The smallest number in the place of 0, which times the -inf of a token that is ruled out would be NaN."""
    return max(gamma, torch.finfo(block.away.dtype).tiny)


def _power_mass(block: Block, gamma: float) -> Tensor:
    """p^gamma is its sum times a softmax."""
    block.memo["powers", gamma], lse = _softmax_of_others(block, _exponent(block, gamma))
    return (lse + gamma * block.values["top"]).exp().squeeze(1)


def _powers(block: Block, gamma: float) -> Tensor:
    mean = _finite(block, block.away).mul_(block.memo["powers", gamma]).sum(1, keepdim=True) + block.values["top"]
    return (mean * block.values["other_power_mass", gamma]).squeeze(1)


def _powers_pull(block: Block, gamma: float) -> Tensor:
    """p_j^gamma (gamma log p_j + 1), divided by the sum of p_j^gamma."""
    others = _others(block, _exponent(block, gamma))
    q = torch.softmax(others, 1, out=block.room())
    return others.add_(gamma * block.values["top"] + 1).clamp_min_(torch.finfo(q.dtype).min).mul_(q)


def _powers_slope(block: Block, gamma: float) -> Tensor:
    return -gamma * block.values["other_powers", gamma] - block.values["other_power_mass", gamma]


def _top(block: Block, k: int) -> Tensor:
    return block.p.topk(min(int(k), block.p.shape[1]), sorted=False).values


def _top_entropy(block: Block, k: int) -> Tensor:
    top = _top(block, k)
    return torch.special.entr(top / top.sum(1, keepdim=True)).sum(1)


def _own_temperature(block: Block, parameters: tuple[float, float]) -> Tensor:
    temperature, alpha = parameters
    q, scaled = block.p, block.away
    if temperature != 1:
        scaled = torch.div(scaled, temperature, out=block.room())
        q = torch.softmax(scaled, 1, out=block.room())
    # Of one token, log V is 0 and so is the entropy.
    most = max(math.log(q.shape[1]), torch.finfo(q.dtype).tiny)
    return temperature * (1 - (1 - _entropy(block, q, scaled) / most) / alpha)


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
        lambda block, _: (block.at_target(block.away) - _mean_away(block)).squeeze(1),
        lambda block, _: block.possible(block.room().fill_(1)),
        lambda block, _: -1 / block.values["possible"],
        own=lambda block, _: 1 - 1 / block.values["possible"],
        also=("possible",),
    ),
    "variance": Statistic(
        "(N,) variance of each row's logits, without tokens that are ruled out",
        "z",
        _variance,
        _from_mean,
        lambda block, _: 2 / block.values["possible"],
        own=lambda block, _: 2 / block.values["possible"] * block.values["height"],
        also=("possible", "target_logit", "height"),
    ),
    "other_squares": Statistic(
        "(N,) sum of the squares of the logits of the other tokens in each row, without those that are ruled out",
        "z",
        lambda block, _: block.possible(block.others(torch.mul(block.z, block.z, out=block.room()))).sum(1),
        lambda block, _: block.z if block.ruled_out is None else block.possible(block.room().copy_(block.z)),
        lambda block, _: 2.0,
        own=lambda block, _: torch.zeros_like(block.largest),
    ),
    "tempered_odds": Statistic(
        "(N,) log-odds against each row's target at a temperature: log sum_{j != y} exp((z_j - z_y) / temperature)",
        "z",
        _odds,
        _odds_pull,
        lambda block, temperature: 1 / temperature,
        own=lambda block, temperature: torch.full_like(block.largest, -1 / temperature),
    ),
    "own_temperature": Statistic(
        "(N,) temperature (1 - (1 - H / log V) / alpha), H the entropy of softmax(z / temperature); no gradient",
        "p",
        _own_temperature,
        away=True,
    ),
    "own_tempered_odds": Statistic(
        "(N,) as tempered_odds, at own_temperature, which has no gradient",
        "p",
        lambda block, at: _odds(block, block.values["own_temperature", at]),
        lambda block, at: _odds_pull(block, block.values["own_temperature", at]),
        lambda block, at: 1 / block.values["own_temperature", at],
        own=lambda block, at: -1 / block.values["own_temperature", at],
        also=("own_temperature",),
        away=True,
    ),
    "tempered_lead": Statistic(
        "(N,) sum_j q_j z_j - z_y, q = softmax(z / temperature), which has no gradient",
        "z",
        _lead,
        _odds_pull,
        _part_of_others,
        own=lambda block, temperature: -_part_of_others(block, temperature),
        also=("tempered_odds",),
    ),
    "sparse_depth": Statistic(
        "(N,) d, with which q_j = max(0, z_j - max z + d) sums to 1; no gradient", "z", _sparse_depth
    ),
    "sparse_max": Statistic(
        "(N,) largest sum_j q_j z_j - q_j^2 / 2 of a distribution q, less z_y",
        "z",
        _sparse_max,
        lambda block, _: torch.add(block.away, block.values["sparse_depth"], out=block.room()).clamp_min_(0),
        own=_sparse_own,
        also=("sparse_depth", "target_logit"),
    ),
    "other_power_mass": Statistic(
        "(N,) sum of p_j^gamma over the other tokens of each row; no gradient",
        "p",
        _power_mass,
        away=True,
    ),
    "other_powers": Statistic(
        "(N,) sum of p_j^gamma log p_j over the other tokens of each row",
        "p",
        _powers,
        _powers_pull,
        lambda block, gamma: block.values["other_power_mass", gamma],
        _powers_slope,
        lambda block, gamma: _powers_slope(block, gamma) * block.values["logp"].exp(),
        also=("other_power_mass",),
        away=True,
    ),
    "accuracy": Statistic(
        "(N,) 1 where the target is the (first) likeliest token, else 0; no gradient",
        "z",
        lambda block, _: (block.z.argmax(1) == block.labels).to(block.z.dtype),
    ),
    "entropy": Statistic(
        "(N,) entropy of each row's distribution, -sum_j p_j log p_j",
        "p",
        lambda block, _: _entropy(block, block.p, block.away),
        _logp,
        lambda block, _: -1.0,
        lambda block, _: -block.values["entropy"],
        lambda block, _: -block.values["logp"].exp() * (block.values["logp"] + block.values["entropy"]),
        away=True,
        over_p=True,
    ),
    "collision": Statistic(
        "(N,) sum of the squares of each row's probabilities",
        "p",
        lambda block, _: torch.mul(block.p, block.p, out=block.room()).sum(1),
        lambda block, _: block.p,
        lambda block, _: 2.0,
        lambda block, _: -2 * block.values["collision"],
        lambda block, _: 2 * block.values["logp"].exp() * (block.values["logp"].exp() - block.values["collision"]),
        over_p=True,
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


def collect(keys: Iterable[Key], logits: Tensor, labels: Tensor, keep: bool = False) -> dict[Key, Tensor]:
    """Statistics (n,) of rows of logits (n, V), ``logp`` and ``lse`` too, ``largest`` and ``top``.

    The logits become probabilities in their place, unless they are to be kept.

    log p of any logit z is (z - largest) + top. It is not z - lse: far from 0, lse has few digits.
    """
    of = {kind: [key for key in keys if named(key)[0].of == kind] for kind in "zp"}
    away = any(named(key)[0].away for key in of["p"])
    found: dict[Key, list[Tensor]] = {}
    rooms: list[Tensor] = []
    for rows in blocks(logits):
        z = logits[rows]
        block = Block(labels[rows], z.amax(1, keepdim=True), z, z, rooms=rooms)
        target = block.at_target(z)
        for key in of["z"]:
            block.values[key] = _collected(block, key)
        if away:
            _ = block.away
        block.p = torch.softmax(z, 1, out=block.room() if keep else z)
        top = block.values["top"] = block.p.amax(1, keepdim=True).log()
        block.values |= {"largest": block.largest, "lse": block.largest - top, "logp": target - block.largest + top}
        for key in of["p"]:
            block.values[key] = _collected(block, key)
        for name, values in block.values.items():
            found.setdefault(name, []).append(values.squeeze(1))
    return {name: torch.cat(values) for name, values in found.items()}


def _collected(block: Block, key: Key) -> Tensor:
    statistic, parameter = named(key)
    return statistic.collect(block, parameter)[:, None]
