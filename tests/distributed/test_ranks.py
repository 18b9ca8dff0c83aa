"""`reduce: global`: a set that two processes hold parts of, against the same rows in one process."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from axolotl_cvloss import Objective

VOCAB, WIDTH, ROWS = 11, 5, 24
GLOBAL = {"per": "batch", "reduce": "global"}
TERMS = {
    "dice": [{"loss": "dice", **GLOBAL}],
    "generalized_dice": [{"loss": "generalized_dice", **GLOBAL}],
    "lovasz": [{"loss": "lovasz", **GLOBAL}],
    "lovasz tolerance": [{"loss": "lovasz", "tolerance": 0.05, **GLOBAL}],
    "everything": [
        {"loss": "cross_entropy", "weight": 0.5},
        {"loss": "tversky", "weight": 0.3, **GLOBAL},
        {"loss": "lovasz", "weight": 0.2, **GLOBAL},
    ],
}
# Where the rows are cut in two. At 0 and at the end one process has no trained row at all.
CUTS = [12, 5, 0, ROWS]
# Without a count of rows the host averages means over processes, and only of equal parts is that the mean of all.
CASES = [(name, cut, True) for name in TERMS for cut in CUTS]
CASES += [(name, ROWS // 2, False) for name in TERMS if name != "everything"]
SOURCES = {"hidden": False, "hidden, frozen head": True, "logits": False}


def data():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    head = nn.Linear(WIDTH, VOCAB, bias=False, dtype=torch.float64)
    head.weight.data = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (ROWS,), generator=generator)
    labels[::7] = -100
    return hidden, head, labels


def gradients(name, rows, count, source):
    """The result, and the gradients of hidden states and weight, of some of the rows."""
    hidden, head, labels = data()
    head.weight.requires_grad_(not SOURCES[source])
    hidden.requires_grad_()
    objective = Objective.from_config({"terms": TERMS[name]})
    options = {"shift": False, "num_items_in_batch": count}
    if source == "logits":
        result = objective.from_logits(head(hidden[rows]), labels[rows], **options)
    else:
        result = objective.from_hidden(hidden[rows], head, labels[rows], **options)
    result.loss.backward()
    return result, hidden.grad, torch.zeros_like(head.weight) if head.weight.grad is None else head.weight.grad


def worker(rank, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {}
    trained = int((data()[2] != -100).sum())
    for name, cut, counted in CASES:
        for source in SOURCES:
            rows = slice(0, cut) if rank == 0 else slice(cut, ROWS)
            result, *grads = gradients(name, rows, trained if counted else None, source)
            sets = torch.tensor([counts.sets for counts in result.sets.values()])
            totals = [result.loss.detach(), *grads, sets]
            for total in totals:
                dist.all_reduce(total)
            found[name, cut, counted, source] = [(total if counted else total / 2).tolist() for total in totals]
    if rank == 0:
        results.put(found)
        results.close()
        results.join_thread()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=worker, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        yield results.get(timeout=240)
    finally:
        for process in processes:
            process.join(timeout=30)
            process.kill()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("name", "cut", "counted"), CASES)
def test_two_processes_give_what_one_gives(found, name, cut, counted, source):
    loss, *grads, sets = found[name, cut, counted, source]
    result, *expected = gradients(name, slice(0, ROWS), None, source)
    for grad, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(torch.tensor(grad, dtype=torch.float64), right, rtol=1e-9, atol=1e-12)
    assert loss == pytest.approx(result.loss.item(), rel=1e-12)
    assert sets == [1.0 if counted else 0.5] * len(result.sets)
