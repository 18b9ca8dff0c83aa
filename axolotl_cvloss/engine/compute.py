"""The engine: collect statistics chunk by chunk, evaluate the terms, pull the gradient back chunk by chunk.

Terms of one row each (families token, row and number) are evaluated and pulled back as soon as a chunk of logits is
there. Set-level terms need the statistics of the whole batch first, so the logits are visited twice; the last chunk of
the first visit is still at hand for the second. Where only hidden states want a gradient (a frozen head), p times the
head's weight is kept from the first visit, and the second needs no logits at all.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..rows import Rows
from . import ranks
from .entries import Entries, collect_entries
from .evaluate import Term, row_values, set_values
from .gradient import LogitGradient, softmax_
from .sets import SetCounts, Sets, Window
from .sources import LogitSource

CHUNK_BYTES = {"cpu": 72 << 20}  # of logits at a time
CHUNK_BYTES_ELSEWHERE = 256 << 20

Group = tuple[str, str]  # scope, per


@dataclass
class Outcome:
    """``loss`` is the weighted sum; ``means`` has for each term its mean over the rows (or sets) of its scope.

    ``diagnostics`` has the means of entropy and accuracy over the trained rows, where they were asked for.
    """

    loss: Tensor
    means: dict[str, Tensor]
    nll: Tensor
    sets: dict[str, SetCounts] = field(default_factory=dict)
    diagnostics: dict[str, Tensor] = field(default_factory=dict)


def compute(
    source: LogitSource,
    terms: Sequence[Term],
    rows: Rows,
    counts: dict[str, int],
    denominators: dict[str, Tensor | float],
    averaged: bool = False,
    diagnose: bool = False,
    known: Mapping[str, Tensor] | None = None,
) -> Outcome:
    """Value and gradient of the terms on the rows of a source; the loss is differentiable in ``source.tensors``.

    Args:
        counts: Number of rows of each scope.
        denominators: What the sum over the rows of a scope is divided by.
        averaged: These are the rows of one process, and the gradients of all processes will be averaged, not summed.
        diagnose: Also the entropy and the accuracy, which read all logits twice more.
        known: Statistics that do not come from the logits, (N,) each.
    """
    pass_ = _Pass(source, terms, rows, denominators, averaged, diagnose, known or {})
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in source.tensors]
    loss = _Engine.apply(pass_, wanted, *source.tensors) if any(wanted) else pass_.run(wanted)
    means = {t.name: pass_.sums[t.name] / max(1, counts[t.scope]) for t in terms}
    trained = {
        name: torch.where(rows.scopes["completion"], values, 0).sum() / max(1, counts["completion"])
        for name, values in {"logp": pass_.logp, **pass_.diagnostics}.items()
    }
    nll = -trained.pop("logp")
    sets = {t.name: pass_.groups[t.scope, t.per].counted() for t in pass_.set_terms}
    return Outcome(loss, means, nll, sets, trained)


def chunks_of(n: int, most: int) -> list[slice]:
    """As few as can be of at most so many rows, and of equal size: a small one at the end reads the whole head too."""
    size = -(-n // max(1, -(-n // most)))
    return [slice(i, min(i + size, n)) for i in range(0, n, size or 1)]


def sets_of(rows: Rows, scope: str, per: str, vocab_size: int) -> Sets:
    """The sets of a scope: its documents, or all its rows at once, here or on all processes."""
    members = rows.scopes[scope].nonzero().squeeze(1)
    documents = rows.documents[members]
    numbers = documents if per == "document" else torch.zeros_like(documents)
    return Sets(rows.labels, members, numbers, vocab_size, joint=per == "global", weights=rows.weights)


class _Engine(torch.autograd.Function):
    """Forms the gradient in the forward pass, where the logits are at hand, and scales it in the backward pass."""

    @staticmethod
    def forward(ctx: Any, pass_: "_Pass", wanted: Sequence[bool], *tensors: Tensor) -> Tensor:
        # Our own graphs are used up in here; hooks of the caller, such as those of a checkpoint, must not see them.
        with torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
            loss = pass_.run(wanted)
        ctx.gradients = pass_.source.gradients()
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        if torch.is_grad_enabled():  # create_graph=True; the gradients below would pass for constants
            raise RuntimeError("cv_loss objectives have no second derivatives; backward with create_graph=True")
        if ctx.gradients is None:
            raise RuntimeError("backward of a cv_loss objective was called twice; compute the objective anew instead")
        gradients, ctx.gradients = ctx.gradients, None
        if grad_output.device.type != "cpu" or grad_output != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_output)
        return None, None, *(g if g is None else g.to(t) for g, t in zip(gradients, ctx.dtypes, strict=True))


class _Pass:
    """One evaluation of an objective on one batch."""

    def __init__(
        self,
        source: LogitSource,
        terms: Sequence[Term],
        rows: Rows,
        denominators: dict[str, Tensor | float],
        averaged: bool,
        diagnose: bool,
        known: Mapping[str, Tensor],
    ) -> None:
        self.source, self.rows, self.denominators, self.averaged = source, rows, denominators, averaged
        self.token_terms = [t for t in terms if t.loss.family == "token"]
        self.row_terms = [t for t in terms if t.loss.family == "row"]
        self.number_terms = [t for t in terms if t.loss.family == "number"]
        self.set_terms = [t for t in terms if t.loss.family not in ("token", "row", "number")]
        n, device = len(rows.labels), rows.labels.device
        budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES_ELSEWHERE)
        self.chunks = chunks_of(n, max(1, budget // (source.vocab_size * source.dtype.itemsize)))
        # The mean of the logits only where a term needs it: it reads all of them once more.
        names = ["logp", "lse", *(["mean_logit"] if any(t.needs("mean_logit") for t in self.token_terms) else [])]
        self.statistics = {name: torch.zeros(n, dtype=source.dtype, device=device) for name in names}
        self.statistics.update({name: values.to(source.dtype) for name, values in known.items()})
        self.logp, self.lse = self.statistics["logp"], self.statistics["lse"]
        self.number_gradients: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by the first row of a chunk
        self.diagnostics = {name: torch.zeros_like(self.logp) for name in ("entropy", "accuracy") if diagnose}
        self.loss = self.logp.new_zeros(())
        self.sums = {t.name: self.logp.new_zeros(()) for t in terms}  # unweighted
        groups = sorted({(t.scope, t.per) for t in self.set_terms})  # in one order on all processes
        self.groups = {group: sets_of(rows, *group, source.vocab_size) for group in groups}
        self.windows = {g: [sets.window(chunk) for chunk in self.chunks] for g, sets in self.groups.items()}
        self.predicted = {
            group: torch.zeros(len(self.groups[group].labelled), dtype=source.dtype, device=device)
            for group in {(t.scope, t.per) for t in self.set_terms if t.loss.family == "region"}
        }
        self.entries: dict[str, Entries] = {}

    def run(self, wanted: Sequence[bool]) -> Tensor:
        """The loss; ``source.gradients()`` has its gradients then, where any are wanted."""
        self.gradient = gradient = any(wanted)
        if gradient:
            self.source.start(wanted)
        if not self.set_terms:
            for chunk in self.chunks:
                p, dense = self._visit(chunk, gradient)
                cotangents = self._token_terms(chunk, gradient)
                if gradient:
                    self._pull(chunk, p, cotangents, [], dense)
            return self.loss
        mixes = gradient and self.source.mixes and not self.row_terms
        kept: dict[int, Tensor] = {}
        for number, chunk in enumerate(self.chunks):
            p, _ = self._visit(chunk, gradient=False)
            if gradient and not mixes and (number == len(self.chunks) - 1 or self.source.keeps(chunk)):
                kept[number] = p
            self._add_class_sums(number, p)
            if mixes:
                self.source.mix(chunk, p.scatter_(1, self.rows.labels[chunk, None], 0))
        for term in self.set_terms:
            if term.loss.family == "ranking":
                group = term.scope, term.per
                tolerance = term.parameters.get("tolerance", 0.0)
                self.entries[term.name] = collect_entries(
                    self.groups[group], self.logp, tolerance, self.windows[group], self._p_at
                )
        for group, sums in self.predicted.items():
            if self.groups[group].joint:
                self.predicted[group] = ranks.sum_over(sums)
        grads = self._evaluate(gradient)
        if not gradient:
            return self.loss
        for number, chunk in reversed(list(enumerate(self.chunks))):
            again, dense = kept.pop(number, None), None
            if not mixes and (again is None or self.row_terms):
                again, dense = self._visit(chunk, gradient=True, again=True)
            columns = self._columns(number, again, grads)
            cotangents = {name: grads[name][chunk] for name in self.statistics}
            self._pull(chunk, again, cotangents, columns, dense)
        return self.loss

    def _visit(self, chunk: slice, gradient: bool, again: bool = False) -> tuple[Tensor, Tensor | None]:
        """p of a chunk, its statistics put down, and the gradient of the row terms, whose values are added."""
        logits, labels = self.source.logits(chunk), self.rows.labels[chunk]
        dense = None
        if self.row_terms:
            leaf = logits.detach().requires_grad_(gradient)
            with torch.set_grad_enabled(gradient):
                total = self._row_sum(self.row_terms, chunk, {"logits": leaf, "labels": labels}, add=not again)
            if gradient:
                (dense,) = torch.autograd.grad(total, leaf)
            if not again:
                self.loss += total.detach()
        if again:
            return torch.softmax(logits, 1, out=logits), dense
        if self.number_terms:
            self._number_terms(chunk, logits)
        if "mean_logit" in self.statistics:
            self.statistics["mean_logit"][chunk] = logits.mean(1)
        target = logits.gather(1, labels[:, None]).squeeze(1)
        kept = logits.clone() if self.diagnostics else logits
        p, lse = softmax_(logits)
        if self.diagnostics:
            # -sum p log p is lse - sum p z, which takes a quarter of the time.
            self.diagnostics["entropy"][chunk] = lse - torch.einsum("nv,nv->n", p, kept)
            self.diagnostics["accuracy"][chunk] = (kept.argmax(1) == labels).to(lse.dtype)
        self.lse[chunk] = lse
        self.logp[chunk] = target - lse
        return p, dense

    def _add_class_sums(self, number: int, p: Tensor) -> None:
        for group, sums in self.predicted.items():
            if (window := self.windows[group][number]) is not None:
                sums[window.pairs] += window.sums(p[:, window.columns])

    def _p_at(self, number: int, window: Window) -> Tensor:
        """p at the columns of a window, without the logits of all."""
        chunk = self.chunks[number]
        return self.source.columns(chunk, window.columns).sub_(self.lse[chunk, None]).exp_()

    # Evaluation: values of terms, and cotangents of statistics

    def _token_terms(self, chunk: slice, gradient: bool) -> dict[str, Tensor]:
        leaves = {name: x[chunk].detach().requires_grad_(gradient) for name, x in self.statistics.items()}
        with torch.set_grad_enabled(gradient):
            total = self._row_sum(self.token_terms, chunk, leaves)
        self.loss += total.detach()
        return dict(zip(leaves, _cotangents(total, leaves.values()), strict=True))

    def _number_terms(self, chunk: slice, logits: Tensor) -> None:
        """Terms of the logits at number tokens, with their gradient: a few columns, kept until they are pulled back."""
        labels, found = self.rows.labels[chunk], []
        for term in self.number_terms:
            assert term.numbers is not None
            tokens, values = term.numbers.tensors(self.logp)
            here = tokens < logits.shape[1]
            tokens, values = tokens[here], values[here]
            # Any value where the target is no number: such rows are not of the term's scope.
            target = values[torch.searchsorted(tokens, labels).clamp_max(len(tokens) - 1)]
            leaf = logits[:, tokens].requires_grad_(self.gradient)
            with torch.set_grad_enabled(self.gradient):
                statistics = {"number_logits": leaf, "values": values, "target": target}
                total = self._row_sum([term], chunk, statistics)
            self.loss += total.detach()
            if self.gradient:
                found.append((tokens, _cotangents(total, [leaf])[0]))
        self.number_gradients[chunk.start] = found

    def _evaluate(self, gradient: bool) -> dict[Any, Tensor]:
        """The token and set-level terms of the whole batch; cotangents by statistic, group and term."""
        named: dict[Any, Tensor] = {**self.statistics, **self.predicted}
        named.update({name: entries.values for name, entries in self.entries.items()})
        for leaf in named.values():
            leaf.requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            total = self._row_sum(self.token_terms, slice(0, len(self.logp)), self.statistics)
            self.loss += total.detach()
            for term in self.set_terms:
                group = term.scope, term.per
                sets = self.groups[group]
                if not len(sets):
                    continue
                values = set_values(term, sets, self.logp, self.predicted.get(group), self.entries.get(term.name))
                denominator = self.denominators[term.scope]
                # The gradient of the rows here is that of the whole set, also where other processes hold parts of it;
                # of its value each process reports its share.
                here = (values.detach() * sets.parts).sum()
                self.sums[term.name] += here
                self.loss += term.weight * here / denominator
                rows = sets.parts * ranks.world_size() if sets.joint and self.averaged else sets.sizes
                total = total + term.weight * (values * rows).sum() / denominator
        grads = _cotangents(total, named.values())
        for leaf in named.values():
            leaf.requires_grad_(False)
        return dict(zip(named, grads, strict=True))

    def _row_sum(self, terms: Sequence[Term], chunk: slice, statistics: dict[str, Tensor], add: bool = True) -> Tensor:
        """The weighted terms of the rows of a chunk; ``add`` them to the sums that are reported."""
        total = self.logp.new_zeros(())
        weights = None if self.rows.weights is None else self.rows.weights[chunk].to(total.dtype)
        for term in terms:
            value = row_values(term, self.rows.scopes[term.scope][chunk], weights, **statistics).sum()
            if add:
                self.sums[term.name] += value.detach()
            total = total + term.weight * value / self.denominators[term.scope]
        return total

    # Pulling back

    def _columns(self, number: int, p: Tensor | None, grads: dict[Any, Tensor]) -> list[tuple[Window, Tensor]]:
        """For each group of sets the window of a chunk, and p times its cotangent at the window's columns."""
        found = []
        for group, windows in self.windows.items():
            window = windows[number]
            ranking = [t.name for t in self.set_terms if t.name in self.entries and (t.scope, t.per) == group]
            if window is None or (group not in self.predicted and not ranking):
                continue
            weighted = self._p_at(number, window) if p is None else p[:, window.columns]
            if group in self.predicted:
                cotangent = window.lookup(grads[group], 0)[window.row_set]
            else:
                cotangent = torch.zeros_like(weighted)
            for name in ranking:
                entries, part = self.entries[name], self.entries[name].chunks[number]
                at = entries.rows[part], entries.columns[part]
                cotangent.index_put_(at, grads[name][part], accumulate=True)
            found.append((window, weighted.mul_(cotangent)))
        return found

    def _pull(
        self,
        chunk: slice,
        p: Tensor | None,
        cotangents: dict[str, Tensor],
        columns: list[tuple[Window, Tensor]],
        dense: Tensor | None,
    ) -> None:
        labels, logp = self.rows.labels[chunk], self.logp[chunk]
        gradient = LogitGradient.build(p, logp, labels, cotangents, columns, dense)
        gradient.columns.extend(self.number_gradients.pop(chunk.start, []))
        self.source.pull(chunk, gradient)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _cotangents(total: Tensor, leaves: Iterable[Tensor]) -> list[Tensor]:
    """The gradient of a total for each of its leaves, zeros where it does not depend on one."""
    leaves = list(leaves)
    if not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
