"""Losses and terms: what the engine knows of a loss, and a loss with its weight in an objective."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel
from torch import Tensor

from .family import Family
from .rows import COMPLETION, REFERENCE, Selector
from .statistics import Key
from .vocabulary import COUNTED


@dataclass(frozen=True)
class Loss:
    """A registered loss: its function and all that is said about it to people."""

    name: str
    kind: Family
    function: Callable[..., Any]
    statistics: tuple[str, ...]
    parameters: type[BaseModel]
    formula: str
    source: str
    summary: str
    helps: str = ""
    hurts: str = ""
    reference: Callable[..., Any] | None = None
    only_if: Mapping[str, str] = field(default_factory=dict)
    requires: str = ""
    at_once: bool = False
    at: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)

    @property
    def family(self) -> str:
        return self.kind.name

    @property
    def per_set(self) -> bool:
        return self.kind.per_set

    @property
    def needs_label_counts(self) -> bool:
        return any(name in COUNTED for name in self.statistics)

    @property
    def needs_reference(self) -> bool:
        return REFERENCE in self.statistics

    @property
    def needs_more(self) -> bool:
        """Whether logits and labels are not enough, but a tokenizer, the counts of labels or a reference is needed."""
        return self.kind.informed is not None or self.needs_label_counts or self.needs_reference

    @property
    def built_in(self) -> bool:
        """Whether it is of this package, and not of another one that is installed, or of a script."""
        return self.function.__module__.startswith("axolotl_cvloss.")


@dataclass(frozen=True)
class Term:
    """A weighted loss of an objective.

    name: what its value is called in results and logs.
    rows: which rows it looks at.
    per: what one set is: ``document``, ``batch``, or ``global``, the batches of all processes together.
    schedules: numbers among weight and parameters that change over training; each has ``at(progress)``.
    """

    name: str
    loss: Loss
    weight: float = 1.0
    rows: Selector = COMPLETION
    per: str = "document"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    schedules: Mapping[str, Any] = field(default_factory=dict)

    def at(self, progress: float) -> "Term":
        """The term with the weight and the parameters that it has after a fraction of training."""
        if not self.schedules:
            return self
        now = {name: schedule.at(progress) for name, schedule in self.schedules.items()}
        weight = now.pop("weight", self.weight)
        return replace(self, weight=weight, parameters={**self.parameters, **now})

    def needs(self, statistic: str) -> bool:
        parameter = self.loss.only_if.get(statistic)
        return statistic in self.loss.statistics and (parameter is None or bool(self.parameters.get(parameter)))

    def key(self, statistic: str) -> Key:
        """Of a statistic that the loss takes at one of its parameters, or several, with the values of these."""
        if (at := self.loss.at.get(statistic)) is None:
            return statistic
        return statistic, self.parameters[at] if isinstance(at, str) else tuple(self.parameters[name] for name in at)

    def __call__(self, statistics: Mapping[Any, Any]) -> Tensor:
        """The function of the loss on some statistics, by ``key``."""
        chosen = {name: statistics[self.key(name)] if self.needs(name) else None for name in self.loss.statistics}
        return self.loss.function(**chosen, **self.parameters)
