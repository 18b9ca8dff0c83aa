"""How often the host waits for a device; ``pretended`` devices tell, in a process of their own."""

import multiprocessing
import os
import traceback

import pytest
import torch
from helpers import KNOWN

from axolotl_cvloss import Objective
from axolotl_cvloss.engine import batch as engine_batch
from axolotl_cvloss.engine import sources, views

V, H, B, T, ROWS = 37, 8, 2, 24, 10  # 46 rows with a label: 5 chunks
CHUNKS = 5
OBJECTIVES = {
    "token": ({"cross_entropy": {"weight": 0.5, "label_smoothing": 0.1}, "focal": 0.5}, 1),
    "region": ({"cross_entropy": 0.5, "generalized_dice": 0.5}, 1),
    "document": ({"focal_tversky": 0.5, "topk_cross_entropy": 0.5}, 1),
    "lovasz": ({"cross_entropy": 0.5, "lovasz": 0.5}, 1 + CHUNKS),
    "number": ({"number_token_mse": 1.0, "number_token_gaussian": 1.0}, 1),
}


@pytest.fixture(scope="module")
def elsewhere():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool.apply


def asks(func, args, kwargs, elsewhere):
    """Whether an operation on a device makes the host wait: a copy that may not be late, or a size from its values."""
    name = func.name().removeprefix("aten::").split(".")[0]
    if name in ("_to_copy", "copy_"):
        late = kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))
        to, of = (kwargs.get("device") or args[0].device, args[0]) if name == "_to_copy" else (args[0].device, args[1])
        return not late and torch.device(to).type != of.device.type
    if name.startswith("index") and any(
        isinstance(x, elsewhere) and x.dtype == torch.bool
        for x in (args[1] if isinstance(args[1], list | tuple) else ())
    ):
        return True
    sized = name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "repeat_interleave")
    return isinstance(args[0], elsewhere) and (sized or name.startswith(("unique", "_unique"))) if args else False


def waits(key, source, by="PyTorch"):
    """Where the host waited in one forward and backward pass: lines of ours, with the operation. How many launches."""
    import pretended

    found = []
    os.environ[views.ENVIRONMENT] = "off" if by == "PyTorch" else "on"
    sources.LinearSource.at_once = lambda self: (ROWS, 1)
    if by == "kernels":
        pretended.known_to_the_engine()
    pretended.Launched.count = 0

    class Counted(pretended.Accelerators):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if asks(func, args, kwargs or {}, pretended.Elsewhere):
                ours = [x for x in traceback.extract_stack() if "axolotl_cvloss" in x.filename]
                found.append(f"{ours[-1].filename}:{ours[-1].lineno} {func}" if ours else str(func))
            return super().__torch_dispatch__(func, types, args, kwargs)

    engine_batch.CHUNK_BYTES_ELSEWHERE = ROWS * V * 4
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((B, T, H), (V, H)))
    labels = torch.randint(0, V, (B, T), generator=generator)
    positions = torch.cat([torch.arange(11), torch.arange(T - 11)]).expand(B, T)
    objective = Objective.from_config(key, **KNOWN)
    with Counted():
        hidden, weight, labels, positions = (x.to(pretended.FIRST) for x in (hidden, weight, labels, positions))
        given = hidden @ weight.T if source == "logits" else hidden
        given, weight = given.detach().requires_grad_(), weight.requires_grad_(source == "trained")
        del found[:]
        if source == "logits":
            result = objective.from_logits(given, labels, position_ids=positions)
        else:
            result = objective.from_hidden(given, weight, labels, position_ids=positions)
        result.loss.backward()
    return found, pretended.Launched.count


@pytest.mark.parametrize("source", ["trained", "frozen", "logits"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_host_waits_for_the_labels_and_what_lovasz_keeps_alone(elsewhere, name, source):
    key, most = OBJECTIVES[name]
    found, _ = elsewhere(waits, (key, source))
    assert len(found) <= most, "\n".join(found)
    assert found  # the labels: so waiting is seen


@pytest.mark.parametrize("source", ["trained", "frozen"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_waits_no_more_where_the_kernels_are(elsewhere, name, source):
    pytest.importorskip("triton")
    key, most = OBJECTIVES[name]
    found, launched = elsewhere(waits, (key, source, "kernels"))
    assert launched >= 2 * CHUNKS
    assert len(found) <= most, "\n".join(found)
    assert found
