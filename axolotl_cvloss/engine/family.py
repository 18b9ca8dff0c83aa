"""What a family of losses is, and what it does in one pass over a batch.

A family says what its functions may ask for (``Family``), and how that is collected from chunks of logits, evaluated,
and pulled back into the gradient of the logits (``Part``). To add one, write both in a file and ``register_family`` it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .batch import Batch, Chunk, Group
    from .gradient import LogitGradient
    from .sets import Sets, Window
    from .terms import Term
    from .views import View


class Part:
    """The terms of one family in one pass. The engine calls the methods in the order in which they stand here.

    whole: The values need statistics of all rows, so ``total`` is called once for all of them, and the logits are
        visited a second time for the gradient.
    revisits: ``see`` must get the logits of every chunk again before its ``pull``.
    columns_only: It looks at a few columns of a chunk, and ``pull`` adds to ``gradient.columns`` alone. The kernels
        serve no other.
    """

    whole: ClassVar[bool] = False
    revisits: ClassVar[bool] = False
    columns_only: ClassVar[bool] = False

    def __init__(self, terms: Sequence[Term], batch: Batch) -> None:
        self.terms, self.batch = terms, batch

    # collect

    def see(self, chunk: Chunk, view: View, first: bool, gradient: bool) -> None:
        """The logits of a chunk. ``gradient``: its ``pull`` comes next."""

    def see_p(self, chunk: Chunk, view: View) -> None:
        """The probabilities of a chunk at its first visit."""

    def finish(self) -> None:
        """All chunks have been seen once."""

    # evaluate

    def leaves(self, rows: slice) -> list[Tensor]:
        """Statistics of its own for these rows, which ``total`` comes to next; they get a gradient."""
        return []

    def total(self, rows: slice, statistics: Mapping[Any, Tensor]) -> Tensor | float:
        """The weighted sum of its terms over these rows, differentiable in their statistics (n,) and in the leaves."""
        return 0.0

    # pull back

    def take(self, rows: slice, cotangents: Sequence[Tensor]) -> None:
        """The cotangents of the leaves of these rows."""

    def columns(self, group: Group, chunk: Chunk, window: Window, cotangent: Tensor | None) -> Tensor | None:
        """The cotangent (n, C) of p at the columns of a window, added to that of other parts (None: none yet)."""
        return cotangent

    def pull(self, chunk: Chunk, gradient: LogitGradient) -> None:
        """Add to the gradient of the logits of a chunk what is neither p times columns nor of the rows' statistics."""


@dataclass(frozen=True, eq=False)
class Family:
    """One kind of loss.

    name: How ``register_loss`` and people call it.
    words, cost: What its losses are, in a sentence, and what they cost.
    statistics: What its functions may ask for, by the name of an argument: shape and meaning.
    part: What serves its terms in a pass.
    per_set: Its losses have one value a set of rows, not one a row.
    pointwise: The value of a row is a function of the numbers that ``statistics`` has of this row.
    flat: Where the model gives a token little probability its losses are flat, unless they see ``logp``.
    silent_on: Tokens of which its losses say nothing, in words.
    informed: Gives a term with what it must know of a tokenizer, which its losses then need; ValueError where the
        tokenizer has nothing for it.
    on_logits: Its terms are not evaluated in a pass but by this, on all logits (..., V) at once and by autograd: gives
        the weighted sum of the terms.
    """

    name: str
    words: str
    cost: str
    statistics: Mapping[str, str]
    part: type[Part] = Part
    per_set: bool = False
    pointwise: bool = False
    flat: bool = False
    silent_on: str = ""
    informed: Callable[[Term, Any], Term] | None = None
    on_logits: Callable[[Sequence[Term], Tensor, Batch], Tensor] | None = None


class SetPart(Part):
    """Of a family with one value a set of rows."""

    whole = True

    def values(self, term: Term, sets: Sets, logp: Tensor) -> Tensor:
        """The value of a term for each set, (D,)."""
        raise NotImplementedError

    def total(self, rows: slice, statistics: Mapping[Any, Tensor]) -> Tensor | float:
        total: Tensor | float = 0.0
        for term in self.terms:
            if len(sets := self.batch.sets(term)):
                total = total + self.batch.set_total(term, sets, self.values(term, sets, statistics["logp"]))
        return total


def of_each_set(
    term: Term, sets: Sets, by_class: Mapping[str, Tensor], by_row: Mapping[str, Tensor], a_class: bool
) -> Tensor:
    """The value of a loss for each set, (D,), from statistics of its classes (P,) and of its rows (M,).

    A loss that asks for ``classes`` or ``rows``, or is registered as ``at_once``, is called once for all sets. Any
    other sees one set at a time; sets of equal size are batched by ``torch.vmap``, so there are as many calls as sizes,
    and only what vmap cannot follow (values that steer the code) is called set after set.

    Args:
        a_class: The loss may return one value a class; their mean is the value of the set.
    """
    segments = {"classes": sets.classes, "rows": sets.rows}
    if term.loss.at_once or any(term.needs(name) for name in segments):
        at_once = {"one value a set": (len(sets),)} | ({"one value a class": sets.pair_class.shape} if a_class else {})
        value = checked(term, term({**by_class, **by_row, **segments}), at_once)
        return sets.classes.mean(value) if a_class and value.shape == sets.pair_class.shape else value
    by_class = {name: x for name, x in by_class.items() if term.needs(name)}
    by_row = {name: x for name, x in by_row.items() if term.needs(name)}
    found, order = [], []
    for numbers, (classes, rows) in sets.of_equal_size(bool(by_class), bool(by_row)):
        statistics = {name: x[classes] for name, x in by_class.items()} | {name: x[rows] for name, x in by_row.items()}
        allowed = {"a scalar": ()} | ({"one value a class": classes.shape[1:]} if a_class else {})
        found.append(_batched(term, statistics, allowed))
        order.append(numbers)
    return torch.cat(found)[torch.cat(order).argsort().to(found[0].device)]


def _batched(term: Term, statistics: Mapping[str, Tensor], allowed: Mapping[str, tuple[int, ...]]) -> Tensor:
    """The values (G,) of a loss of one set for G sets of equal size, from statistics (G, n)."""

    def one(*values: Tensor) -> Tensor:
        return checked(term, term(dict(zip(statistics, values, strict=True))), allowed).mean()

    given = list(statistics.values())
    if len(given[0]) > 1 and term.loss.function not in _LOOPED:
        try:
            return torch.vmap(one)(*given)
        # A value that steers the code, an operation without a batched form, or an error of its own, which comes again.
        except RuntimeError:
            values = [one(*row) for row in zip(*given, strict=True)]
            _LOOPED.add(term.loss.function)
            return torch.stack(values)
    return torch.stack([one(*row) for row in zip(*given, strict=True)])


_LOOPED: set[Any] = set()  # functions that torch.vmap cannot follow


def checked(term: Term, value: Any, allowed: Mapping[str, tuple[int, ...]]) -> Tensor:
    """The value that a loss has returned, where it is a tensor of an allowed shape; ValueError elsewhere."""
    if not isinstance(value, Tensor) or tuple(value.shape) not in [tuple(shape) for shape in allowed.values()]:
        words = " or ".join(f"{what}, shape {tuple(shape)}" if shape else what for what, shape in allowed.items())
        given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss {term.loss.name!r} must return {words}, not {given}")
    return value
