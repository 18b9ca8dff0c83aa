"""What is compared, and how much of it: losses, datasets, seeds, learning rates, sizes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

CROSS_ENTROPY = "cross_entropy"
PAPER = ("focal", "generalized_dice", "self_adjusting_dice", "lovasz")  # the four that the paper compares with it
REFERENCE = ":reference"  # behind a loss: as the paper's code computes it, with its slips
LOSSES = (CROSS_ENTROPY, *PAPER, "dice", "tversky", "dft", "generalized_dice" + REFERENCE)


def objective(loss: str) -> dict[str, Any]:
    """The value of `cv_loss`: cross-entropy over prompt and answer, and with it the other loss over the answer."""
    cross_entropy = {"loss": CROSS_ENTROPY, "scope": "sequence"}
    if loss == CROSS_ENTROPY:
        return {"terms": [{**cross_entropy, "weight": 1.0}]}
    terms = [{**cross_entropy, "weight": 0.6}, {"loss": loss.removesuffix(REFERENCE), "weight": 0.4}]
    return {"terms": terms, "reference": loss.endswith(REFERENCE)}


@dataclasses.dataclass(frozen=True)
class Plan:
    """`None` rows are all of them; 0 steps are the epochs of the paper's recipe."""

    datasets: tuple[str, ...]
    losses: tuple[str, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]  # tried with the first seed; the best on the validation rows is taken for all seeds
    train: int | None
    valid: int
    test: int | None
    steps: int
    batch: int
    eval_batch: int
    new_tokens: int | None = None  # where fewer are to do than the longest targets of the dataset need

    @property
    def sweep_seed(self) -> int | None:
        """The seed with which the rates are tried; a single one is not tried."""
        return self.seeds[0] if len(self.rates) > 1 else None


PLANS = {
    "smoke": Plan(
        datasets=("gsm8k",),
        losses=(CROSS_ENTROPY, "lovasz"),
        seeds=(0,),
        rates=(3e-3,),
        train=64,
        valid=8,
        test=8,
        steps=6,
        batch=4,
        eval_batch=8,
        new_tokens=16,
    ),
    "quick": Plan(
        datasets=("gsm8k",),
        losses=(CROSS_ENTROPY, "lovasz"),
        seeds=(0,),
        rates=(3e-3,),
        train=144,
        valid=16,
        test=40,
        steps=36,
        batch=4,
        eval_batch=16,
        new_tokens=100,
    ),
    "full": Plan(
        datasets=("gsm8k", "mathqa", "openbookqa"),
        losses=LOSSES,
        seeds=(0, 1, 2),
        rates=(1e-4, 3e-4, 1e-3),
        train=None,
        valid=200,
        test=None,
        steps=3000,
        batch=8,
        eval_batch=64,
    ),
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One training."""

    dataset: str
    loss: str
    seed: int
    rate: float

    def __str__(self) -> str:
        return f"{self.dataset}, {self.loss}, seed {self.seed}, lr {self.rate:g}"


def sweep(plan: Plan, dataset: str) -> list[Run]:
    if plan.sweep_seed is None:
        return []
    return [Run(dataset, loss, plan.sweep_seed, rate) for loss in plan.losses for rate in plan.rates]


def finals(plan: Plan, dataset: str, rates: dict[str, float]) -> list[Run]:
    """Seed by seed, so that a run that is cut short has compared all losses on some seeds."""
    return [Run(dataset, loss, seed, rates[loss]) for seed in plan.seeds for loss in plan.losses]


def best_rate(plan: Plan, lines: dict[Run, dict[str, Any]], dataset: str, loss: str) -> float:
    """By exact match on the validation rows; among the rates that are behind the best by no more than twice the
    standard error of the difference, by the NLL there, which a few rows measure better."""
    if plan.sweep_seed is None:
        return plan.rates[0]
    found = {rate: lines[Run(dataset, loss, plan.sweep_seed, rate)]["validation"] for rate in plan.rates}

    def variance(rate: float) -> float:
        share = found[rate]["exact_match"]
        return share * (1 - share) / found[rate]["examples"]

    best = max(plan.rates, key=lambda rate: found[rate]["exact_match"])

    def equal(rate: float) -> bool:
        behind = found[best]["exact_match"] - found[rate]["exact_match"]
        return behind <= 2 * math.sqrt(variance(rate) + variance(best))

    return min(filter(equal, plan.rates), key=lambda rate: finite(found[rate]["nll"]))


def finite(nll: float) -> float:
    """NaN, of a training that diverged, as infinity, which is worse than any other."""
    return math.inf if math.isnan(nll) else nll
