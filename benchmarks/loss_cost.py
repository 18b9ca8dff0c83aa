"""Seconds and peak memory of the losses, forward and backward to hidden states and head, against other ways.

    python benchmarks/loss_cost.py               # `make bench`
    python benchmarks/loss_cost.py --growth      # how cost grows with rows and vocabulary
    python benchmarks/loss_cost.py --list

See README.md in this folder.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from cases import CROSS_ENTROPY, DATA, Case, Settings, all_cases
from measure import Job, Record, rounds
from report import bar_chart, compare, growth_chart, machine, show, summary, write

SHAPES = {"cpu": (2048, 576, 49152, "float32"), "cuda": (8192, 4096, 128256, "bfloat16")}  # N, H, V

CASES_BETWEEN = 3  # two measurements of what they are compared with

GROWTH_CASES = [
    CROSS_ENTROPY,
    "cross_entropy",
    "0.6 cross_entropy + 0.4 generalized_dice",
    "0.6 cross_entropy + 0.4 lovasz",
]
GROWTH_HIDDEN = 64  # small, so that the largest point takes seconds: little is left of the matrix products
GROWTH_ROWS = [512, 1024, 2048, 4096, 8192, 16384]
GROWTH_ROWS_OF_VOCAB = 2048
GROWTH_VOCAB = [32768, 65536, 131072, 262144]


def main() -> None:
    args = parse()
    settings = Settings(args.rows, args.hidden, args.vocab, args.dtype, args.device, args.data, args.document_rows)
    cases = all_cases(args.device)
    if args.list:
        print("\n".join(cases))
    elif args.growth:
        growth(args, settings)
    else:
        chosen = {name: case for name, case in cases.items() if re.search(args.only, name)}
        chosen = {name: cases[name] for name in cases if name in {*chosen, *(c.base for c in chosen.values())}}
        missed = cost(args, settings, chosen)
        if missed and args.check:
            sys.exit(f"memory limits missed: {', '.join(missed)}")


def cost(args: argparse.Namespace, settings: Settings, cases: dict) -> list[str]:
    """Measure the cases, write and show them; the names of those above their memory limit."""
    print(settings)
    data = Job("data", settings).run_in_process()
    print(", ".join(f"{name} {value:.3g}" for name, value in data.items()))
    path = args.out / f"loss_cost_{args.device}"
    about = {"machine": machine(args.device), "settings": vars(settings), "data": data}
    records = records_of_before(path, about) if args.add else []
    records += rounds([Job(name, settings, args.repeats) for name in in_turn(cases)], args.rounds)
    measured = {record["case"] for record in records}
    rows = compare({name: case for name, case in all_cases(args.device).items() if name in measured}, records)
    write(path, rows, **about, records=records)
    bar_chart(path, rows, f"{_cpu_or_gpu(about['machine'])}; {settings}")
    show(rows)
    print(f"Sets are documents of {settings.document_rows} rows. Written: {path}.csv, .json and .png")
    return [row["case"] for row in rows if row["memory_reached"] is False]


def records_of_before(path: Path, about: Mapping[str, Any]) -> list[Record]:
    """What stands in the results already, of the same machine and sizes."""
    before = json.loads(path.with_suffix(".json").read_text())
    for part, names in ("machine", ("cpu", "torch threads", "gpu", "torch")), ("settings", tuple(about["settings"])):
        for name in names:
            if before[part].get(name) != about[part].get(name):
                sys.exit(f"{path}.json is of another {name}: {before[part].get(name)}, not {about[part].get(name)}")
    return before["records"]


def in_turn(cases: Mapping[str, Case]) -> Iterator[str]:
    """The names of the cases, and that of their base again and again: the speed of a machine drifts."""
    for base in dict.fromkeys(case.base for case in cases.values()):
        yield base
        names = [name for name, case in cases.items() if case.base == base and name != base]
        for number, name in enumerate(names, start=1):
            yield name
            if number % CASES_BETWEEN == 0 or number == len(names):
                yield base


def growth(args: argparse.Namespace, settings: Settings) -> None:
    """A few cases over rows and over vocabulary, each point repeated until the work is that of the largest one."""
    lines = {
        "rows": [(n, GROWTH_VOCAB[0]) for n in GROWTH_ROWS],
        "vocab": [(GROWTH_ROWS_OF_VOCAB, v) for v in GROWTH_VOCAB],
    }
    points = dict.fromkeys(point for line in lines.values() for point in line)
    work = max(n * v for n, v in points)
    jobs = []
    for n, v in points:
        shape = Settings(n, GROWTH_HIDDEN, v, args.dtype, args.device, args.data, args.document_rows)
        jobs += [Job(name, shape, work // (n * v)) for name in GROWTH_CASES]
    records = rounds(jobs, args.rounds)
    results = []
    for job in jobs:
        at = {"case": job.case, "rows": job.settings.rows, "vocab": job.settings.vocab}
        found = summary([record for record in records if all(record[key] == at[key] for key in at)])
        results.append({**at, "hidden": GROWTH_HIDDEN, "repeats": job.repeats, **found})
    path = args.out / f"growth_{args.device}"
    about = {"machine": machine(args.device), "rounds": args.rounds, "data": args.data}
    write(path, results, **about, records=records)
    title = f"{_cpu_or_gpu(about['machine'])}; hidden {GROWTH_HIDDEN}, {args.dtype}, {args.data} data"
    growth_chart(path, results, f"{title}, documents of {args.document_rows} rows", lines)
    print(f"Written: {path}.csv, .json and .png")


def _cpu_or_gpu(machine: dict) -> str:
    return machine.get("gpu") or f"{machine['cpu']}, {machine['torch threads']} threads"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SHAPES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--data", choices=list(DATA), default="trained")
    parser.add_argument("--document-rows", type=int, default=128, help="rows of a document, which is a set")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1, help="timed runs of a case in each round, after a warm-up")
    parser.add_argument("--add", action="store_true", help="to the rounds that the results hold already")
    parser.add_argument("--only", default="", help="cases whose name has a match of this regular expression")
    parser.add_argument("--check", action="store_true", help="end with code 1 where a memory limit is missed")
    parser.add_argument("--growth", action="store_true", help="instead: a few cases at many sizes")
    parser.add_argument("--list", action="store_true", help="only print the names of the cases")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    for name, value in zip(("rows", "hidden", "vocab", "dtype"), SHAPES[args.device], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    main()
