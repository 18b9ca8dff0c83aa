"""Which intents does an objective gain on, and would it gain where test rows are as frequent as training rows?

python benchmarks/evidence/by_label.py

From the rows that make_intents.py has made and the final lines in results/, whose examples tell which rows a run has
right. results/by_label.jsonl has a line a run: its recall on each intent, the most frequent one in training first, and
the mean of these weighed as the intents are frequent in training. page.py makes tables of it.
"""

import json
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import Any

from axolotl_cvloss.command.compare.plan import halves
from axolotl_cvloss.command.compare.running import read_lines

HERE = Path(__file__).resolve().parent
FILE = HERE / "results" / "by_label.jsonl"
DATA = Path("outputs/evidence")
ROWS = ("intents", "intents_kept_back", "intents_pretrained")  # folders of DATA; results beside them have their rows


def labels_of(data: Path, split: str) -> list[str]:
    return [row["completion"].strip() for row in read_lines(data / f"{split}.jsonl")]


def recalls(line: dict[str, Any], labels: list[str], frequency: Counter[str]) -> dict[str, Any]:
    right: dict[str, list[int]] = {name: [] for name, _ in frequency.most_common()}
    for label, one in zip(labels, line["examples"], strict=True):
        right[label].append(int(one))
    recall = {name: round(fmean(own), 4) for name, own in right.items()}
    weighed = sum(frequency[name] * value for name, value in recall.items()) / frequency.total()
    run = {key: line[key] for key in ("objective", "rate", "seed")}
    return {**run, "recall": recall, "as_in_training": round(weighed, 6)}


def main() -> None:
    written = []
    for folder in sorted(path.parent for path in FILE.parent.glob("intents*/runs.jsonl")):
        task = max((name for name in ROWS if folder.name.startswith(name)), key=len)
        frequency, test = Counter(labels_of(DATA / task / "data", "train")), labels_of(DATA / task / "data", "test")
        finals = [line for line in read_lines(folder / "runs.jsonl") if line["stage"] == "final"]
        if not finals:  # a screen
            continue
        _, places = halves(len(test), len(test) - finals[0]["rows"])  # all of a comparison have as many
        labels = [test[place] for place in places]
        same = {"folder": folder.name, "training_rows": dict(frequency.most_common())}
        written += [{**same, **recalls(line, labels, frequency)} for line in finals]
    FILE.write_text("".join(json.dumps(line) + "\n" for line in written), encoding="utf-8")


if __name__ == "__main__":
    main()
