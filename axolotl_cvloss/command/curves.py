"""Losses that depend on the probability p of the target alone: value and gradient against p."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..engine.terms import Loss, Term

GRID = torch.arange(1, 1000, dtype=torch.float64) / 1000  # values of p
HIGHEST = 5.0  # value that a picture shows


class NotACurve(ValueError):
    """The loss is not a function of p alone; the message says why."""


class Curve(NamedTuple):
    """``pull`` is what the gradient adds to the logit of the target, -dL/dz: negative where the loss lowers p."""

    p: Tensor
    value: Tensor
    pull: Tensor


def curve(loss: Loss, parameters: Mapping[str, Any]) -> Curve:
    """The values of a loss on ``GRID``.

    Raises:
        NotACurve: The loss, or its form with these parameters, needs more than p.
    """
    if not loss.kind.pointwise:
        raise NotACurve(
            f"{loss.name} is not a function of p alone. Its family is {loss.family}: {loss.kind.words.lower()}"
        )
    term = Term(loss.name, loss, parameters=dict(parameters))
    others = [name for name in loss.statistics if name != "logp" and term.needs(name)]
    if "logp" not in loss.statistics or not set(others) <= {"lse", "mean_logit", "mean_logp"}:
        raise NotACurve(f"{loss.name} is not a function of p alone: it needs {', '.join(others)}")
    value, pull = _evaluate(term, GRID, seed=0)
    # What does not matter may be anything.
    again, _ = _evaluate(term, GRID, seed=1)
    half, _ = _evaluate(term, GRID[::2], seed=0)
    if not torch.equal(value, again):
        raise NotACurve(
            f"{loss.name} with these parameters is not a function of p alone: it needs {', '.join(others)} too"
        )
    if not torch.equal(value[::2], half):
        raise NotACurve(f"{loss.name} is not a function of p alone: the value of a token depends on other tokens")
    return Curve(GRID, value, pull)


def _evaluate(term: Term, p: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    statistics = {name: torch.rand(p.shape, generator=generator, dtype=p.dtype) for name in term.loss.statistics}
    statistics["logp"] = logp = p.log().requires_grad_()
    value = term({term.key(name): x for name, x in statistics.items()})
    (slope,) = torch.autograd.grad(value.sum(), logp)
    return value.detach(), -slope * (1 - p)  # d log p / dz = 1 - p


def save(curves: Mapping[str, Curve], path: Path) -> None:
    """A picture of value and pull against p, a line for each name.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: The name of the file does not end in a format that matplotlib writes.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    styles: Sequence[str] = ("-", "--", ":", "-.")
    colors = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for number, (name, (p, value, pull)) in enumerate(curves.items()):
        style = {"color": colors[number % 10], "linestyle": styles[number // 10 % 4], "label": name}
        left.plot(p, value, **style)
        right.plot(p, pull, **style)
    left.set(title="value", xlabel="probability p of the target")
    left.set_ylim(top=min(left.get_ylim()[1], HIGHEST))
    right.set(title="pull on the logit of the target, -dL/dz", xlabel="probability p of the target")
    right.axhline(0, color="black", linewidth=0.5)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120)
