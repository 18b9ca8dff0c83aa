"""The Triton kernels in Triton's interpreter against float64, and what they compile to for GPUs, without one."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DEVICE

pytest.importorskip("triton")
from axolotl_cvloss.engine import kernels

EPS = torch.finfo(torch.float32).eps
TEMPERATURE = 0.8
BOUNDS = {"plain": (1.0, None), "scaled": (0.25, None), "capped": (1.0, 5.0), "both": (0.5, 30.0)}
# 1, less than one block, more than one, exactly two; the last has rows that fill their place.
VOCABULARIES = {1: torch.float32, 77: torch.bfloat16, 4999: torch.float32, 8192: torch.bfloat16}
CASES = [(vocab, bound) for vocab in VOCABULARIES for bound in BOUNDS if vocab != 1 or bound in ("plain", "both")]


def rows_of(vocab, dtype):
    """Logits of all sorts, and targets among those that are finite."""
    logits = 4 * torch.randn(9, vocab, generator=torch.Generator().manual_seed(vocab))
    labels = torch.tensor([0, vocab - 1, 0, vocab // 2, 0, vocab - 1, 0, vocab - 1, 1 % vocab])
    logits[0, ::2], logits[0, 1::2] = 1e5, -1e5
    logits[1], logits[2] = logits[1].round() + 1e5, logits[2].round() - 1e5
    # Blocks of -inf alone, at both ends, in front, and behind.
    logits[3, : vocab // 2], logits[3, vocab // 2 + 1 :] = -torch.inf, -torch.inf
    logits[4, max(1, vocab // 3) :], logits[5, : vocab // 2] = -torch.inf, -torch.inf
    # p is 1 to rounding at the target, nearly so, and nearly so somewhere else.
    logits[6, 0], logits[7, -1], logits[8, vocab // 3] = 100.0, 24.0, 24.0
    return logits.to(dtype), labels


def placed(logits, layout):
    """The logits as rows of a larger buffer, and how much of a row may be touched."""
    vocab = logits.shape[1]
    if layout == "contiguous":
        return logits.clone(), None
    padded = -(-vocab // 64) * 64
    buffer = torch.full((len(logits), padded + (64 if layout == "strided" else 0)), torch.nan, dtype=logits.dtype)
    buffer[:, :vocab] = logits
    return buffer[:, :vocab], padded if layout == "padded" else None


def bounded(z, scale, softcap):
    z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def roundings(found, exact, size):
    """The largest error, in epsilons of a size."""
    same = found.double() == exact  # infinities too
    return torch.where(same, 0, (found.double() - exact).abs() / (EPS * size)).max().item()


@pytest.mark.parametrize(("vocab", "bound"), CASES)
def test_collect(vocab, bound):
    logits, labels = rows_of(vocab, VOCABULARIES[vocab])
    scale, softcap = BOUNDS[bound]
    view, width = placed(logits, "padded")
    found = kernels.collect(view, labels, scale, softcap, width, *5 * [True], temperature=TEMPERATURE)
    z = bounded(logits.double(), scale, softcap)
    logp, target = z.log_softmax(1), z.gather(1, labels[:, None])
    # A logit keeps half an epsilon of its size or of the softcap's; distances of logits near each other lose nothing.
    capped = softcap or 0.0
    size = z.nan_to_num(neginf=0.0).abs().amax(1) + capped
    assert roundings(found.largest, z.amax(1), size + 1) <= 2
    assert roundings(found.target, target[:, 0], size + 1) <= 2
    scaled = 1 + logp.amax(1).abs() + capped
    assert roundings(found.top, logp.amax(1), scaled) <= 8
    distance = found.target - found.largest + found.top
    assert roundings(distance, logp.gather(1, labels[:, None])[:, 0], scaled + (target[:, 0] - z.amax(1)).abs()) <= 8
    assert roundings(found.distance, (z - target).mean(1), 1 + capped + (z - target).abs().mean(1)) <= 16
    assert roundings(found.entropy, torch.special.entr(logp.exp()).sum(1), 1 + math.log(vocab) + capped) <= 16
    assert roundings(found.collision, (logp.exp() ** 2).sum(1), (1 + capped) * (logp.exp() ** 2).sum(1)) <= 16
    others = z.scatter(1, labels[:, None], -torch.inf)
    squares = others.nan_to_num(neginf=0.0).square().sum(1)
    assert roundings(found.squares, squares, (1 + capped) * squares.clamp_min(1e-30)) <= 16
    assert found.possible.tolist() == (z > -torch.inf).sum(1).tolist()
    odds = (others / TEMPERATURE).logsumexp(1) - target[:, 0] / TEMPERATURE
    gap = (others.amax(1) - target[:, 0]).abs().nan_to_num(posinf=0.0)
    assert roundings(found.odds, odds.clamp_min(torch.tensor(-1e30).item()), 8 + capped + gap) <= 16
    if softcap is None:  # it makes large logits equal
        assert found.accuracy.tolist() == (logits.argmax(1) == labels).tolist()


@pytest.mark.parametrize(("vocab", "bound"), CASES)
def test_pull(vocab, bound):
    dtype = VOCABULARIES[vocab]
    logits, labels = rows_of(vocab, dtype)
    scale, softcap = BOUNDS[bound]
    view, width = placed(logits, "padded")
    found = kernels.collect(view, labels, scale, softcap, width)
    slope = torch.tensor([1.0, -0.5, 0.25, 1e-4, 0.0, 3.0, 1.0, 1.0, -1.0])
    own = torch.tensor([0.5, 1e-6, -1e-3, -2.0, 0.0, -1.0, -1e-7, -0.1, 0.0])
    mean = torch.tensor([0.0, 1.0, 0.0, 1e-3, 0.0, 0.0, 0.5, 0.0, 0.0])
    kernels.pull_(view, labels, found.largest, found.top, slope, own, mean, scale, softcap, width)

    def gradient(dtype):
        z = logits.to(dtype).requires_grad_()
        bent = bounded(z, scale, softcap)
        dz = slope.to(dtype)[:, None] * bent.detach().softmax(1)
        dz.scatter_(1, labels[:, None], own.to(dtype)[:, None])
        dz += mean.to(dtype)[:, None] / vocab
        (bend,) = torch.autograd.grad(bent.sum(), z)
        return torch.where(z.isfinite(), dz * bend, 0).detach()

    exact, plain = gradient(torch.float64), gradient(torch.float32)
    error = torch.where(logits.isfinite(), (view.double() - exact).abs(), 0)
    size = exact.abs().amax(1, keepdim=True)
    # Three times what PyTorch loses in float32, some roundings (p has those of the softcap's logits), and that of the
    # result, which the interpreter cuts off where a GPU rounds.
    allowed = 3 * (plain.double() - exact).abs().amax(1, keepdim=True) + (16 + 2 * (softcap or 0)) * EPS * size
    allowed = allowed + (exact.abs() * 2**-7 if dtype == torch.bfloat16 else 0)
    assert (error <= allowed).all()
    assert view.isfinite().all()


@pytest.mark.parametrize(("vocab", "bound"), [case for case in CASES if case[0] in (77, 4999)])
def test_pull_of_more(vocab, bound):
    """What entropy, the sum of p^2, squares and odds at a temperature add, against autograd in float64."""
    dtype = VOCABULARIES[vocab]
    logits, labels = rows_of(vocab, dtype)
    scale, softcap = BOUNDS[bound]
    view, width = placed(logits, "padded")
    found = kernels.collect(view, labels, scale, softcap, width, *5 * [True], temperature=TEMPERATURE)
    by_entropy, by_collision, by_squares, by_odds = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    by_squares *= 1e-3
    own = torch.linspace(-1, 1, 9)
    slope = -by_entropy * found.entropy - 2 * by_collision * found.collision
    more = kernels.More(
        (-by_entropy, 2 * by_collision), 2 * by_squares, (by_odds / TEMPERATURE, found.odds), TEMPERATURE
    )
    rows = found.largest, found.top, slope, own, None
    kernels.pull_(view, labels, *rows, scale, softcap, width, more)

    def gradient(dtype):
        z = logits.to(dtype).requires_grad_()
        bent = bounded(z, scale, softcap)
        there = bent.isfinite()  # a softcap makes -inf finite
        safe = torch.where(there, bent, torch.finfo(dtype).min / 4)
        logp = safe.log_softmax(1)
        p = logp.exp()
        place = torch.nn.functional.one_hot(labels, vocab).bool()
        others = safe.masked_fill(place, -torch.inf) / TEMPERATURE
        odds = others.logsumexp(1) - safe.gather(1, labels[:, None])[:, 0] / TEMPERATURE
        squares = torch.where(there & ~place, bent, 0).square().sum(1)
        total = by_entropy.to(dtype) * -(p * logp).sum(1) + by_collision.to(dtype) * (p**2).sum(1)
        total = total + by_squares.to(dtype) * squares + by_odds.to(dtype) * odds
        (dz,) = torch.autograd.grad(total.sum(), z, retain_graph=True)
        (bend,) = torch.autograd.grad(bent[there].sum(), z)
        return torch.where(place, own.to(dtype)[:, None] * bend, torch.where(there, dz, 0)).detach()

    exact, plain = gradient(torch.float64), gradient(torch.float32)
    error = torch.where(logits.isfinite(), (view.double() - exact).abs(), 0)
    size = exact.abs().amax(1, keepdim=True)
    # As above; logits of 1e5 are squared too, and the odds know distances to some roundings of them.
    gap = (found.largest - found.target).abs()[:, None] / TEMPERATURE
    allowed = 3 * (plain.double() - exact).abs().amax(1, keepdim=True) + (32 + 4 * (softcap or 0) + gap) * EPS * size
    allowed = allowed + (exact.abs() * 2**-7 if dtype == torch.bfloat16 else 0)
    assert (error <= allowed).all()
    assert view.isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "padded", "strided"])
def test_only_what_may_be_touched_is(layout):
    logits, labels = rows_of(77, torch.bfloat16)
    logits[:, 70:] = logits[:, 70:].clamp_min(-5)
    view, width = placed(logits, layout)
    found = kernels.collect(view, labels, width=width)
    zeros, ones = torch.zeros(len(logits)), torch.ones(len(logits))
    p = kernels.pull_(view, labels, found.largest, found.top, ones, zeros, width=width)
    assert (p.gather(1, labels[:, None]) == 0).all()
    rest = 1 - logits.float().softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(p.float().sum(1), rest, rtol=0, atol=2**-7)
    behind = view.as_strided((len(view), view.stride(0) - 77), view.stride(), 77)
    assert (behind == 0).all() if layout == "padded" else behind.isnan().all()


def test_a_row_without_a_value_has_none():
    """As softmax has it: a logit of +inf or NaN, or nothing but -inf, makes all of the row NaN, and no other row."""
    logits, labels = rows_of(77, torch.float32)
    logits[0, 3], logits[1, 3], logits[2] = torch.inf, torch.nan, -torch.inf
    found = kernels.collect(logits, labels)
    expected = [True] * 3 + [False] * 6
    assert (found.target - found.largest + found.top).isnan().tolist() == expected
    ones = torch.ones(len(logits))
    kernels.pull_(logits, labels, found.largest, found.top, ones, ones)
    assert logits.isnan().any(1).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("factor", [1.0, 0.25, -3.0, 0.0, 1e-3, math.nan])
def test_scale(dtype, factor):
    """No multiple of what a program takes at a time; as PyTorch rounds, or cut off, which the interpreter does."""
    values = torch.randn(3, kernels.BLOCK // 2 + 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    by = torch.tensor(factor)
    expected = values * by
    found = kernels.scale_(values.clone(), by)
    cut = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(found, expected, rtol=cut, atol=0, equal_nan=True)
    if factor == 1:
        assert torch.equal(found, values)


def test_scale_with_more_values_than_programs(monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 16)
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    values = torch.arange(3 * 16 * 2 + 5.0)
    assert torch.equal(kernels.scale_(values.clone(), torch.tensor(2.0)), 2 * values)


def test_no_rows():
    labels, rows = torch.zeros(0, dtype=torch.long), torch.zeros(0)
    assert kernels.collect(torch.zeros(0, 5), labels, entropy=True).entropy.shape == (0,)
    assert kernels.pull_(torch.zeros(0, 5), labels, rows, rows, rows, rows).shape == (0, 5)
    assert kernels.scale_(torch.zeros(0, 5), torch.tensor(2.0)).shape == (0, 5)


def test_what_they_are_compiled_to(tmp_path):
    """On sm_80 and sm_90 rows are read and written 16 bytes at a time, whatever V is, and no value spills."""
    script = Path(__file__).with_name("compiled_kernels.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 18
    for each in found:
        # What is read and written once a row: the target's logit, and numbers of the row.
        loads = [width for width in each["loads"] if width == "v4.b32"]
        stores = [width for width in each["stores"] if width == "v4.b32"]
        pulls = each["kernel"] != "collect_kernel"
        of_a_row = len(each["loads"]) - len(loads), len(each["stores"]) - len(stores)
        of_all = 16 * (2 if each["dtype"] == "bf16" else 4)  # bytes of a thread's 16 entries
        assert len(loads) * 16 == of_all, each
        assert len(stores) * 16 == (of_all if pulls else 0), each
        more = 6 if each["everything"] else 0
        assert of_a_row[0] <= (6 + more if pulls else 3), each
        assert of_a_row[1] <= (0 if pulls else 4 + more), each
        assert each["stack"] == each["local"] == 0, each


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_kernels_are_tried_before_they_are_trusted(dtype, monkeypatch):
    assert kernels.trial.__wrapped__(DEVICE, dtype) == ""
    right = kernels.pull_
    monkeypatch.setattr(kernels, "pull_", lambda *given: right(*given) * 1.1)
    assert kernels.trial.__wrapped__(DEVICE, dtype) == f"they give other numbers than PyTorch on {DEVICE}"

    def failing(*given):
        raise RuntimeError("no ptxas")

    monkeypatch.setattr(kernels, "collect", failing)
    assert kernels.trial.__wrapped__(DEVICE, dtype) == f"they do not run on {DEVICE}: no ptxas"
