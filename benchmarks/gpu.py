"""Seconds and memory of a head and its loss on a GPU; needs PyTorch, Triton and transformers only. See --help.

Each case runs in a process of its own, in which the ways to compute it take turns; medians are over the rounds. Peak
memory is above the inputs. Peers that are not installed are left out.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from axolotl_cvloss import Objective

# H, V of the head of Llama-3-8B and of Qwen3-0.6B
HEADS = {"llama": (4096, 128256), "qwen": (1024, 151936), "smoke": (16, 301)}
MIXES = {
    "token": {"focal": 1.0},
    "region": {"cross_entropy": 0.5, "generalized_dice": 0.5},
    "lovasz": {"cross_entropy": 0.6, "lovasz": 0.4},
}


def ways(mix):
    """Functions of hidden states (N, H), a weight and labels that return a loss, by name."""
    objective = Objective.from_config(MIXES[mix])

    def ours(hidden, weight, labels):
        return objective.from_hidden(hidden, weight, labels, shift=False).loss

    def full(hidden, weight, labels):
        return F.cross_entropy((hidden @ weight.T).float(), labels)

    found = {"ours": ours, "full-logits cross_entropy": full}
    if hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = lambda hidden, weight, labels: F.linear_cross_entropy(hidden, weight, labels)
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger
    except ImportError:
        return found
    return found | {"Liger": lambda hidden, weight, labels: liger(hidden, weight, labels)}


def products(hidden, weight, labels):
    """The matrix products of a trained head and nothing else, with their rounding: the floor."""
    logits = hidden @ weight.T
    return logits @ weight, (logits.T @ hidden if weight.requires_grad else None)


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def measured(function, given, device):
    """Seconds and bytes above the inputs of one call with its backward pass."""
    for leaf in given[:2]:
        leaf.grad = None
    synchronize(device)
    before = 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    value = function(*given)
    if isinstance(value, torch.Tensor):
        value.backward()
    del value
    synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated() - before if device == "cuda" else 0


def waits(function, given):
    """How often a call makes the host wait for the GPU, as PyTorch warns of it."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function(*given).backward()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in found)


def case(head, mix, trained, rows, rounds, device):
    """The lines of one case."""
    generator = torch.Generator(device).manual_seed(0)
    width, vocab = HEADS[head]
    dtype = torch.bfloat16
    hidden = torch.randn(rows, width, generator=generator, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, width, generator=generator, device=device) / width**0.5).to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=generator, device=device)
    given = hidden, weight.requires_grad_(trained), labels
    functions = ways(mix) | {"products": lambda *given: torch.no_grad()(products)(*given)}
    found = {name: [] for name in functions}
    failed = {}
    for turn in range(rounds + 2):  # two to compile and to warm up
        for name, function in functions.items():
            if name in failed:
                continue
            try:
                figures = measured(function, given, device)
            except Exception as error:  # a peer that cannot; the others go on
                if name == "ours":
                    raise
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            if turn >= 2:
                found[name].append(figures)
    card = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    for name, figures in found.items():
        yield {
            "card": card,
            "torch": torch.__version__,
            "kernels": os.environ.get("CVLOSS_KERNELS", "auto"),
            "head": head,
            "mix": mix,
            "trained": trained,
            "rows": rows,
            "way": name,
            "ms": "" if name in failed else round(1e3 * statistics.median(x[0] for x in figures), 3),
            "peak_mib": "" if name in failed else round(max(x[1] for x in figures) / 2**20, 1),
            "waits": waits(functions[name], given) if device == "cuda" and name == "ours" else "",
            "failed": failed.get(name, ""),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.csv"))
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="a tiny case on whatever device there is")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.case:
        print(json.dumps(list(case(*json.loads(options.case), device))))
        return
    if device == "cpu" and not options.smoke:
        raise SystemExit("benchmarks/gpu.py: no CUDA device; --smoke runs a tiny case on a CPU")
    rows, rounds = (32, 1) if options.smoke else (options.rows, options.rounds)
    lines = []
    cases = list(product(["llama", "qwen"], MIXES, (True, False)))
    for head, mix, trained in [("smoke", "lovasz", True)] if options.smoke else cases:
        command = [sys.executable, __file__, "--case", json.dumps([head, mix, trained, rows, rounds])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        lines += found
        for x in found:
            figures = x["failed"] or f"{x['ms']} ms, {x['peak_mib']} MiB"
            print(f"{head} {mix} {'trained' if trained else 'frozen'}, {x['way']}: {figures}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows(lines)


if __name__ == "__main__":
    main()
