"""Evaluate: the value of each term from the statistics, in plain PyTorch, so that autograd gives their cotangents."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .entries import Entries, sorted_errors
from .sets import Sets


class LossFunction(Protocol):
    """What the engine needs to know of a loss; ``registry.Loss`` is one."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def function(self) -> Callable[..., Tensor]: ...
    @property
    def statistics(self) -> tuple[str, ...]: ...
    @property
    def only_if(self) -> dict[str, str]: ...
    @property
    def reference(self) -> Callable[..., Tensor] | None: ...


class Changing(Protocol):
    """A number that changes over training; ``config.Schedule`` is one."""

    def at(self, progress: float) -> float: ...


class Numbers(Protocol):
    """The number tokens; ``vocabulary.NumberTokens`` is one."""

    def tensors(self, like: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass
class Term:
    """A weighted loss of an objective.

    ``per`` is what one set is: ``document``, ``batch``, or ``global``, the batches of all processes together.
    """

    name: str
    loss: LossFunction
    weight: float = 1.0
    scope: str = "completion"
    per: str = "document"
    parameters: dict[str, Any] = field(default_factory=dict)
    schedules: Mapping[str, Changing] = field(default_factory=dict)
    numbers: Numbers | None = None  # of a loss of number tokens

    def advance(self, progress: float) -> None:
        """Set the weight and the parameters that follow a schedule to their values after a fraction of training."""
        for name, schedule in self.schedules.items():
            if name == "weight":
                self.weight = schedule.at(progress)
            else:
                self.parameters = {**self.parameters, name: schedule.at(progress)}

    def needs(self, statistic: str) -> bool:
        parameter = self.loss.only_if.get(statistic)
        return statistic in self.loss.statistics and (parameter is None or bool(self.parameters.get(parameter)))

    def __call__(self, **statistics: Tensor) -> Tensor:
        chosen = {name: statistics[name] if self.needs(name) else None for name in self.loss.statistics}
        return self.loss.function(**chosen, **self.parameters)


def row_values(term: Term, mask: Tensor, weights: Tensor | None, **statistics: Tensor) -> Tensor:
    """The weighted values of a token or row term on the rows of its scope, and 0 on others, (N,)."""
    values = term(**statistics)
    if values.shape != mask.shape:
        raise ValueError(
            f"loss {term.loss.name!r} must return one value a row, shape {tuple(mask.shape)}, not {tuple(values.shape)}"
        )
    values = values if weights is None else values * weights
    return torch.where(mask, values, 0)


def set_values(term: Term, sets: Sets, logp: Tensor, predicted: Tensor | None, entries: Entries | None) -> Tensor:
    """The value of a set-level term for each set, (D,)."""
    if term.loss.family == "document":
        values = [term(logp=part) for part in sets.split(logp)]
        return torch.stack([value.mean() for value in values])
    labelled = sets.labelled.to(logp.dtype)
    if term.loss.family == "ranking":
        assert entries is not None
        return sets.mean_over_classes(term(labelled=labelled, **sorted_errors(sets, logp, entries)))
    assert predicted is not None
    sums = {"intersection": sets.intersection(logp), "predicted": predicted, "labelled": labelled}
    parts = {name: x.split(sets.classes) for name, x in sums.items()}
    if term.needs("logp"):
        parts["logp"] = tuple(sets.split(logp))
    values = []
    for part in zip(*parts.values(), strict=True):
        statistics = dict(zip(parts, part, strict=True))
        value, expected = term(**statistics), statistics["labelled"].shape
        if value.shape not in (torch.Size(), expected):
            raise ValueError(
                f"loss {term.loss.name!r} must return a scalar or one value a class, shape "
                f"{tuple(expected)}, not {tuple(value.shape)}"
            )
        values.append(value.mean())
    return torch.stack(values)
