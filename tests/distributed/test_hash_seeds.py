"""Processes that order Python's sets in different ways still come to the same collectives."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from axolotl_cvloss import Objective

VOCAB = 11
SCOPES = ["completion", "sequence"]
TERMS = [{"loss": "dice", "scope": scope, "per": "batch", "reduce": "global"} for scope in SCOPES]
# The order that a set of the two has in a process; it takes one of two, by the seed of the hashes.
ORDER = f"print(list({{(scope, 'global') for scope in {SCOPES}}}))"


def loss(rows):
    """The loss of some lines of a batch; prompt and answer have not the same classes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (2, 9), generator=generator)
    logits = torch.randn(2, 9, VOCAB, generator=generator, dtype=torch.float64)
    labels = ids.masked_fill(torch.arange(9) < 5, -100)
    counts = dict.fromkeys(SCOPES, 1)
    objective = Objective.from_config({"terms": TERMS})
    return objective.from_logits(logits[rows], labels[rows], input_ids=ids[rows], num_items_in_batch=counts).loss.item()


def main(rank, port):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    print(loss(slice(rank, rank + 1)))
    torch.distributed.destroy_process_group()


def start(seed, *command):
    env = {**os.environ, "PYTHONHASHSEED": str(seed)}
    return subprocess.Popen([sys.executable, *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_two_seeds_of_hashes():
    orders = {}
    for seed in range(1, 9):
        orders.setdefault(start(seed, "-c", ORDER).communicate(timeout=60)[0], seed)
    seeds = list(orders.values())
    assert len(seeds) == 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [start(seed, Path(__file__), str(rank), port) for rank, seed in enumerate(seeds)]
    try:
        found = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], found
    # Each process reports its share of the value.
    assert sum(float(out.split()[-1]) for out, _ in found) == pytest.approx(loss(slice(None)), rel=1e-12)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
