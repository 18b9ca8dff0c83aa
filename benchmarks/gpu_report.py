"""What gpu.py has written, as a table and as a figure; and before it has run on a GPU, the figures of a model."""

import csv
import sys
from pathlib import Path

RESULTS = Path(__file__).with_name("results") / "gpu.csv"
# Of a roofline: 750 TFLOP/s, 3 TB/s.
MODEL = (
    ("ms, by the model", "PyTorch path", "kernels", "products alone", "`F.cross_entropy` on full logits"),
    ("Llama-3-8B's head, trained, losses of tokens", "84", "38", "34", "50"),
    ("the same, losses of sets", "102", "38 to 50", "34", ""),
    ("the same, frozen head", "34", "25", "23", ""),
    ("Qwen3-0.6B's head, trained, losses of tokens", "39", "15", "10", "30"),
    ("the same, losses of sets", "50", "18", "10", ""),
    ("the same, frozen head", "20", "9", "7", ""),
)
NOT_MEASURED = (
    "**Not measured on a GPU.** The figures below are a model (750 TFLOP/s, 3 TB/s, N 8192, bf16), not measurements; "
    "`make bench-gpu` measures."
)
NAMES = {"llama": "Llama-3-8B's", "qwen": "Qwen3-0.6B's"}


def lines_of(path):
    """The lines of the card and versions that were measured last, where there is a card."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    last = tuple(lines[-1][name] for name in ("card", "driver", "torch", "triton")) if lines else ()
    same = [x for x in lines if tuple(x[name] for name in ("card", "driver", "torch", "triton")) == last]
    return [x for x in same if x["card"] != "cpu"]


def described(lines):
    """What the page on performance says of a GPU: a sentence, and rows of a table for each part of the results."""
    heads = [x for x in lines if x["part"] == "cases" and x["ms"]]
    steps = [x for x in lines if x["part"] == "step" and x["ms"]]
    if not heads:
        return NOT_MEASURED, [MODEL]
    memory = {(x["head"], x["trained"], x["mix"], x["way"]): x["peak_mib"] for x in lines if x["part"] == "memory"}
    rows = [("head", "way", "ms", "quartiles", "peak MiB")]
    for x in heads:
        mix = "" if not x["way"].startswith("ours") and x["mix"] == "token" else f" ({x['mix']})"
        if mix and not x["way"].startswith("ours"):
            continue  # measured beside this mix too; once is enough to read
        head = f"{NAMES.get(x['head'], x['head'])}, {'trained' if x['trained'] == 'True' else 'frozen'}"
        most = memory.get((x["head"], x["trained"], x["mix"], x["way"]), "")
        rows.append((head, x["way"] + mix, x["ms"], f"{x['low']} to {x['high']}", most))
    tables = [rows]
    if steps:
        found = [(x["mix"], x["way"], x["ms"], f"{x['low']} to {x['high']}", x["peak_mib"], x["figure"]) for x in steps]
        tables.append([("training step", "loss", "ms", "quartiles", "peak MiB", "tokens/s"), *found])
    first = heads[0]
    about = (
        f"{first['card']}, driver {first['driver']}, torch {first['torch']}, Triton {first['triton']}; bf16, N "
        f"{first['rows']}; forward and backward, median of interleaved rounds; memory above the inputs, a process each."
    )
    return about, tables


def figure(lines, path):
    """Milliseconds of each way, a panel a head; the line is that of the products alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {}
    for x in lines:
        if x["part"] == "cases" and x["ms"]:
            panels.setdefault((x["head"], x["trained"]), []).append(x)
    if not panels:
        return
    drawn, axes = plt.subplots(len(panels), 1, squeeze=False, layout="constrained", figsize=(9, 3.2 * len(panels)))
    for axis, ((head, trained), found) in zip(axes[:, 0], panels.items(), strict=True):
        floor = next((float(x["ms"]) for x in found if x["way"] == "products alone"), None)
        shown = [
            x for x in found if x["way"].startswith("ours") or (x["mix"] == "token" and x["way"] != "products alone")
        ]
        names = [f"{x['way']} ({x['mix']})" if x["way"].startswith("ours") else x["way"] for x in shown]
        middle = [float(x["ms"]) for x in shown]
        ends = [[abs(float(x[end]) - m) for x, m in zip(shown, middle, strict=True)] for end in ("low", "high")]
        colors = ["tab:blue" if x["way"].startswith("ours") else "0.7" for x in shown]
        axis.bar_label(
            axis.barh(names, middle, xerr=ends, color=colors, ecolor="0.4"), fmt="%.1f", padding=3, fontsize=8
        )
        if floor is not None:
            axis.axvline(floor, ls="--", color="0.3", label="products alone")
            axis.legend(fontsize=8)
        axis.set(xlabel="ms", title=f"{NAMES.get(head, head)} head, {'trained' if trained == 'True' else 'frozen'}")
        axis.invert_yaxis()
    drawn.suptitle(f"{lines[0]['card']}, torch {lines[0]['torch']}", fontsize=9)
    drawn.savefig(path, dpi=120)
    plt.close(drawn)


if __name__ == "__main__":
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    figure(lines_of(results), results.with_suffix(".png"))
