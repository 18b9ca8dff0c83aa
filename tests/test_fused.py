"""Heads with the kernels behind the terms, in Triton's interpreter, against float64 in PyTorch."""

import logging
from itertools import product

import pytest
import torch
from helpers import DEVICE, KNOWN, temporary_losses

from axolotl_cvloss import Objective, register_loss
from axolotl_cvloss.engine import batch as engine_batch
from axolotl_cvloss.engine import sources, views

pytest.importorskip("triton")

N, H, V = 14, 8, 77
KEYS = {
    "token": {"cross_entropy": {"weight": 1.0, "label_smoothing": 0.1}, "focal": 0.5, "z_regularized": 0.1},
    "sets": {"generalized_dice": 0.5, "lovasz": 0.5, "focal": 0.2},
    "document": {"focal_tversky": 0.5, "cross_entropy": 0.5},
    "numbers": {"number_token_mse": 0.5, "number_token_gaussian": {"weight": 0.3, "sigma": 4.0}, "cross_entropy": 0.5},
}
KEYS |= {
    "entropy": {"confidence_penalty": {"weight": 0.5, "coefficient": 0.3}, "idft": 0.5},
    "p squared": {"brier": 0.5, "deft": 0.2, "confidence_penalty": 0.3},
    "squares and odds": {"squentropy": 0.3, "tofu": 0.5, "ldr": {"weight": 0.3, "temperature": 0.8}},
    "sets beside a constant": {"dice": 0.4, "idft": 0.6},
    "sets beside them": {
        "lovasz": 0.3,
        "squentropy": 0.3,
        "brier": 0.2,
        "asymmetric": {"weight": 0.1, "label_smoothing": 0.0},
    },
}
BOUNDS = {"plain": (1.0, None), "both": (0.5, 5.0)}


# Three chunks; on a GPU what is chosen there too: one.
@pytest.fixture(params=[6] if DEVICE.type == "cpu" else [6, None])
def kernels_on(request, monkeypatch):
    monkeypatch.setenv(views.ENVIRONMENT, "on")
    if request.param:
        monkeypatch.setattr(sources.LinearSource, "at_once", lambda self: (request.param, 1))


def inputs(dtype, bias=False, trained=True):
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(1, N, H, generator=generator)).to(dtype).requires_grad_()
    head = torch.nn.Linear(H, V, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    head.requires_grad_(trained)
    labels = torch.randint(0, 9, (1, N), generator=generator)
    labels[0, 3] = -100
    return hidden, head, labels, {"position_ids": torch.tensor([[*range(6), *range(8)]])}


def evaluate(key, given, dtype, scale, softcap, diagnose=True):
    hidden, head, labels, more = given
    hidden = hidden.detach().to(dtype).requires_grad_()
    copy = torch.nn.Linear(H, V, bias=head.bias is not None, dtype=dtype)
    copy.load_state_dict(head.state_dict())
    copy.requires_grad_(head.weight.requires_grad)
    objective = Objective.from_config(key, **KNOWN, diagnose=diagnose)
    result = objective.from_hidden(hidden, copy, labels, scale=scale, softcap=softcap, **more)
    leaves = [hidden, *(parameter for parameter in copy.parameters() if parameter.requires_grad)]
    return result, torch.autograd.grad(result.loss, leaves)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize(("key", "bound"), product(KEYS, BOUNDS))
def test_float32_keeps_its_digits(kernels_on, monkeypatch, key, bound, trained):
    given = inputs(torch.float32, bias=True, trained=trained)
    found, gradients = evaluate(KEYS[key], given, torch.float32, *BOUNDS[bound])
    monkeypatch.setenv(views.ENVIRONMENT, "off")
    exact, exact_gradients = evaluate(KEYS[key], given, torch.float64, *BOUNDS[bound])
    eps = torch.finfo(torch.float32).eps
    # Logits of about 8 are known to some epsilons of their size, and so is log p; sums of 14 rows.
    bound = 128 * eps
    assert abs(found.loss - exact.loss) <= bound * (1 + exact.loss.abs())
    assert abs(found.nll - exact.nll) <= bound * exact.nll
    for name in ("entropy", "accuracy"):
        assert abs(found.diagnostics[name] - exact.diagnostics[name]) <= bound
    for gradient, other in zip(gradients, exact_gradients, strict=True):
        assert (gradient - other).abs().max() <= bound * other.abs().max()


@pytest.mark.parametrize("key", KEYS)
def test_bf16_loses_no_more_than_in_pytorch(kernels_on, monkeypatch, key):
    given = inputs(torch.bfloat16)
    _, gradients = evaluate(KEYS[key], given, torch.bfloat16, 1.0, None)
    monkeypatch.setenv(views.ENVIRONMENT, "off")
    _, plain = evaluate(KEYS[key], given, torch.bfloat16, 1.0, None)
    _, exact = evaluate(KEYS[key], given, torch.float64, 1.0, None)
    for gradient, other, right in zip(gradients, plain, exact, strict=True):
        assert gradient.dtype == other.dtype == torch.bfloat16
        lost = (other - right).abs().max() + torch.finfo(torch.bfloat16).eps * right.abs().max()
        assert (gradient - right).abs().max() <= 3 * lost


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_follows_scales_the_gradient(kernels_on, dtype):
    given = inputs(dtype, bias=True)
    gradients = []
    for scale in (1.0, 0.25, 0.0):
        hidden, head, labels, more = given
        leaves = [hidden, *head.parameters()]
        loss = Objective.from_config(KEYS["sets"]).from_hidden(hidden, head, labels, **more).loss
        gradients.append(torch.autograd.grad(loss * scale, leaves))
    for one, quarter, nothing in zip(*gradients, strict=True):
        assert torch.equal(quarter, one / 4)
        assert not nothing.any()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="auto are the kernels there")
@pytest.mark.parametrize(("key", "trained"), [(key, i % 2 == 0) for i, key in enumerate(KEYS)])
def test_off_a_gpu_the_bits_are_those_without_the_kernels(monkeypatch, key, trained):
    """By default, at every run, and after a run with the kernels."""
    found = []
    for wish in ("off", "off", "auto", "on", "off", "auto"):
        monkeypatch.setenv(views.ENVIRONMENT, wish)
        result, gradients = evaluate(KEYS[key], inputs(torch.float32, trained=trained), torch.float32, 1.0, None)
        if wish != "on":
            found.append([result.loss, result.nll, *result.terms.values(), *result.diagnostics.values(), *gradients])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("wish", ["off", "on"])
def test_the_value_of_a_term_is_the_same_to_the_bit_whatever_stands_beside_it(monkeypatch, wish):
    monkeypatch.setenv(views.ENVIRONMENT, wish)
    beside = {name: parameters for key in KEYS.values() for name, parameters in key.items()}
    given = inputs(torch.float32)
    together, _ = evaluate(beside, given, torch.float32, 1.0, None, diagnose=False)
    assert len(together.terms) == len(beside) >= 8
    for name, parameters in beside.items():
        alone, _ = evaluate({name: parameters}, given, torch.float32, 1.0, None, diagnose=False)
        assert torch.equal(alone.terms[name], together.terms[name]), name
        assert torch.equal(alone.nll, together.nll)


@pytest.mark.parametrize(
    ("wish", "key", "dtype", "reason"),
    [
        ("on", "focal", torch.float32, ""),
        ("auto", "focal", torch.float32, "" if DEVICE.type == "cuda" else f"no CUDA device ({DEVICE.type})"),
        ("off", "focal", torch.float32, "CVLOSS_KERNELS=off"),
        ("on", "focal", torch.float16, "products in float16"),
        ("on", "focal", torch.float64, "products in float64"),
        ("on", "sparsemax", torch.float32, "sparsemax needs sparse_max"),
        ("on", "gem", torch.float32, "gem needs tempered_lead"),
        ("on", {"cross_entropy": {"label_smoothing": 0.1}}, torch.float32, ""),
        *(("on", KEYS[key], torch.float32, "") for key in KEYS if key != "numbers"),
        ("on", "sed", torch.float32, "sed needs top_mass"),
        ("on", "entropy_adaptive", torch.float32, "entropy_adaptive needs top_entropy"),
        ("on", "spherical_z", torch.float32, "spherical_z needs height"),
        ("on", "asymmetric", torch.float32, "asymmetric needs other_powers"),
        ("on", "aldr", torch.float32, "aldr needs own_tempered_odds"),
        ("on", {"ldr": 0.5, "tofu": 0.5}, torch.float32, "odds at several temperatures"),
    ],
)
def test_the_log_says_once_which_path_runs_and_why(monkeypatch, caplog, wish, key, dtype, reason):
    monkeypatch.setenv(views.ENVIRONMENT, wish)
    views._say.cache_clear()
    caplog.set_level(logging.INFO)
    for _ in range(2):
        evaluate(key, inputs(dtype), dtype, 1.0, None, diagnose=False)
    (said,) = [record.message for record in caplog.records if "logits are computed" in record.message]
    assert said.endswith(reason) if reason else said == "cv_loss: logits are computed by Triton kernels"


def test_a_family_that_the_kernels_do_not_serve(monkeypatch, caplog):
    monkeypatch.setenv(views.ENVIRONMENT, "on")
    views._say.cache_clear()
    caplog.set_level(logging.INFO)
    with temporary_losses():
        register_loss("mine", family="row")(lambda logits, labels: logits.square().mean(1))
        evaluate("mine", inputs(torch.float32), torch.float32, 1.0, None)
    assert "PyTorch: mine needs all logits" in caplog.text


def test_a_statistic_that_the_kernels_have_not(monkeypatch, caplog):
    monkeypatch.setattr(views, "COLLECTED", ())
    monkeypatch.setenv(views.ENVIRONMENT, "on")
    views._say.cache_clear()
    caplog.set_level(logging.INFO)
    evaluate({"cross_entropy": {"label_smoothing": 0.1}}, inputs(torch.float32), torch.float32, 1.0, None)
    assert "PyTorch: cross_entropy needs mean_logp" in caplog.text


def test_logits_that_were_given_and_heads_that_are_called_stay_with_pytorch(monkeypatch, caplog):
    monkeypatch.setenv(views.ENVIRONMENT, "on")
    views._say.cache_clear()
    caplog.set_level(logging.INFO)
    hidden, head, labels, _ = inputs(torch.float32)
    objective = Objective.from_config("focal")
    objective.from_logits(head(hidden), labels)
    objective.from_hidden(hidden, torch.nn.Sequential(head), labels)
    said = [record.message for record in caplog.records if "logits are computed" in record.message]
    assert [line.rsplit(": ")[-1] for line in said] == ["logits that were given", "a head that is called"]


def test_a_wish_that_is_none(monkeypatch):
    monkeypatch.setenv(views.ENVIRONMENT, "yes")
    with pytest.raises(ValueError, match="CVLOSS_KERNELS='yes': allowed are auto, on and off"):
        Objective.from_config("focal").from_logits(torch.zeros(1, 3, 5), torch.zeros(1, 3, dtype=torch.long))


def test_no_rows(kernels_on):
    hidden, head, labels, _ = inputs(torch.float32)
    result = Objective.from_config("focal").from_hidden(hidden, head, torch.full_like(labels, -100))
    result.loss.backward()
    assert (head.weight.grad == 0).all()


def test_chunks_of_rows_in_multiples():
    assert [s.stop - s.start for s in engine_batch.chunks_of(1000, 256, 128)] == [256, 256, 256, 232]
    assert [s.stop - s.start for s in engine_batch.chunks_of(600, 512, 128)] == [384, 216]
    assert [s.stop - s.start for s in engine_batch.chunks_of(600, 1024, 128)] == [600]
