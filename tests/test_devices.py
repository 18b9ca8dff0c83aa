"""Models on other devices than the CPU and on several at once; see ``pretended``, which needs a process of its own."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import KNOWN
from torch import nn

from axolotl_cvloss import Objective

V, H, B, T = 37, 8, 2, 19
ROUNDING = 4 * torch.finfo(torch.float32).eps  # of numbers up to 1, in the same arithmetic; buffers begin elsewhere
LOVASZ = {"terms": [{"loss": "cross_entropy", "weight": 0.6, "scope": "sequence"}, {"loss": "lovasz", "weight": 0.4}]}
MIX = {
    "terms": [
        {"loss": "cross_entropy", "weight": 0.5, "scope": "sequence", "goldfish": {"k": 3, "h": 3}},
        {"loss": "ldam", "weight": 0.1},
        {"loss": "number_token_mse", "weight": 0.1},
        {"loss": "squentropy", "weight": 0.1, "where": "acts"},
        {"loss": "lovasz", "weight": 0.1},
        {"loss": "generalized_dice", "weight": 0.1},
    ]
}


@pytest.fixture(scope="module")
def elsewhere():
    """Runs a function of this module where there are two accelerators."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool.apply


def inputs():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[:, :5] = -100
    return {
        "labels": labels,
        "position_ids": torch.cat([torch.arange(11), torch.arange(T - 11)]).expand(B, T),
        "attention_mask": (torch.arange(T) < T - 2).long().expand(B, T),
        "input_ids": labels.clamp_min(3),
        "example_weights": torch.rand(B, T, generator=generator),
        "columns": {"acts": torch.randint(0, 2, (B, T), generator=generator)},
        "num_items_in_batch": torch.tensor([50]),
    }


def tensors():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) for shape in ((B, T, H), (V, H))]


def loss_and_gradients(hidden, weight, source):
    """All inputs are where the hidden states are."""
    given = {name: value.to(hidden.device) for name, value in inputs().items() if name != "columns"}
    given["columns"] = {name: value.to(hidden.device) for name, value in inputs()["columns"].items()}
    objective = Objective.from_config(MIX, **KNOWN)
    if source == "logits":
        loss = objective.from_logits(hidden.to(weight.device) @ weight.T, **given).loss
    else:
        head = nn.Linear(H, V, bias=False)
        head.weight = weight
        loss = objective.from_hidden(hidden, head if source == "read" else nn.Sequential(head), **given).loss
    return [loss, *torch.autograd.grad(loss, [hidden, weight])]


def spread(source, *places):
    """Hidden states and head in two places: where loss and gradients are, and how far from those on one CPU."""
    import pretended

    hidden, weight = tensors()
    expected = loss_and_gradients(hidden.requires_grad_(), nn.Parameter(weight), source)
    with pretended.Accelerators():
        hidden, weight = (t.detach().to(place) for t, place in zip((hidden, weight), places, strict=True))
        found = loss_and_gradients(hidden.requires_grad_(), nn.Parameter(weight), source)
        far = [float((t.detach().cpu() - e).abs().max()) for t, e in zip(found, expected, strict=True)]
        return [str(t.device) for t in found], far


@pytest.mark.parametrize("places", [("cpu", "pretended:0"), ("pretended:0", "cpu")])
@pytest.mark.parametrize("source", ["logits", "read", "called"])
def test_a_head_on_another_device_than_the_rest(elsewhere, source, places):
    devices, far = elsewhere(spread, (source, *places))
    assert devices == [places[1], *places]
    assert max(far) <= ROUNDING


def dispatched(head):
    """A step of a model whose head accelerate has put elsewhere: the loss's device, and how far from all on the CPU."""
    import pretended
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from transformers import LlamaConfig, LlamaForCausalLM

    from axolotl_cvloss import install

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model, found = LlamaForCausalLM(config).train(), []
    batch = {name: inputs()[name] for name in ("input_ids", "labels", "num_items_in_batch")} | inputs()["columns"]
    for device in "cpu", pretended.FIRST:
        with pretended.Accelerators():
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().to(device))
            add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device=device))
            model.zero_grad()
            install(model, Objective.from_config({**LOVASZ, "head": head}))
            loss = model(**batch).loss
            loss.backward()
            found.append([loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters())])
    return str(loss.device), max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("head", ["fused", "logits"])
def test_a_model_that_accelerate_has_dispatched(elsewhere, head):
    """Trainer wants the loss where the inputs are."""
    device, far = elsewhere(dispatched, (head,))
    assert device == "cpu"
    assert far <= ROUNDING


def drawn():
    """What a head that draws random numbers, on the first device, does to the random states of all."""
    import pretended

    with pretended.Accelerators():
        hidden, weight = (t.to(pretended.FIRST).requires_grad_() for t in tensors())
        head = nn.Sequential(nn.Dropout(0.5), nn.Linear(H, V, bias=False))
        head[1].weight = nn.Parameter(weight.detach())
        pretended.MODULE.__init__()
        Objective.from_config({"cross_entropy": 0.5, "dice": 0.5}).from_hidden(
            hidden, head, inputs()["labels"]
        ).loss.backward()
        return pretended.MODULE.states, pretended.MODULE.seeded


def test_a_head_that_draws_touches_the_random_state_of_its_own_device_alone(elsewhere):
    states, seeded = elsewhere(drawn)
    assert states["pretended:0"] > 0
    assert states["pretended:1"] == 0
    assert seeded == 0


def without_float64(folder):
    """Of losses that once had float64 on the device, and of a trainer's log: on the CPU, and where there is none."""
    import pretended
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from axolotl_cvloss import install
    from axolotl_cvloss.hosts.transformers import attach

    config = LlamaConfig(vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    objective = Objective.from_config({"cross_entropy": 0.5, "ldam": 0.3, "number_token_mse": 0.2}, **KNOWN)
    trainer = Trainer(
        model=install(LlamaForCausalLM(config), objective), args=TrainingArguments(folder, report_to=[], use_cpu=True)
    )
    attach(trainer)
    logs = []
    for device in "cpu", pretended.FIRST:
        with pretended.Accelerators(float64=False):
            hidden, weight = (t.to(device) for t in tensors())
            trainer._cv_record(objective.from_hidden(hidden, weight, **inputs()))
            logs.append(trainer._cv_flush(training=True))
    return logs


def test_devices_without_float64(elsewhere, tmp_path):
    """As Apple's."""
    cpu, other = elsewhere(without_float64, (str(tmp_path),))
    assert other == cpu
    assert {"cv_loss/cross_entropy", "cv_loss/ldam", "cv_loss/number_token_mse", "cv_loss/nll"} <= cpu.keys()


def run_on(device, *arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *arguments]
    environment = {**os.environ, "TEST_DEVICE": device, "TRITON_INTERPRET": "1"}
    return subprocess.run(
        command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )


def test_the_tests_of_the_engine_run_elsewhere():
    """As `make test-gpu` runs them all; few of them here, which between them take each path."""
    few = "(digits and sets and plain and 6) or (naive_version and lovasz and packed and not mask)"
    done = run_on("pretended", "test_fused.py", "laws/test_definition.py", "-k", few, "-m", "not slow")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_where_there_is_no_gpu_the_tests_for_it_say_so():
    done = run_on("cuda", "test_kernels.py")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "TEST_DEVICE=cuda: no CUDA device" in done.stderr
