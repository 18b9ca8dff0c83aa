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
    "unified_focal": [{"loss": "unified_focal", **GLOBAL}],
    "topk_cross_entropy": [{"loss": "topk_cross_entropy", **GLOBAL}],
    "direct_coverage": [{"loss": "direct_coverage", **GLOBAL}],
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
CASES = [(name, cut, True, 1) for name in TERMS for cut in CUTS]
CASES += [(name, ROWS // 2, False, 1) for name in TERMS if name != "everything"]
# Two micro-batches, each cut in two: a set is one micro-batch of both processes.
CASES += [(name, 9, True, 2) for name in TERMS]
MICRO_BATCHES = {1: [(0, ROWS)], 2: [(0, 13), (13, ROWS)]}
SOURCES = {"hidden": False, "hidden, frozen head": True, "logits": False}


def data():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    head = nn.Linear(WIDTH, VOCAB, bias=False, dtype=torch.float64)
    head.weight.data = torch.randn(VOCAB, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (ROWS,), generator=generator)
    labels[::7] = -100
    return hidden, head, labels


def gradients(name, micro_batches, count, source):
    """Loss and number of sets of each term, and the gradients of hidden states and weight, of accumulated rows."""
    hidden, head, labels = data()
    head.weight.requires_grad_(not SOURCES[source])
    hidden.requires_grad_()
    objective = Objective.from_config({"terms": TERMS[name]})
    options = {"shift": False, "num_items_in_batch": count}
    loss, sets = 0.0, 0
    for start, stop in micro_batches:
        rows = slice(start, stop)
        if source == "logits":
            result = objective.from_logits(head(hidden[rows]), labels[rows], **options)
        else:
            result = objective.from_hidden(hidden[rows], head, labels[rows], **options)
        result.loss.backward()
        loss, sets = loss + result.loss.detach(), sets + torch.tensor([s.sets for s in result.sets.values()])
    weight = torch.zeros_like(head.weight) if head.weight.grad is None else head.weight.grad
    return loss, sets, hidden.grad, weight


def trained_rows():
    return int((data()[2] != -100).sum())


def worker(rank, port, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {}
    for name, cut, counted, accumulation in CASES:
        mine = []
        for start, stop in MICRO_BATCHES[accumulation]:
            middle = start + round(cut / ROWS * (stop - start))
            mine.append((start, middle) if rank == 0 else (middle, stop))
        for source in SOURCES:
            totals = gradients(name, mine, trained_rows() if counted else None, source)
            for total in totals:
                dist.all_reduce(total)
            key = name, cut, counted, accumulation, source
            found[key] = [(total if counted else total / 2).tolist() for total in totals]
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
@pytest.mark.parametrize(("name", "cut", "counted", "accumulation"), CASES)
def test_two_processes_give_what_one_gives(found, name, cut, counted, accumulation, source):
    loss, sets, *grads = found[name, cut, counted, accumulation, source]
    whole, sets_of_one, *expected = gradients(name, MICRO_BATCHES[accumulation], trained_rows(), source)
    for grad, right in zip(grads, expected, strict=True):
        torch.testing.assert_close(torch.tensor(grad, dtype=torch.float64), right, rtol=1e-9, atol=1e-12)
    assert loss == pytest.approx(whole.item(), rel=1e-12)
    assert sets == [accumulation if counted else 0.5] * len(sets_of_one)
