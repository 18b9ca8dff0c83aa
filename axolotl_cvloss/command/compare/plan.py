"""What is compared: objectives, rates and seeds; and the config of each training. Needs no torch and no host."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...objective.config import KEY

BASELINE = "cross_entropy"
Line = dict[str, Any]
Config = dict[str, Any]

# Keys of a host that make other trainings of the objectives' than the same, or that only cost time here: checkpoints
# and evaluation on the way, and what follows from them. Each host saves its model at the end.
REMOVED = {
    "axolotl": (
        "test_datasets",
        "eval_strategy",
        "eval_steps",
        "evals_per_epoch",
        "saves_per_epoch",
        "save_steps",
        "save_total_limit",
        "load_best_model_at_end",
        "early_stopping_patience",
        "auto_resume_from_checkpoints",
        "resume_from_checkpoint",
        "hub_model_id",
    ),
    "trl": (
        "eval_steps",
        "eval_on_start",
        "save_steps",
        "save_total_limit",
        "load_best_model_at_end",
        "metric_for_best_model",
        "resume_from_checkpoint",
        "push_to_hub",
        "hub_model_id",
    ),
}
PLUGIN, SEED_PLUGIN = "axolotl_cvloss.CVLossPlugin", "axolotl_cvloss.command.compare.seeding.SeedPlugin"


@dataclass(frozen=True)
class Run:
    """One training."""

    objective: str
    rate: float
    seed: int

    def __str__(self) -> str:
        return f"{self.objective}, rate {self.rate:g}, seed {self.seed}"

    @property
    def folder(self) -> str:
        digest = hashlib.sha256(self.objective.encode()).hexdigest()[:6]
        plain = "".join(c if c.isalnum() or c in "._-" else "-" for c in self.objective)
        return f"{plain}-{digest}-rate{self.rate:g}-seed{self.seed}"


@dataclass(frozen=True)
class Plan:
    """``objectives`` are values of the key cv_loss by name, the baseline among them."""

    objectives: Mapping[str, Any]
    rates: tuple[float, ...]
    choice_seeds: tuple[int, ...]
    seeds: tuple[int, ...]

    def choice(self) -> list[Run]:
        """The trainings by which rates are chosen: none where there is nothing to choose."""
        if len(self.rates) == 1 and self.seeds:
            return []
        return [Run(name, rate, seed) for seed in self.choice_seeds for name in self.objectives for rate in self.rates]

    def finals(self, rates: Mapping[str, float]) -> list[Run]:
        """Seed by seed, so that a comparison that is cut short has all objectives on some seeds."""
        return [Run(name, rates[name], seed) for seed in self.seeds for name in self.objectives if name in rates]


def run_config(host: str, config: Config, objective: Any, rate: float, seed: int) -> Config:
    """The user's config with another objective, rate and seed, the same for all in everything else."""
    own = {key: value for key, value in config.items() if key not in REMOVED[host]}
    own |= {KEY: objective, "learning_rate": rate, "seed": seed, "save_strategy": "no"}
    if host == "axolotl":
        plugins = own.get("plugins") or []
        own["plugins"] = [*plugins, *(name for name in (PLUGIN, SEED_PLUGIN) if name not in plugins)]
    else:
        own["eval_strategy"] = "no"
    return own


def problem(host: str | None, config: Config) -> str | None:
    """Why the config cannot be compared; None where it can."""
    if host is None:
        return "its keys do not tell whether it is for Axolotl or TRL"
    if host == "axolotl" and not config.get("test_datasets"):
        return (
            "it has no test_datasets, whose rows choose the rates and score the models; with val_set_size every seed "
            "would hold out other rows"
        )
    if host == "trl" and config.get("dataset_streaming"):
        return "dataset_streaming: its test set is read from the beginning to the end; leave it out"
    return None


def content(config: Any) -> Any:
    """The config with every path to a file or folder replaced by a digest of what is there, so that it means the same
    on another machine and something else after the data have changed."""
    if isinstance(config, Mapping):
        return {key: content(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [content(value) for value in config]
    if isinstance(config, str) and config and (path := Path(config)).exists():
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        return [[file.name, _digest_of_file(file)] for file in files if ".cache" not in file.parts]
    return config


def _digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slow(file)


def _slow(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while part := file.read(1 << 20):
        digest.update(part)
    return digest.hexdigest()


def digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def setting(host: str, config: Config, more: Mapping[str, Any]) -> str:
    """What all lines of a comparison share: everything but objective, rate and seed, and where the results lie."""
    same = run_config(host, config, None, 0.0, 0)
    same["test set"] = [config.get("test_datasets"), config.get("dataset_test_split")]
    for place in ("output_dir", "dataset_prepared_path"):
        same.pop(place, None)
    return digest(host, content(same), more)


def halves(count: int, validation: int) -> tuple[list[int], list[int]]:
    """Which rows of the test set choose the rates, and which score the models: the same for everybody."""
    order = list(range(count))
    random.Random(0).shuffle(order)
    return sorted(order[:validation]), sorted(order[validation:])


def choose_rate(lines: Sequence[Line]) -> float:
    """The rate of an objective, by its lines of stage choice.

    The mean validation score over rows and seeds decides where it can: a rate is out where it is behind the best one
    by more than twice the standard error of the difference, over the rows that both have answered. Among the others
    the lowest validation NLL decides, which few rows measure better than they do a score. NLL alone would favour the
    rates that cross-entropy likes, and the score alone the luck of the rows. A NaN, of a training that diverged, is
    the worst NLL there is. While not all rates have been run with all seeds, those count that all rates have.
    """
    seeds: dict[float, set[int]] = {}
    for line in lines:
        seeds.setdefault(line["rate"], set()).add(line["seed"])
    shared = set.intersection(*seeds.values())
    by_rate: dict[float, list[Line]] = {rate: [] for rate in seeds}
    for line in sorted(lines, key=lambda line: line["seed"]):
        if line["seed"] in shared or not shared:
            by_rate[line["rate"]].append(line)
    values = {rate: [v for line in found for v in examples_of(line)] for rate, found in by_rate.items()}
    equal = list(by_rate)
    if shared and all(values.values()):
        best = max(equal, key=lambda rate: sum(values[rate]) / len(values[rate]))
        equal = [rate for rate in equal if not _behind(values[rate], values[best])]

    def nll(rate: float) -> float:
        found = [line["nll"] if line["nll"] is not None else float("inf") for line in by_rate[rate]]
        return sum(found) / len(found)

    return min(equal, key=lambda rate: (nll(rate), rate))


def _behind(values: Sequence[float], best: Sequence[float]) -> bool:
    differences = [b - v for v, b in zip(values, best, strict=True)]
    mean = sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / max(1, len(differences) - 1)
    return bool(mean > 2 * (variance / len(differences)) ** 0.5)


def examples_of(line: Line) -> list[float]:
    """The main score of each example: a text of 0 and 1, or numbers."""
    found = line.get("examples") or []
    return [float(value) for value in found]


def compact(examples: Sequence[float]) -> str | list[float]:
    if all(value in (0, 1) for value in examples):
        return "".join(str(int(value)) for value in examples)
    return [round(value, 6) for value in examples]
