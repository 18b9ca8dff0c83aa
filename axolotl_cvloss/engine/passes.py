"""One pass over a batch: collect statistics chunk by chunk, evaluate the terms, pull the gradient back by chunks.

The families say what is collected and evaluated, and what it adds to the gradient. Where all values are known as soon
as a chunk of logits is there, each is pulled back at once. Otherwise the statistics of the whole batch come first,
so the logits are visited twice; the last chunk of the first visit is still at hand for the second. Where only hidden
states want a gradient (a frozen head), p times the head's weight is kept from the first visit, and the second needs no
logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .batch import Batch, Chunk
from .family import Family, Part
from .gradient import LogitGradient, cotangents_or_none
from .rows import COMPLETION
from .sets import SetCounts, Window
from .sources import LogitSource
from .statistics import FACTORED, STATISTICS, Key, named, with_others
from .terms import Term
from .views import View, scale_


@dataclass
class Outcome:
    """``loss`` is the weighted sum; ``means`` has for each term its mean over the rows (or sets) of its scope: its sum
    divided by the mass of the rows.

    ``diagnostics`` has the means of entropy and accuracy over the trained rows, where they were asked for.
    """

    loss: Tensor
    means: dict[str, Tensor]
    nll: Tensor
    sets: dict[str, SetCounts] = field(default_factory=dict)
    diagnostics: dict[str, Tensor] = field(default_factory=dict)


DIAGNOSTICS = ("entropy", "accuracy")


def compute(
    source: LogitSource,
    terms: Sequence[Term],
    batch: Batch,
    diagnose: bool = False,
    known: Mapping[str, Tensor] | None = None,
) -> Outcome:
    """Value and gradient of the terms on a batch; the loss is differentiable in ``source.tensors``.

    Args:
        diagnose: Also the entropy and the accuracy.
        known: Statistics that do not come from the logits, (N,) each.
    """
    families: dict[Family, list[Term]] = {}
    for term in terms:
        families.setdefault(term.loss.kind, []).append(term)
    batch.sums = {term.name: torch.zeros_like(batch.loss) for term in terms}
    chunked = {family: found for family, found in families.items() if family.on_logits is None}
    # With no such term there is still the NLL, which wants no gradient.
    wanted = [bool(chunked) and torch.is_grad_enabled() and tensor.requires_grad for tensor in source.tensors]
    pass_ = _Pass(source, batch, any(wanted), chunked, diagnose, known or {})
    loss = _Engine.apply(pass_, wanted, *source.tensors) if any(wanted) else pass_.run(wanted)
    del batch.p_at  # through it the batch would hold the pass and its logits until Python looks for cycles
    for family, found in families.items():
        if family.on_logits is not None:
            loss = loss + family.on_logits(found, source.tensors[0], batch)
    means = {t.name: batch.sums[t.name] / max(1, batch.host.masses[t.rows]) for t in terms}
    trained = {
        name: torch.where(batch.rows.scopes[COMPLETION], values, 0).sum() / max(1, batch.counts[COMPLETION])
        for name, values in batch.statistics.items()
        if name == "logp" or (diagnose and name in DIAGNOSTICS)
    }
    nll = -trained.pop("logp")
    sets = {t.name: batch.sets(t).counted() for t in terms if t.loss.per_set}
    return Outcome(loss, means, nll, sets, trained)


def target_logps(source: LogitSource, batch: Batch) -> Tensor:
    """(N,) log p of the target of each row, without gradient."""
    _Pass(source, batch, False, {}, False, {}).run(())
    return batch.statistics["logp"]


class _Engine(torch.autograd.Function):
    """Forms the gradient in the forward pass, where the logits are at hand, and scales it in the backward pass."""

    @staticmethod
    def forward(ctx: Any, pass_: "_Pass", wanted: Sequence[bool], *tensors: Tensor) -> Tensor:
        # Our own graphs are used up in here; hooks of the caller, such as those of a checkpoint, must not see them.
        with torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
            loss = pass_.run(wanted)
        ctx.gradients, ctx.fused = pass_.source.gradients(), pass_.source.fused
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph=True; the gradients below would pass for constants
            raise RuntimeError("cv_loss objectives have no second derivatives; backward with create_graph=True")
        if ctx.gradients is None:
            raise RuntimeError("backward of a cv_loss objective was called twice; compute the objective anew instead")
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                scale_(gradient, grad_output, ctx.fused)
        return None, None, *(g if g is None else g.to(t) for g, t in zip(gradients, ctx.dtypes, strict=True))


class _Pass:
    """One evaluation of an objective on one batch."""

    def __init__(
        self,
        source: LogitSource,
        batch: Batch,
        gradient: bool,
        families: Mapping[Family, Sequence[Term]],
        diagnose: bool,
        known: Mapping[str, Tensor],
    ) -> None:
        self.source, self.batch, self.gradient = source, batch, gradient
        zeros = torch.zeros(len(batch), dtype=source.dtype, device=batch.rows.labels.device)
        # Only those that a term needs: each reads all logits once more.
        asked = with_others(
            t.key(name) for found in families.values() for t in found for name in STATISTICS if t.needs(name)
        )
        self.pulled = [key for key in asked if named(key)[0].pull]
        self.keeps_z = gradient and not all(named(key)[0].over_p for key in self.pulled)
        self.terms = [t for found in families.values() for t in found]
        self.collected = list(dict.fromkeys([*asked, *(DIAGNOSTICS if diagnose else ())]))
        batch.statistics = {name: zeros.clone() for name in ("logp", "lse", *self.collected)}
        batch.statistics |= {name: values.to(source.dtype) for name, values in known.items()}
        batch.gradient, batch.p_at = gradient, self.p_at
        self.largest, self.top = zeros.clone(), zeros.clone()  # largest logits and their log p
        self.diagnose = diagnose
        self.parts: list[Part] = [family.part(found, batch) for family, found in families.items()]

    def run(self, wanted: Sequence[bool]) -> Tensor:
        """The loss; ``source.gradients()`` has its gradients then, where any are wanted."""
        if self.gradient:
            self.source.start(wanted)
        if any(part.whole for part in self.parts):
            self._in_two_visits()
        else:
            self._in_one_visit()
        return self.batch.loss

    def _in_one_visit(self) -> None:
        for chunk in self.batch.chunks:
            view = self._visit(chunk, self.gradient)
            found = self._evaluate(chunk.rows)
            if self.gradient:
                self._pull(chunk, view, found)

    def _in_two_visits(self) -> None:
        chunks, revisits = self.batch.chunks, any(part.revisits for part in self.parts)
        mixes = self.gradient and self.source.mixes and not revisits and not self.keeps_z
        kept: dict[int, View] = {}
        for chunk in chunks:
            view = self._visit(chunk, gradient=False)
            if chunk is chunks[0]:
                mixes = mixes and not self._bends(chunk.rows)
            for part in self.parts:
                part.see_p(chunk, view)
            if mixes:
                self.source.mix(chunk.rows, view.take_others(self.batch.rows.labels[chunk.rows]))
            elif self.gradient and not revisits and (chunk is chunks[-1] or self.source.keeps(chunk.rows)):
                kept[chunk.number] = view
        for part in self.parts:
            part.finish()
        found = self._evaluate(slice(0, len(self.batch)))
        # What is a constant in the first rows may be none in others.
        mixes = mixes and found.keys().isdisjoint(self.pulled)
        if self.gradient:
            for chunk in reversed(chunks):
                again = kept.pop(chunk.number, None)
                if again is None and not mixes:
                    again = self._visit_again(chunk)
                self._pull(chunk, again, {name: x[chunk.rows] for name, x in found.items()})

    def _bends(self, rows: slice) -> bool:
        """Whether the gradient is more than p times a number of each row, as far as these rows tell.

        It is where a statistic that is pulled back by an (n, V) of its own is in a value, and no constant there.
        """
        asking = [t for t in self.terms if any(t.needs(name) and t.key(name) in self.pulled for name in STATISTICS)]
        if not all(term.loss.kind.pointwise for term in asking):
            return True
        leaves = {key: x[rows].detach().requires_grad_() for key, x in self.batch.statistics.items()}
        with torch.enable_grad():
            total = sum(self.batch.row_total(term, rows, leaves, report=False) for term in asking)
        found = cotangents_or_none(total, [leaves[key] for key in self.pulled])
        return any(cotangent is not None for cotangent in found)

    def _visit(self, chunk: Chunk, gradient: bool) -> View:
        """A chunk with its p, which the parts have seen, and its statistics put down."""
        view, labels = self.source.view(chunk.rows, self.keeps_z), self.batch.rows.labels[chunk.rows]
        for part in self.parts:
            part.see(chunk, view, True, gradient)
        found = view.collect(self.collected, labels)
        self.largest[chunk.rows], self.top[chunk.rows] = found.pop("largest"), found.pop("top")
        for key, values in found.items():
            self.batch.statistics[key][chunk.rows] = values
        return view

    def _visit_again(self, chunk: Chunk) -> View:
        """A chunk with its p, once more."""
        view = self.source.view(chunk.rows, self.keeps_z)
        for part in self.parts:
            part.see(chunk, view, False, True)
        return view.know(self.largest[chunk.rows], self.top[chunk.rows])

    def p_at(self, number: int, window: Window) -> Tensor:
        """p of the rows of a chunk at the columns of a window, without the logits of all."""
        rows = self.batch.chunks[number].rows
        distance = self.source.columns(rows, window.columns).sub_(self.largest[rows, None])
        return distance.add_(self.top[rows, None]).exp_()

    def _evaluate(self, rows: slice) -> dict[Key, Tensor]:
        """The terms on some rows; the cotangents of the statistics, and to each part those of its own."""
        statistics = {name: x[rows].detach().requires_grad_(self.gradient) for name, x in self.batch.statistics.items()}
        own = [part.leaves(rows) for part in self.parts]
        leaves = [leaf.requires_grad_(self.gradient) for part in own for leaf in part]
        with torch.set_grad_enabled(self.gradient):
            total = sum(part.total(rows, statistics) for part in self.parts)
        found = cotangents_or_none(total, [*statistics.values(), *leaves])
        for leaf in leaves:
            leaf.requires_grad_(False)
        rest = iter(found[len(statistics) :])
        for part, given in zip(self.parts, own, strict=True):
            part.take(rows, [_or_zeros(next(rest), leaf) for leaf in given])
        # A statistic that counts as a constant is not pulled back, which would take a pass over the chunk.
        return {name: grad for name, grad in zip(statistics, found, strict=False) if grad is not None}

    def _pull(self, chunk: Chunk, view: View | None, found: Mapping[Key, Tensor]) -> None:
        rows = chunk.rows
        values = {key: self.batch.statistics[key][rows] for key in ("logp", *self.collected)}
        values |= {"largest": self.largest[rows], "top": self.top[rows]}
        cotangents = {key: x for key, x in found.items() if key in values or key in FACTORED}
        labels, columns = self.batch.rows.labels[rows], self._columns(chunk, view)
        gradient = LogitGradient.build(view, labels, cotangents, columns, values)
        for part in self.parts:
            part.pull(chunk, gradient)
        self.source.pull(rows, gradient)

    def _columns(self, chunk: Chunk, view: View | None) -> list[tuple[Window, Tensor]]:
        """For each group of sets the window of a chunk, and p times its cotangent at the window's columns."""
        found = []
        for group in self.batch.groups:
            if (window := self.batch.windows(group)[chunk.number]) is None:
                continue
            cotangent = None
            for part in self.parts:
                cotangent = part.columns(group, chunk, window, cotangent)
            if cotangent is not None:
                weighted = self.p_at(chunk.number, window) if view is None else view.p_at(window.columns)
                found.append((window, weighted.mul_(cotangent)))
        return found


def _or_zeros(gradient: Tensor | None, leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if gradient is None else gradient


def _itself(tensor: Tensor) -> Tensor:
    return tensor
