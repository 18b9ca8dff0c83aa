"""Triton kernels over a chunk of logits, one program a row: what is collected of it, and its gradient in its place; and
one that scales a gradient.

Each reads the logits once, in the dtype of the matrix product (bf16 or float32), and computes in float32 registers.
Importing this needs Triton; it runs on a GPU, or with ``TRITON_INTERPRET=1`` on a CPU.
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 8  # entries of a row at a time, and who reads them: 16 each, 16 bytes a load
PROGRAMS = 1024  # that share the values of a gradient


@dataclass
class Collected:
    """Of each row (n,): the largest logit, its log p, the target's logit, and what else was asked for.

    distance: mean of all logits less the target's. accuracy: 1 where the target is the (first) largest. collision:
    sum of p^2. squares, possible: sum of the squares of the other logits that are not -inf, and number of all that are
    not. odds: log of the sum of e^((z - target's) / temperature) over the others.
    """

    largest: Tensor
    top: Tensor
    target: Tensor
    distance: Tensor | None = None
    entropy: Tensor | None = None
    accuracy: Tensor | None = None
    collision: Tensor | None = None
    squares: Tensor | None = None
    possible: Tensor | None = None
    odds: Tensor | None = None


def collect(
    logits: Tensor,
    labels: Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
    width: int | None = None,
    mean: bool = False,
    entropy: bool = False,
    accuracy: bool = False,
    collision: bool = False,
    squares: bool = False,
    temperature: float | None = None,
) -> Collected:
    """Numbers of rows of logits (n, V), of which it reads each once.

    The logits stand for ``logits * scale``, then ``softcap * tanh(logits / softcap)`` where a softcap is given.

    Args:
        logits: Entries of a row stand beside each other.
        labels: (n,), the targets, each in the vocabulary.
        width: How many entries of a row may be touched: V, or more where there is room for it; see ``pull_``.
        mean, entropy, accuracy, collision, squares: The distance too, and so on.
        temperature: The odds at it too.
    """
    found = torch.empty(10, len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        collect_kernel[(len(logits),)](
            *_rows_of(logits, labels, width), found, len(logits), scale, softcap or 1.0, temperature or 1.0,
            CAPPED=softcap is not None, MEAN=mean, ENTROPY=entropy, ACCURACY=accuracy, COLLISION=collision,
            SQUARES=squares, TEMPERED=temperature is not None, BLOCK=_block(logits), num_warps=WARPS,
        )  # fmt: skip
    wanted = (mean, entropy, accuracy, collision, squares, squares, temperature is not None)
    return Collected(*found[:3], *(x if here else None for x, here in zip(found[3:], wanted, strict=True)))


@dataclass
class More:
    """What ``pull_`` adds where other statistics have a gradient: numbers of each row (n,), float32.

    bend: times log p and times p, added to the slope. steep: times the logit, which is 0 where it is -inf. sharp: times
    the softmax of the others at a temperature, and the odds at it, as collected.
    """

    bend: tuple[Tensor, Tensor] | None = None
    steep: Tensor | None = None
    sharp: tuple[Tensor, Tensor] | None = None
    temperature: float = 1.0


def pull_(
    logits: Tensor,
    labels: Tensor,
    largest: Tensor,
    top: Tensor,
    slope: Tensor,
    own: Tensor,
    mean: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    width: int | None = None,
    more: More | None = None,
) -> Tensor:
    """The gradient in the place of the logits (n, V): slope p + mean / V, and at the target own + mean / V, times the
    derivative of scale and softcap. With slope 1 and own 0 it is p without the target's. ``more`` adds to the others.

    Args:
        largest, top: As ``collect`` found them, (n,).
        slope, own, mean: (n,), float32.
        width: Of each row so many entries may be touched; those behind V become 0. A multiple of 16 lets a row be read
            and written 16 bytes at a time whatever V is.
    """
    more = more or More()
    unused = slope, slope
    if len(logits):
        pull_kernel[(len(logits),)](
            *_rows_of(logits, labels, width), largest, top, slope, own, slope if mean is None else mean,
            *(more.bend or unused), slope if more.steep is None else more.steep, *(more.sharp or unused),
            scale, softcap or 1.0, more.temperature,
            CAPPED=softcap is not None, MEAN=mean is not None, BENT=more.bend is not None,
            SQUARES=more.steep is not None, TEMPERED=more.sharp is not None, BLOCK=_block(logits), num_warps=WARPS,
        )  # fmt: skip
    return logits


def scale_(values: Tensor, by: Tensor) -> Tensor:
    """Values times a number () that is on their device. Where it is 1 they are not read, and the host need not know.

    Args:
        values: Contiguous, bf16 or float32.
    """
    programs = min(PROGRAMS, triton.cdiv(values.numel(), BLOCK))
    if programs:
        scale_kernel[(programs,)](values, by, values.numel(), programs * BLOCK, BLOCK=BLOCK, num_warps=WARPS)
    return values


def _rows_of(logits: Tensor, labels: Tensor, width: int | None) -> tuple[Tensor, int, int, int, Tensor]:
    assert logits.stride(1) == 1 or logits.shape[1] == 1
    return logits, logits.stride(0), logits.shape[1], width or logits.shape[1], labels


def _block(logits: Tensor) -> int:
    return min(BLOCK, triton.next_power_of_2(logits.shape[1]))


@lru_cache
def trial(device: torch.device, dtype: torch.dtype) -> str:
    """What is wrong with the kernels on a device; they are trusted where a few made-up rows come out right."""
    generator = torch.Generator().manual_seed(0)
    raw = (8 * torch.randn(8, 4999, generator=generator)).to(device, dtype)
    labels = torch.arange(8, device=device)
    p, slope = raw.float().softmax(1), torch.linspace(-1, 1, 8, device=device)
    expected = p * slope[:, None]
    expected[labels, labels] = 0.5
    try:
        found = collect(raw, labels)
        logp = found.target - found.largest + found.top
        dz = pull_(raw.clone(), labels, found.largest, found.top, slope, torch.full_like(slope, 0.5)).float()
        scaled = scale_(torch.ones_like(raw), slope[0])
    except Exception as error:  # whatever a compiler or a driver has to say
        return f"they do not run on {device}: {error}"
    close = partial(torch.allclose, rtol=8 * torch.finfo(dtype).eps, atol=1e-5)
    right = close(logp, p[labels, labels].log()) and close(dz, expected) and bool((scaled == -1).all())
    return "" if right else f"they give other numbers than PyTorch on {device}"


@triton.jit
def _bounded(z, scale, softcap, CAPPED: tl.constexpr):
    """Logits after scale and softcap."""
    z = z * scale
    if CAPPED:
        # tanh by an exponential, as Triton's own is not in its interpreter; near 0 by its series, which keeps digits.
        x = z / softcap
        e = tl.exp(-2 * tl.abs(x))
        large = (1 - e) / (1 + e)
        square = x * x
        small = x * (1 - square * (0.33333333333 - square * (0.13333333333 - square * 0.05396825397)))
        z = softcap * tl.where(square < 0.015625, small, tl.where(x < 0, -large, large))
    return z


@triton.jit
def _derivative(z, scale, softcap, CAPPED: tl.constexpr):
    """Of ``_bounded``; 1 - tanh^2 without a difference."""
    if CAPPED:
        e = tl.exp(-2 * tl.abs(z * scale / softcap))
        return scale * (4 * e / ((1 + e) * (1 + e)))
    else:
        return scale


@triton.jit
def collect_kernel(
    logits, stride, V, width, labels, found, n, scale, softcap, temperature,
    CAPPED: tl.constexpr, MEAN: tl.constexpr, ENTROPY: tl.constexpr, ACCURACY: tl.constexpr, COLLISION: tl.constexpr,
    SQUARES: tl.constexpr, TEMPERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    label = tl.load(labels + row)
    target = _bounded(tl.load(line + label).to(tl.float32), scale, softcap, CAPPED)
    # Not -inf: a block of -inf alone has no distance from it.
    largest = tl.full((), -3.4028234e38, tl.float32)
    first = tl.zeros((), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)  # sum of e^(z - largest)
    tilted = tl.zeros((BLOCK,), tl.float32)  # sum of e^(z - largest) (z - largest)
    distance = tl.zeros((BLOCK,), tl.float32)  # from the target, which keeps digits under a common offset
    doubled = tl.zeros((BLOCK,), tl.float32)  # sum of e^(2 (z - largest))
    squares = tl.zeros((BLOCK,), tl.float32)
    possible = tl.zeros((BLOCK,), tl.float32)
    tempered = tl.zeros((BLOCK,), tl.float32)  # sum of e^((z - rival) / temperature), the target left out
    rival = largest
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        raw = tl.load(line + at, mask=at < width, other=0.0).to(tl.float32)
        z = _bounded(raw, scale, softcap, CAPPED)
        z = tl.where(at < V, z, float("-inf"))
        here = tl.max(z, 0)
        above = tl.maximum(largest, here)
        if ACCURACY:
            place = tl.min(tl.where(z == here, at, V), 0)
            first = tl.where(here > largest, place, first)
        faded = tl.exp(largest - above)
        e = tl.exp(z - above)
        if ENTROPY:
            # Bounded, as 0 times -inf has no value. Where the sum is 0 still, there is nothing to move.
            moved = tl.maximum(largest - above, -1e30)
            tilted = faded * (tilted + total * moved) + e * tl.maximum(z - above, -1e30)
        total = total * faded + e
        if COLLISION:
            doubled = doubled * (faded * faded) + e * e
        if MEAN:
            distance += tl.where(at < V, z - target, 0.0)
        if SQUARES:
            possible += (z > float("-inf")).to(tl.float32)
            squares += tl.where((z > float("-inf")) & (at != label), z * z, 0.0)
        if TEMPERED:
            other = tl.where(at == label, float("-inf"), z)
            ahead = tl.maximum(rival, tl.max(other, 0))
            tempered = tempered * tl.exp((rival - ahead) / temperature) + tl.exp((other - ahead) / temperature)
            rival = ahead
        largest = above
    mass = tl.sum(total, 0)
    top = -tl.log(mass)
    tl.store(found + row, largest)
    tl.store(found + n + row, top)
    tl.store(found + 2 * n + row, target)
    if MEAN:
        tl.store(found + 3 * n + row, tl.sum(distance, 0) / V)
    if ENTROPY:
        tl.store(found + 4 * n + row, -top - tl.sum(tilted, 0) / mass)
    if ACCURACY:
        tl.store(found + 5 * n + row, (label == first).to(tl.float32))
    if COLLISION:
        tl.store(found + 6 * n + row, tl.sum(doubled, 0) / (mass * mass))
    if SQUARES:
        # A logit of NaN is not above -inf, and must not go unseen.
        tl.store(found + 7 * n + row, tl.sum(squares, 0) + (mass - mass))
        tl.store(found + 8 * n + row, tl.sum(possible, 0))
    if TEMPERED:
        against = (rival - target) / temperature + tl.log(tl.sum(tempered, 0))
        # Bounded, as the pull subtracts it from -inf; by no maximum, which NaN would not survive.
        tl.store(found + 9 * n + row, tl.where(against < -1e30, -1e30, against))


@triton.jit
def pull_kernel(
    logits, stride, V, width, labels, largest, top, slope, own, mean, of_log, of_p, steep, sharp, odds,
    scale, softcap, temperature,
    CAPPED: tl.constexpr, MEAN: tl.constexpr, BENT: tl.constexpr, SQUARES: tl.constexpr, TEMPERED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    line = logits + row * stride
    label = tl.load(labels + row)
    highest, log_of_it = tl.load(largest + row), tl.load(top + row)
    a, b = tl.load(slope + row), tl.load(own + row)
    if TEMPERED:
        target = _bounded(tl.load(line + label).to(tl.float32), scale, softcap, CAPPED)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        raw = tl.load(line + at, mask=at < width, other=0.0).to(tl.float32)
        z = _bounded(raw, scale, softcap, CAPPED)
        # Not z - lse: far from 0 that has few digits.
        logp = z - highest + log_of_it
        p = tl.exp(logp)
        dz = a * p
        if BENT:
            dz += p * (tl.load(of_log + row) * tl.maximum(logp, -1e30) + tl.load(of_p + row) * p)
        if SQUARES:
            dz += tl.load(steep + row) * tl.where(z > float("-inf"), z, 0.0)
        if TEMPERED:
            dz += tl.load(sharp + row) * tl.exp((z - target) / temperature - tl.load(odds + row))
        dz = tl.where(at == label, b, dz)
        if MEAN:
            dz += tl.load(mean + row) / V
        dz = tl.where(at < V, dz * _derivative(raw, scale, softcap, CAPPED), 0.0)
        tl.store(line + at, dz.to(logits.dtype.element_ty), mask=at < width)


@triton.jit
def scale_kernel(values, by, n, step, BLOCK: tl.constexpr):
    factor = tl.load(by).to(tl.float32)
    if factor != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, step):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(values + at, mask=at < n, other=0.0).to(tl.float32)
            tl.store(values + at, (x * factor).to(values.dtype.element_ty), mask=at < n)
