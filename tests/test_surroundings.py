"""What an objective meets around it: other processes, counts, strides, hooks, autocast, random states, devices."""

import copy
import pickle

import pytest
import torch
from helpers import KNOWN, check_slope
from torch import nn
from torch.utils.checkpoint import checkpoint

from axolotl_cvloss import Objective

V, H, B, T = 37, 8, 2, 19

# One objective of every way through the engine.
OBJECTIVES = {
    "one visit": "cross_entropy",
    "two visits": {"cross_entropy": 0.6, "lovasz": 0.3, "dice": 0.1},
    "gradients of logits": {"squentropy": 0.6, "dice": 0.4},
    "columns": {"number_token_mse": 0.3, "cross_entropy": 0.7},
}
SOURCES = ("logits", "read", "called")


@pytest.fixture(params=OBJECTIVES)
def objective(request):
    return Objective.from_config(OBJECTIVES[request.param], **KNOWN)


def loss_of(objective, source, hidden, weight, **more):
    """The objective of the same logits, which come from one of the sources."""
    if source == "logits":
        return objective.from_logits(hidden @ weight.T, **batch(), **more).loss
    return objective.from_hidden(hidden, weight if source == "read" else Called(weight), **batch(), **more).loss


class Called(nn.Module):
    """A head that must be called, with something that it draws at random."""

    def __init__(self, weight, p=0.0):
        super().__init__()
        self.weight, self.p = nn.Parameter(weight) if not isinstance(weight, nn.Parameter) else weight, p
        self.dtypes = []

    def forward(self, hidden_states):
        logits = nn.functional.dropout(hidden_states, self.p) @ self.weight.T
        self.dtypes.append(logits.dtype)
        return logits


def batch():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[:, :5] = -100
    return {"labels": labels, "input_ids": labels.clamp_min(3), "position_ids": torch.arange(T).expand(B, T)}


def tensors(dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in ((B, T, H), (V, H))]


def test_an_objective_goes_to_other_processes():
    """With a schedule, and with what it has learnt of a tokenizer and a training set."""
    terms = [
        {"loss": "focal", "gamma": {"from": 1.0, "to": 3.0}, "goldfish": {"k": 3, "h": 3}},
        {"loss": "ldam"},
        {"loss": "number_token_mse"},
        {"loss": "lovasz", "scope": "sequence"},
    ]
    objective = Objective.from_config({"terms": terms}, **KNOWN)
    logits = tensors()[0] @ tensors()[1].T
    for other in pickle.loads(pickle.dumps(objective)), copy.deepcopy(objective):
        values = [o.from_logits(logits, **batch(), progress=0.5).loss for o in (objective, other)]
        assert torch.equal(*values)
        assert str(other) == str(objective)


def test_a_count_is_one_number_in_any_shape():
    """Trainer's is (1,) in some releases."""
    objective, (hidden, weight) = Objective.from_config({"cross_entropy": 0.6, "lovasz": 0.4}), tensors()
    expected = objective.from_hidden(hidden, weight, **batch(), num_items_in_batch=50).loss
    for count in torch.tensor([50]), torch.tensor([[50.0]]), {"completion": torch.tensor([50])}:
        found = objective.from_hidden(hidden, weight, **batch(), num_items_in_batch=count).loss
        assert found.shape == ()
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match=r"num_items_in_batch: one number is expected, not a tensor of shape \(2,\)"):
        objective.from_hidden(hidden, weight, **batch(), num_items_in_batch=torch.tensor([5, 6]))


@pytest.mark.parametrize("source", SOURCES)
def test_strides_do_not_matter(objective, source):
    """Some models hand (T, B, H) on, turned around."""
    hidden, weight = tensors()
    weight = nn.Parameter(weight)
    leaf = hidden.clone().requires_grad_()
    expected = loss_of(objective, source, leaf, weight)
    right = torch.autograd.grad(expected, [leaf, weight])
    turned = hidden.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    found = loss_of(objective, source, turned, weight)
    assert not turned.is_contiguous()
    torch.testing.assert_close(found, expected)
    for grad, other in zip(torch.autograd.grad(found, [turned, weight]), right, strict=True):
        torch.testing.assert_close(grad, other)


def test_logits_of_any_strides(objective):
    logits = tensors()[0] @ tensors()[1].T
    expected = torch.autograd.grad(objective.from_logits(logits.requires_grad_(), **batch()).loss, logits)[0]
    for order in (2, 0, 1), (1, 0, 2), (2, 1, 0):
        back = [order.index(i) for i in range(3)]
        turned = logits.detach().permute(order).contiguous().permute(back).requires_grad_()
        assert not turned.is_contiguous()
        grad = torch.autograd.grad(objective.from_logits(turned, **batch()).loss, turned)[0]
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("source", SOURCES)
def test_the_callers_hooks_for_saved_tensors_see_none_of_ours(objective, source):
    """As under a checkpoint around the whole forward: our graphs are unpacked in the forward already."""
    hidden, weight = (t.requires_grad_() for t in tensors())
    head = nn.Parameter(weight.detach())
    expected = torch.autograd.grad(loss_of(objective, source, hidden, head), [hidden, head])
    calls = []

    def forward(hidden):
        calls.append(1)
        return loss_of(objective, source, hidden * 1.0, head)

    found = torch.autograd.grad(checkpoint(forward, hidden, use_reentrant=False), [hidden, head])
    for grad, right in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, right)
    assert len(calls) <= 2


@pytest.mark.parametrize("count", [30_000, 400_000])
@pytest.mark.parametrize("source", SOURCES)
def test_a_scaled_loss_keeps_its_digits_in_float16(objective, source, count):
    """A row of a step of so many has a gradient below what float16 can hold; the scale comes only in the backward."""
    scale = 2.0**16
    low = [t.to(torch.float16) for t in tensors()]
    exact = [nn.Parameter(t.double()) for t in low]
    right = torch.autograd.grad(loss_of(objective, source, *exact, num_items_in_batch=count), exact)
    found = [nn.Parameter(t) for t in low]
    (scale * loss_of(objective, source, *found, num_items_in_batch=count)).backward()
    # The same by torch: the logits are rounded, then their gradient, then the products.
    plain = [nn.Parameter(t) for t in low]
    logits = plain[0] @ plain[1].T
    (scale * objective.from_logits(logits.float(), **batch(), num_items_in_batch=count).loss).backward()
    for grad, torchs, expected in zip(found, plain, right, strict=True):
        assert grad.grad.dtype == torch.float16
        error, lost = ((t.grad.double() / scale - expected).norm() for t in (grad, torchs))
        assert error <= 1.5 * lost + torch.finfo(torch.float16).eps * expected.norm()


@pytest.mark.parametrize("enabled", [True, False])
def test_a_head_that_is_called_runs_in_the_callers_autocast(objective, enabled):
    hidden, weight = (t.float() for t in tensors())
    head = Called(weight)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        loss = objective.from_hidden(hidden.bfloat16() if enabled else hidden, head, **batch()).loss
    assert set(head.dtypes) == {torch.bfloat16 if enabled else torch.float32}
    loss.backward()
    assert head.weight.grad.dtype == torch.float32
    exact = nn.Parameter(weight.bfloat16() if enabled else weight)
    objective.from_hidden(hidden.to(exact.dtype), exact, **batch()).loss.backward()
    eps = torch.finfo(exact.dtype).eps
    assert (head.weight.grad - exact.grad.float()).norm() <= 2 * eps * exact.grad.float().norm()


def test_a_head_that_is_called_leaves_other_random_states_alone(objective, monkeypatch):
    """torch.manual_seed and a fork of all devices reach every accelerator of the machine, one by one."""

    def fail(*args, **kwargs):
        raise AssertionError("a device that has no part in it")

    monkeypatch.setattr(torch, "manual_seed", fail)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", fail)
    hidden, weight = tensors()
    assert objective.from_hidden(hidden, Called(weight, p=0.5), **batch()).loss.isfinite()


def test_anything_that_a_head_draws_is_drawn_again(objective, monkeypatch):
    """Not only a module named Dropout."""
    hidden, weight = tensors()
    head = Called(weight, p=0.5)
    check_slope(lambda hidden: objective.from_hidden(hidden, head, **batch()).loss, hidden)
