"""The test set of a config, as its host makes tokens and labels of it.

    python -m axolotl_cvloss.command.compare.rows axolotl|trl CONFIG.yaml ROWS.jsonl

A line a row: ``input_ids``, and ``labels`` with -100 where nothing is asked of the model. It runs in a process of its
own, as a host changes much of the process that it is loaded into.
"""

import json
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, list[int]]


def of_axolotl(config: Path) -> Iterator[Row]:
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets

    with tempfile.TemporaryDirectory() as folder:
        # Not where a training of the same config may be writing.
        cfg = load_cfg(str(config), dataset_prepared_path=folder, dataset_num_proc=1)
        rows = load_datasets(cfg=cfg).eval_dataset
        for row in rows:
            yield {"input_ids": row["input_ids"], "labels": row["labels"]}


def of_trl(config: Path) -> Iterator[Row]:
    from ...hosts.trl_cli import built

    with tempfile.TemporaryDirectory() as folder:
        # The script loads the test set only for a training that evaluates, and packing would join the rows.
        own = {"eval_strategy": "steps", "eval_steps": 1, "packing": False, "eval_packing": False}
        trainer = built(config, folder, own)
    for row in trainer.eval_dataset:
        made = trainer.data_collator([row])  # it makes labels of the masks of the row
        yield {"input_ids": made["input_ids"][0].tolist(), "labels": made["labels"][0].tolist()}


def write(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """At once, or not at all."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    unfinished.rename(path)


def read(path: Path) -> list[Row]:
    # Not splitlines: a text may have other ends of lines in it, such as U+2028, which JSON leaves as they are.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def split(row: Row) -> tuple[list[int], list[int]]:
    """Prompt and reference, which are empty where nothing is labelled, or where nothing stands before it."""
    tokens, labels = row["input_ids"], row["labels"]
    end = next((place for place in range(len(labels), 0, -1) if labels[place - 1] != -100), 0)
    start = next((place for place in range(end, 0, -1) if labels[place - 1] == -100), 0)
    return (tokens[:start], tokens[start:end]) if start else ([], [])


def longest_answer(rows: Sequence[Row]) -> int:
    """Of the references in tokens, their end included, and a quarter more: enough to see that one goes on too long."""
    return math.ceil(1.25 * max((len(split(row)[1]) for row in rows), default=0))


def main() -> None:
    host, config, out = sys.argv[1:]
    write({"axolotl": of_axolotl, "trl": of_trl}[host](Path(config)), Path(out))


if __name__ == "__main__":
    main()
