"""The datasets: rows from local files or the hub, and the splits that every run shares."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from axolotl_cvloss.hosts.axolotl_prompts import Example, Row

CONFIGS = Path(__file__).resolve().parents[2] / "example_configs"
# What a split is called in file names. The rows of HellaSwag's test split have no labels: its validation split is for
# scoring, as in the paper.
NAMES = {"train": ("train",), "valid": ("valid", "validation", "dev"), "test": ("test",)}
HELLASWAG = {"train": ("train",), "valid": (), "test": ("validation", "valid", "dev")}
NEW_TOKENS = {"gsm8k": 192, "mathqa": 320, "openbookqa": 8, "hellaswag": 8}  # enough for every target


@dataclasses.dataclass(frozen=True)
class Task:
    """A dataset and the recipe of the paper for it, both from ``example_configs/NAME.yaml``."""

    name: str
    recipe: dict[str, Any]
    example: Example

    @property
    def dataset(self) -> dict[str, Any]:
        return self.recipe["datasets"][0]

    @property
    def new_tokens(self) -> int:
        return NEW_TOKENS[self.name]


def task(name: str) -> Task:
    recipe = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return Task(name, recipe, import_module(recipe["datasets"][0]["type"]).example)


@dataclasses.dataclass(frozen=True)
class Data:
    """The rows of the three splits, a file of those to train on, and where they come from.

    ``digest`` is one of the rows to train on, ``inputs`` one of all rows.
    """

    train: list[Row]
    valid: list[Row]
    test: list[Row]
    file: Path
    digest: str
    inputs: str
    sources: dict[str, str]


def prepare(task: Task, folder: Path | None, work: Path, train: int | None, valid: int, test: int | None) -> Data:
    """The same rows every time. Validation rows come from the training split where there is no split for them."""
    rows, sources = _from_files(task, folder) if folder else _from_hub(task)
    if not rows["train"] and rows["valid"]:  # files of MathQA often lack the training split
        rows["train"], rows["valid"] = rows["valid"], []
        sources["train"] = sources.pop("valid")
    for split in "train", "test":
        if not rows[split]:
            raise FileNotFoundError(f"no rows of {task.name} to {split}: {folder} has no {task.name}_{split}.jsonl")
    kept = {split: _shuffled(row for row in rows[split] if task.example(row)) for split in rows}
    if not kept["valid"]:
        sources["valid"] = f"{sources['train']}, held out"
        kept["valid"], kept["train"] = kept["train"][:valid], kept["train"][valid:]
    chosen = kept["train"][:train], kept["valid"][:valid], kept["test"][:test]
    text, *others = ("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows) for rows in chosen)
    digest, inputs = digest_of(text), digest_of(text, *others)
    file = work / "data" / f"{task.name}-{digest}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return Data(*chosen, file, digest, inputs, sources)


def digest_of(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def _shuffled(rows: Iterable[Row]) -> list[Row]:
    found = list(rows)
    random.Random(0).shuffle(found)
    return found


def _names(task: Task) -> dict[str, tuple[str, ...]]:
    return HELLASWAG if task.name == "hellaswag" else NAMES


def _from_files(task: Task, folder: Path) -> tuple[dict[str, list[Row]], dict[str, str]]:
    rows: dict[str, list[Row]] = {"train": [], "valid": [], "test": []}
    sources = {}
    for split, names in _names(task).items():
        for path in (folder / f"{task.name}_{name}.jsonl" for name in names):
            if path.exists():
                with path.open(encoding="utf-8") as lines:
                    rows[split] = [json.loads(line) for line in lines]
                sources[split] = path.name
                break
    return rows, sources


def _from_hub(task: Task) -> tuple[dict[str, list[Row]], dict[str, str]]:
    from datasets import load_dataset

    path, config = task.dataset["path"], task.dataset.get("name")
    splits = load_dataset(path, config)
    rows: dict[str, list[Row]] = {"train": [], "valid": [], "test": []}
    sources = {}
    for split, names in _names(task).items():
        for name in (name for name in names if name in splits):
            rows[split], sources[split] = list(splits[name]), f"{path}, {name}"
            break
    return rows, sources
