"""Heads: the objective of hidden states equals that of the logits they make, values and gradients."""

import gc
import math

import pytest
import torch
from helpers import DEVICE, KNOWN, check_slope
from sampling import pairwise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from axolotl_cvloss import Objective, available_losses
from axolotl_cvloss.engine import batch as engine_batch

V, H, B, T = 37, 8, 2, 19

OBJECTIVES = {
    **{name: name for name in available_losses()},
    "smoothed": {"cross_entropy": {"weight": 1.0, "label_smoothing": 0.2}},
    "mix": {"cross_entropy": 0.6, "lovasz": 0.4},
    "everything": {
        "terms": [
            {"loss": "cross_entropy", "weight": 0.6, "scope": "sequence", "label_smoothing": 0.1},
            {"loss": "focal", "gamma": 1.5},
            {"loss": "lovasz", "weight": 0.4},
            {"loss": "lovasz", "weight": 0.3, "per": "batch", "tolerance": 0.01},
            {"loss": "generalized_dice", "weight": 0.2},
        ]
    },
}
NAMES = list(OBJECTIVES)
# Which of hidden states, weight and bias want a gradient.
WANTED = {"all": (1, 1, 1), "frozen": (1, 0, 0), "head": (0, 1, 1), "weight": (0, 1, 0)}
SHAPES = {"plain": (1.0, None), "capped": (0.25, 3.0)}  # scale and cap of the logits
CHUNKS = {f"chunk{rows}": rows for rows in (1, 7, 33, 1000)}
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = {"uniform": 0.0, "saturated": 30.0, "extreme": 1e4}
# Of those that the kernels serve: every family and every source of columns.
FUSED = ["smoothed", "everything", "topk_cross_entropy", "number_token_mse"]


@pytest.fixture(params=CHUNKS.values(), ids=CHUNKS)
def chunk(request, monkeypatch):
    set_chunk(monkeypatch, request.param)
    return request.param


def set_chunk(monkeypatch, rows):
    monkeypatch.setitem(engine_batch.CHUNK_BYTES, DEVICE.type, rows * V * 8)


def batch(seed=0, trained=slice(5, None)):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.full((B, T), -100)
    labels[:, trained] = torch.randint(0, V, (B, T), generator=generator)[:, trained]
    input_ids = labels.clamp_min(3)
    position_ids = torch.cat([torch.arange(11), torch.arange(T - 11)]).expand(B, T)
    reference_logps = -4 * torch.rand(B, T, generator=generator, dtype=torch.float64)
    return {
        "labels": labels,
        "input_ids": input_ids,
        "position_ids": position_ids,
        "reference_logps": reference_logps,
    }


def tensors(dtype=torch.float64, seed=1, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        size * torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in ((B, T, H), (V, H), (V,))
    ]


def expected(objective, rows, hidden, weight, bias, scale, softcap, wanted):
    leaves = [t.clone().requires_grad_(w) for t, w in zip((hidden, weight, bias), wanted, strict=True)]
    logits = (leaves[0] @ leaves[1].T + leaves[2]) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    result = objective.from_logits(logits, **rows)
    grads = torch.autograd.grad(result.loss, [leaf for leaf, w in zip(leaves, wanted, strict=True) if w])
    return result, grads


def linear(weight, bias, wanted):
    head = nn.Linear(H, V, dtype=weight.dtype)
    head.weight = nn.Parameter(weight.clone(), requires_grad=wanted[1])
    head.bias = nn.Parameter(bias.clone(), requires_grad=wanted[2])
    return head


@pairwise(name=NAMES, shape=SHAPES, wanted=WANTED, called={"read": False, "called": True}, rows_of_a_chunk=CHUNKS)
def test_a_head_equals_its_logits(name, shape, wanted, called, rows_of_a_chunk, monkeypatch):
    set_chunk(monkeypatch, rows_of_a_chunk)
    scale, softcap = shape
    objective, rows = Objective.from_config(OBJECTIVES[name], **KNOWN), batch()
    hidden, weight, bias = tensors()
    wanted = [bool(w) for w in wanted]
    result, grads = expected(objective, rows, hidden, weight, bias, scale, softcap, wanted)

    head = linear(weight, bias, wanted)
    leaf = hidden.clone().requires_grad_(wanted[0])
    found = objective.from_hidden(leaf, nn.Sequential(head) if called else head, **rows, scale=scale, softcap=softcap)
    leaves = [t for t in (leaf, head.weight, head.bias) if t.requires_grad]
    torch.testing.assert_close(found.loss, result.loss, rtol=1e-9, atol=1e-12)
    assert found.terms.keys() == result.terms.keys()
    for term, value in found.terms.items():
        torch.testing.assert_close(value, result.terms[term], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.nll, result.nll)
    for grad, right in zip(torch.autograd.grad(found.loss, leaves), grads, strict=True):
        torch.testing.assert_close(grad, right, rtol=1e-9, atol=1e-12)


def test_a_weight_alone_is_a_head():
    objective, rows = Objective.from_config(OBJECTIVES["mix"]), batch()
    hidden, weight, bias = tensors()
    result, _ = expected(objective, rows, hidden, weight, 0 * bias, 1.0, None, (True, True, False))
    torch.testing.assert_close(objective.from_hidden(hidden, weight, **rows).loss, result.loss)


@pytest.mark.parametrize("trained", [slice(0, 0), slice(8, 9)], ids=["none", "one"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_trained_row_and_one(name, trained):
    objective, rows = Objective.from_config(OBJECTIVES[name], **KNOWN), batch(trained=trained)
    hidden, weight, bias = tensors()
    result, grads = expected(objective, rows, hidden, weight, bias, 1.0, None, (True, True, True))
    head, leaf = linear(weight, bias, (True, True, True)), hidden.clone().requires_grad_()
    found = objective.from_hidden(leaf, head, **rows)
    found.loss.backward()
    assert found.loss.isfinite()
    torch.testing.assert_close(found.loss, result.loss)
    for grad, right in zip((leaf.grad, head.weight.grad, head.bias.grad), grads, strict=True):
        torch.testing.assert_close(grad, right)


class Copies(TorchDispatchMode):
    """The shapes that are copied."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.shapes.append(args[0].shape)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["focal", "mix"])
def test_a_step_leaves_nothing_behind_and_copies_no_gradient(name):
    objective, rows = Objective.from_config(OBJECTIVES[name]), batch()
    hidden, weight, bias = (t.float() for t in tensors())
    head = linear(weight, bias, (True, True, True))

    def alive():
        return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = alive()
        with Copies() as copies:
            objective.from_hidden(hidden.clone().requires_grad_(), head, **rows).loss.backward()
        assert alive() <= before + 2  # the gradients of the head
    finally:
        gc.enable()
    assert head.weight.shape not in copies.shapes


def unknown(name, logits, labels):
    """What float32 cannot know of the value: -log(1 - p) where 1 - p is below rounding. In float64 it is up to 708."""
    if name != "unlikelihood":
        return 0.0
    trained = labels[:, 1:] != -100
    p = logits[:, :-1][trained].softmax(1).gather(1, labels[:, 1:][trained][:, None])
    confident = p > 1 - 1000 * torch.finfo(torch.float32).eps
    return -math.log(torch.finfo(torch.float64).tiny) * confident.double().mean().item()


@pairwise(name=NAMES, frozen=[False, True], size=SIZES)
def test_extreme_models(name, size, frozen):
    check_extreme_model(name, size, frozen)


@pairwise(name=FUSED, frozen=[False, True], size=SIZES)
def test_extreme_models_by_the_kernels(kernels_on, name, size, frozen):
    check_extreme_model(name, size, frozen)


def check_extreme_model(name, size, frozen):
    """Uniform probabilities, p = 1 to rounding, and logits of 1e4: finite, and as accurate as full logits."""
    objective, rows = Objective.from_config(OBJECTIVES[name], **KNOWN), batch()
    hidden, weight, bias = (t.float() for t in tensors(size=size**0.5))
    wanted = (True, not frozen, False)
    doubles = [t.double() for t in (hidden, weight, bias)]
    right, right_grads = expected(objective, rows, *doubles, 1.0, None, wanted)
    _, plain_grads = expected(objective, rows, hidden, weight, bias, 1.0, None, wanted)
    leaf, head = hidden.clone().requires_grad_(), linear(weight, bias, wanted)
    found = objective.from_hidden(leaf, head, **rows)
    assert found.loss.isfinite()
    allowed = 1e-5 + unknown(name, torch.nn.functional.linear(*doubles), rows["labels"])
    torch.testing.assert_close(found.loss.double(), right.loss.double(), rtol=1e-4, atol=allowed)
    grads = torch.autograd.grad(found.loss, [t for t in (leaf, head.weight) if t.requires_grad])
    for grad, plain, exact in zip(grads, plain_grads, right_grads, strict=True):
        assert grad.isfinite().all()
        lost = (plain.double() - exact).abs().max()
        assert (grad.double() - exact).abs().max() <= 3 * lost + 1e-5 * exact.abs().max() + 1e-9


@pairwise(name=NAMES, dtype=DTYPES, frozen=[False, True])
def test_low_precision_is_as_good_as_plain_torch(name, dtype, frozen, monkeypatch):
    monkeypatch.setitem(engine_batch.CHUNK_BYTES, DEVICE.type, 5 * V * 4)
    check_low_precision(name, dtype, frozen)


@pairwise(name=FUSED, dtype=[torch.bfloat16, torch.float32], frozen=[False, True])
def test_low_precision_by_the_kernels_is_as_good_as_plain_torch(kernels_on, name, dtype, frozen, monkeypatch):
    monkeypatch.setitem(engine_batch.CHUNK_BYTES, DEVICE.type, 5 * V * 4)
    check_low_precision(name, dtype, frozen)


def check_low_precision(name, dtype, frozen):
    """Against float64, a fused head loses no more than full logits of the same dtype do."""
    objective, rows = Objective.from_config(OBJECTIVES[name], **KNOWN), batch()
    hidden, weight, bias = tensors(dtype)
    wanted = (True, not frozen, False)
    right, right_grads = expected(objective, rows, *(t.double() for t in (hidden, weight, bias)), 1.0, None, wanted)
    plain, plain_grads = expected(objective, rows, hidden, weight, bias, 1.0, None, wanted)
    leaf, head = hidden.clone().requires_grad_(), linear(weight, bias, wanted)
    found = objective.from_hidden(leaf, head, **rows)
    grads = torch.autograd.grad(found.loss, [t for t in (leaf, head.weight) if t.requires_grad])
    epsilon = torch.finfo(dtype).eps
    assert found.loss.dtype == torch.float32
    assert (found.loss - right.loss).abs() <= 2 * (plain.loss - right.loss).abs() + epsilon * right.loss.abs()
    for grad, low, exact in zip(grads, plain_grads, right_grads, strict=True):
        assert grad.dtype == dtype
        lost = (low.double() - exact).norm()
        assert (grad.double() - exact).norm() <= 1.5 * lost + epsilon * exact.norm()


@pytest.mark.parametrize("frozen", [False, True])
def test_confident_rows_keep_a_precise_gradient(frozen):
    check_confident_rows(frozen)


@pytest.mark.parametrize("frozen", [False, True])
def test_confident_rows_keep_a_precise_gradient_by_the_kernels(kernels_on, frozen):
    check_confident_rows(frozen)


def check_confident_rows(frozen):
    """Near p = 1 the gradient is a small difference of large numbers; it must not be lost in the products."""
    torch.manual_seed(0)
    weight = torch.randn(V, H)
    labels = torch.arange(V)
    hidden = 3.0 * weight / weight.norm(dim=1, keepdim=True) ** 2 * 5
    objective = Objective.from_config("cross_entropy")
    exact, found, plain = (
        hidden.to(t, copy=True).requires_grad_() for t in (torch.float64, torch.float32, torch.float32)
    )
    nn.functional.cross_entropy(exact @ weight.double().T, labels).backward()
    nn.functional.cross_entropy(plain @ weight.T, labels).backward()
    head = weight.clone().requires_grad_(not frozen)
    objective.from_hidden(found, head, labels, shift=False).loss.backward()
    error, lost = (((g.grad - exact.grad).norm(dim=1) / exact.grad.norm(dim=1)) for g in (found, plain))
    assert error.max() <= 4 * lost.max()  # one rounding more: lse comes from the largest p
    assert lost.max() < 0.1


class DroppingHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(H, V, dtype=torch.float64)

    def forward(self, hidden_states):
        return self.linear(self.dropout(hidden_states))


@pytest.mark.parametrize("name", ["cross_entropy", "mix", "generalized_dice"])
def test_a_head_that_draws_random_numbers_draws_the_same_at_every_visit(name, chunk):
    """Its gradient is that of the value it gave."""
    objective, rows = Objective.from_config(OBJECTIVES[name], **KNOWN), batch()
    hidden, _, _ = tensors()
    head = DroppingHead()
    check_slope(lambda hidden: objective.from_hidden(hidden, head, **rows).loss, hidden)


def test_the_random_state_goes_on_as_if_the_head_had_been_called():
    torch.manual_seed(0)
    Objective.from_config(OBJECTIVES["mix"]).from_hidden(tensors()[0], DroppingHead().eval(), **batch())
    after = torch.rand(())
    torch.manual_seed(0)
    DroppingHead()
    assert after == torch.rand(())


def test_autocast_runs_the_products_in_its_dtype():
    objective, rows = Objective.from_config(OBJECTIVES["mix"]), batch()
    hidden, weight, _ = (t.float().requires_grad_() for t in tensors())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        low = objective.from_hidden(hidden, weight, **rows).loss
    low.backward()
    full = objective.from_hidden(hidden.detach(), weight.detach(), **rows).loss
    exact = objective.from_hidden(hidden.detach().bfloat16(), weight.detach().bfloat16(), **rows).loss
    assert low == exact
    assert low != full
    assert weight.grad.dtype == torch.float32


def test_called_twice_backward_is_an_error():
    objective, rows = Objective.from_config("lovasz"), batch()
    hidden, weight, _ = (t.requires_grad_() for t in tensors())
    loss = objective.from_hidden(hidden, weight, **rows).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="called twice"):
        loss.backward()
    loss = objective.from_hidden(hidden, weight, **rows).loss
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_wrong_shapes_and_reference_are_refused():
    hidden, weight, _ = tensors()
    with pytest.raises(ValueError, match=r"hidden_states \(2, 19, 8\) and labels \(2, 18\) do not fit"):
        Objective.from_config("lovasz").from_hidden(hidden, weight, batch()["labels"][:, 1:])
    with pytest.raises(ValueError, match="from_logits"):
        Objective.from_config({"lovasz": 1, "reference": True}).from_hidden(hidden, weight, **batch())


@pytest.mark.parametrize("most", [1, 3, 341, 5000])
@pytest.mark.parametrize("n", [0, 1, 4, 341, 2048])
def test_chunks_are_few_and_even(n, most):
    parts = [list(range(n))[chunk] for chunk in engine_batch.chunks_of(n, most)]
    assert [i for part in parts for i in part] == list(range(n))
    assert len(parts) <= -(-n // most)
    sizes = {len(part) for part in parts}
    assert max(sizes, default=0) <= most
    assert len({len(part) for part in parts[:-1]}) <= 1
    assert max(sizes, default=0) - min(sizes, default=0) < max(1, len(parts))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_called_head_whose_last_chunk_has_no_row_of_a_ranking_term(softcap, chunk):
    """Looking at the columns of other chunks must not disturb the last one, which is still at hand."""
    objective = Objective.from_config(
        {"terms": [{"loss": "cross_entropy", "scope": "sequence"}, {"loss": "lovasz", "weight": 0.4}]}
    )
    rows, (hidden, weight, bias) = batch(trained=slice(2, 6)), tensors()
    wanted = (True, True, True)
    result, grads = expected(objective, rows, hidden, weight, bias, 1.0, softcap, wanted)
    leaf, head = hidden.clone().requires_grad_(), linear(weight, bias, wanted)
    found = objective.from_hidden(leaf, nn.Sequential(head), **rows, softcap=softcap)
    torch.testing.assert_close(found.loss, result.loss)
    for grad, right in zip(torch.autograd.grad(found.loss, [leaf, head.weight, head.bias]), grads, strict=True):
        torch.testing.assert_close(grad, right)
