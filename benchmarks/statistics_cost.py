"""What the losses that look at all logits of a row cost beside cross_entropy, on one thread of a CPU.

    python benchmarks/statistics_cost.py --rounds 7

Seconds are those of the processor, not of the clock, and the losses take turns in one process, so that other programs
disturb little. A ratio is to cross_entropy in the same round. Writes results/statistics_cost_cpu.csv and .json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from cases import Data, Settings, make_data
from report import machine, write

from axolotl_cvloss import Objective, available_losses
from axolotl_cvloss.engine.statistics import STATISTICS

BASE = "cross_entropy"
FREE = {"mean_logp", "mean_logit", "vocab_size", "possible", "target_logit"}  # no pass of their own, or not by default


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(args.rows, 576, 49152, "float32", "cpu", "trained", 128)
    print(settings)
    data = make_data(settings)
    objectives = {name: Objective.from_config(name) for name in (BASE, *of_all_logits())}
    seconds: dict[str, list[float]] = {name: [] for name in objectives}
    step(objectives[BASE], data)  # warms up
    for number in range(1, args.rounds + 1):
        for name, objective in objectives.items():
            seconds[name].append(step(objective, data))
            print(f"round {number} of {args.rounds}  {seconds[name][-1]:8.3f} s  {name}", flush=True)
    rows = [row(name, seconds) for name in seconds]
    path = args.out / "statistics_cost_cpu"
    write(path, rows, machine=machine("cpu"), settings=vars(settings), rounds=args.rounds, seconds=seconds)
    for line in rows:
        print(f"{line['loss']:24} {line['ratio']:.3f}   {line['ratio_min']:.2f} to {line['ratio_max']:.2f}")
    print(f"Written: {path}.csv and .json")


def of_all_logits() -> list[str]:
    return [
        name
        for name, loss in available_losses().items()
        if loss.built_in and not loss.needs_more and set(loss.statistics) & (STATISTICS.keys() - FREE)
    ]


def step(objective: Objective, data: Data) -> float:
    """Processor's seconds of a forward and a backward to hidden states and head."""
    for tensor in data.inputs():
        tensor.grad = None
    start = time.process_time()
    result = objective.from_hidden(data.hidden, data.weight, data.labels, shift=False, position_ids=data.position_ids)
    result.loss.backward()
    return time.process_time() - start


def row(name: str, seconds: dict[str, list[float]]) -> dict[str, str | float]:
    ratios = [ours / base for ours, base in zip(seconds[name], seconds[BASE], strict=True)]
    found = {"seconds": statistics.median(seconds[name]), "ratio": statistics.median(ratios)}
    return {"loss": name, **found, "ratio_min": min(ratios), "ratio_max": max(ratios)}


if __name__ == "__main__":
    main()
