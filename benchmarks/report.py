"""Machine and versions, medians and ratios, and what is written of them: CSV, JSON, a table, pictures."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cases import CLASS_LOOP, FROZEN, Case
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
PACKAGES = ("torch", "axolotl-cvloss", "transformers", "axolotl", "liger-kernel", "cut-cross-entropy", "triton")
COLORS = {"floor": "0.75", "peer": "C7", "plain": "C1", "fused": "C0"}


def machine(device: str = "cpu") -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": model.group(1) if model else platform.processor(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB",
        "system": platform.system(),
        "python": platform.python_version(),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def summary(records: Sequence[Row]) -> Row:
    """Median and spread of the seconds and bytes of a case over the rounds."""
    seconds = [statistics.median(record["seconds"]) for record in records]
    return {
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "bytes": statistics.median(record["bytes"] for record in records),
    }


def compare(cases: Mapping[str, Case], records: Sequence[Row]) -> list[Row]:
    """A row for each case: its figures, and their ratios to those of its base, measured just before and just after it.

    ``records`` are in the order in which they were measured.
    """
    places: dict[str, list[int]] = {name: [] for name in cases}
    for place, record in enumerate(records):
        places[record["case"]].append(place)
    rows = []
    for name, case in cases.items():
        own = [records[place] for place in places[name]]
        times, sizes = [], []
        for place in places[name]:
            near = [records[p] for p in _neighbours(place, places[case.base])]
            base = statistics.fmean(statistics.median(record["seconds"]) for record in near)
            times.append(statistics.median(records[place]["seconds"]) / base)
            sizes.append(records[place]["bytes"] / near[0]["bytes"])
        memory = statistics.median(sizes)
        row = {"case": name, "kind": case.kind, "loss": own[0]["loss"], **summary(own), "base": case.base}
        row |= {"time_ratio": statistics.median(times), "time_ratio_min": min(times), "time_ratio_max": max(times)}
        row |= {"rounds": len(own)}
        row |= {"time_limit": case.time_limit, "memory_ratio": memory, "memory_limit": case.memory_limit}
        for what in "time", "memory":
            limit = row[f"{what}_limit"]
            row[f"{what}_reached"] = None if limit is None else row[f"{what}_ratio"] <= limit
        rows.append(row)
    return rows


def _neighbours(place: int, others: Sequence[int]) -> list[int]:
    """The last of the others up to a place and the first from there on; one of them where there is no other."""
    before, after = [p for p in others if p <= place], [p for p in others if p >= place]
    return [*before[-1:], *after[:1]]


def write(path: Path, rows: Sequence[Row], **more: Any) -> None:
    """``path``.csv has the rows, with the machine in each; ``path``.json has everything."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({**more, "results": rows}, indent=1, ensure_ascii=False) + "\n")
    known = more["machine"]
    short = {name: known[name] for name in ("date", "cpu", "cores", "gpu", "torch", "axolotl-cvloss") if name in known}
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *short])
        writer.writeheader()
        writer.writerows({**row, **short} for row in rows)


def show(rows: Sequence[Row]) -> None:
    console = Console(width=None if Console().is_terminal else 150, highlight=False)
    for base in dict.fromkeys(row["base"] for row in rows):
        table = Table("case", title=f"Ratios to: {base}", title_justify="left")
        for column in "seconds", "min-max", "MB", "time ratio", "min-max", "limit", "memory ratio", "limit":
            table.add_column(column, justify="right")
        for row in (row for row in rows if row["base"] == base):
            table.add_row(
                row["case"].removesuffix(FROZEN),
                f"{row['seconds']:.3g}",
                f"{row['seconds_min']:.3g}-{row['seconds_max']:.3g}",
                f"{row['bytes'] / 1e6:.0f}",
                f"{row['time_ratio']:.3f}",
                f"{row['time_ratio_min']:.3f}-{row['time_ratio_max']:.3f}",
                _limit(row, "time"),
                f"{row['memory_ratio']:.3f}",
                _limit(row, "memory"),
            )
        console.print(table)


def _limit(row: Row, what: str) -> str:
    limit = row[f"{what}_limit"]
    return "" if limit is None else f"{limit:.2f} {'yes' if row[f'{what}_reached'] else 'NO'}"


def bar_chart(path: Path, rows: Sequence[Row], title: str) -> None:
    """Ratios of time and memory, a line of panels a head; dashed: the floor, black ticks: the limits."""
    plt = _pyplot()
    rows = [row for row in rows if row["base"] != CLASS_LOOP]  # one bar there would be 50 times the other
    bases = list(dict.fromkeys(row["base"] for row in rows))
    if not bases:
        return
    groups = [[row for row in rows if row["base"] == base and row["kind"] != "floor"] for base in bases]
    figure, axes = plt.subplots(
        len(bases),
        2,
        squeeze=False,
        sharey="row",
        layout="constrained",
        figsize=(13, 1.5 + 0.3 * sum(map(len, groups))),
        gridspec_kw={"height_ratios": [len(group) for group in groups]},
    )
    for line, base, group in zip(axes, bases, groups, strict=True):
        floor = next((row for row in rows if row["base"] == base and row["kind"] == "floor"), None)
        for axis, what in zip(line, ("time", "memory"), strict=True):
            ratios = [row[f"{what}_ratio"] for row in group]
            ends = [[row.get(f"{what}_ratio_{end}", row[f"{what}_ratio"]) for row in group] for end in ("min", "max")]
            spread = [[abs(end - ratio) for end, ratio in zip(side, ratios, strict=True)] for side in ends]
            colors = [COLORS[row["kind"]] for row in group]
            bars = axis.barh(range(len(group)), ratios, color=colors, xerr=spread, ecolor="0.4")
            axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
            for i, row in enumerate(group):
                if (limit := row[f"{what}_limit"]) is not None:
                    axis.plot([limit, limit], [i - 0.4, i + 0.4], color="black")
            if floor is not None:
                axis.axvline(floor[f"{what}_ratio"], ls="--", color="0.3", label=floor["case"].removesuffix(FROZEN))
                axis.legend(loc="lower right", fontsize=8)
            axis.set(title=f"{what}, ratio to {base}", xlim=(0, 1.15 * max([*ends[1], 1])))
            axis.axvline(1, color="0.8", zorder=0)
        line[0].set_yticks(range(len(group)), [row["case"].removesuffix(FROZEN) for row in group], fontsize=8)
        line[0].invert_yaxis()
    figure.suptitle(f"{title}\nblack ticks: limits; grey: peers, orange: plain PyTorch, blue: this package", fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=130)


def growth_chart(path: Path, rows: Sequence[Row], title: str, lines: Mapping[str, Iterable[tuple[int, int]]]) -> None:
    """Seconds and memory against the number of rows and against the vocabulary; ``lines`` has the points of each."""
    plt = _pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharey="row", layout="constrained")
    for column, (what, points) in enumerate(lines.items()):
        chosen = [row for row in rows if (row["rows"], row["vocab"]) in set(points)]
        other = "vocab" if what == "rows" else "rows"
        for name in dict.fromkeys(row["case"] for row in chosen):
            line = [row for row in chosen if row["case"] == name]
            sizes = [row[what] for row in line]
            seconds, low, high = ([row[key] for row in line] for key in ("seconds", "seconds_min", "seconds_max"))
            axes[0, column].plot(sizes, seconds, "o-", ms=4, label=name)
            axes[0, column].fill_between(sizes, low, high, alpha=0.2)
            axes[1, column].plot(sizes, [row["bytes"] / 1e6 for row in line], "o-", ms=4)
        for axis, unit in zip(axes[:, column], ("seconds", "MB above the inputs"), strict=True):
            axis.set_xscale("log", base=2)
            axis.set(yscale="log", xlabel=f"{what}, at {chosen[0][other]} {other}", ylabel=unit)
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path.with_suffix(".png"), dpi=130)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
