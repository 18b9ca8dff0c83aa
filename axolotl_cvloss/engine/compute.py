"""The engine: collect statistics chunk by chunk, evaluate the terms, pull the gradient back chunk by chunk.

Terms of one row each (families token and row) are evaluated and pulled back as soon as a chunk of logits is there.
Set-level terms need the statistics of the whole batch first, so the logits are visited twice; the last chunk of the
first visit is still at hand for the second. Where only hidden states want a gradient (a frozen head), p times the
head's weight is kept from the first visit, and the second needs no logits at all.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..rows import Rows
from .evaluate import Entries, Term, row_values, set_values
from .sets import Sets, Window
from .sources import LogitSource

CHUNK_BYTES = {"cpu": 64 << 20}  # of logits at a time
CHUNK_BYTES_ELSEWHERE = 256 << 20

Group = tuple[str, str]  # scope, per


@dataclass
class Outcome:
    """``loss`` is the weighted sum; ``means`` has for each term its mean over the rows (or sets) of its scope."""

    loss: Tensor
    means: dict[str, Tensor]
    nll: Tensor


def compute(
    source: LogitSource,
    terms: Sequence[Term],
    rows: Rows,
    counts: dict[str, int],
    denominators: dict[str, Tensor | float],
    chunk_rows: int | None = None,
) -> Outcome:
    """Value and gradient of the terms on the rows of a source; the loss is differentiable in ``source.tensors``.

    Args:
        counts: Number of rows of each scope.
        denominators: What the sum over the rows of a scope is divided by.
    """
    pass_ = _Pass(source, terms, rows, counts, denominators, chunk_rows)
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in source.tensors]
    if any(wanted):
        loss = _Engine.apply(pass_, wanted, *source.tensors)
    else:
        loss, _ = pass_.run(wanted)
    return Outcome(loss, pass_.means(), pass_.nll())


class _Engine(torch.autograd.Function):
    """Forms the gradient in the forward pass, where the logits are at hand, and scales it in the backward pass."""

    @staticmethod
    def forward(ctx, pass_, wanted, *tensors):  # type: ignore[no-untyped-def]
        loss, ctx.gradients = pass_.run(wanted)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        if ctx.gradients is None:
            raise RuntimeError("backward of a cv_loss objective was called twice; compute the objective anew instead")
        gradients, ctx.gradients = ctx.gradients, None
        if grad_output.device.type != "cpu" or grad_output != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(grad_output)
        return None, None, *gradients


class _Pass:
    """One evaluation of an objective on one batch."""

    def __init__(
        self,
        source: LogitSource,
        terms: Sequence[Term],
        rows: Rows,
        counts: dict[str, int],
        denominators: dict[str, Tensor | float],
        chunk_rows: int | None,
    ) -> None:
        self.source, self.rows, self.counts, self.denominators = source, rows, counts, denominators
        self.token_terms = [t for t in terms if t.loss.family == "token"]
        self.row_terms = [t for t in terms if t.loss.family == "row"]
        self.set_terms = [t for t in terms if t not in self.token_terms and t not in self.row_terms]
        self.terms = terms
        self.sums: dict[str, Tensor] = {}  # by term, detached
        device = rows.labels.device
        if chunk_rows is None:
            budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES_ELSEWHERE)
            chunk_rows = max(1, budget // (source.vocab_size * source.dtype.itemsize))
        n = len(rows.labels)
        self.chunks = [slice(i, min(i + chunk_rows, n)) for i in range(0, n, chunk_rows)]
        # Statistics of the rows; the mean of the logits only where a term needs it, as it reads all of them once more.
        names = ["logp", "lse", *(["mean_logit"] if any(t.needs("mean_logit") for t in self.token_terms) else [])]
        self.statistics = {name: torch.zeros(n, dtype=source.dtype, device=device) for name in names}
        self.logp, self.lse = self.statistics["logp"], self.statistics["lse"]
        self.groups = {group: self._sets(*group) for group in {(t.scope, t.per) for t in self.set_terms}}
        self.windows = {g: [sets.window(chunk) for chunk in self.chunks] for g, sets in self.groups.items()}

    def _sets(self, scope: str, per: str) -> Sets:
        members = self.rows.scopes[scope].nonzero().squeeze(1)
        documents = self.rows.documents[members]
        numbers = documents if per == "document" else torch.zeros_like(documents)
        return Sets(self.rows.labels, members, numbers, self.source.vocab_size)

    # What came out

    def means(self) -> dict[str, Tensor]:
        return {t.name: self.sums[t.name] / max(1, self.counts[t.scope]) for t in self.terms}

    def nll(self) -> Tensor:
        logp = torch.where(self.rows.scopes["completion"], self.logp, 0)
        return -logp.sum() / max(1, self.counts["completion"])

    # The two visits

    def run(self, wanted: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        gradient = any(wanted)
        if gradient:
            self.source.start(wanted)
        loss = self.logp.new_zeros(())
        for term in self.terms:
            self.sums[term.name] = self.logp.new_zeros(())
        one_visit = not self.set_terms
        mixes = gradient and not one_visit and not self.row_terms and self.source.mixes
        predicted = {
            group: torch.zeros(len(sets.labelled), dtype=self.logp.dtype, device=self.logp.device)
            for group, sets in self.groups.items()
            if any(t.loss.family == "region" and (t.scope, t.per) == group for t in self.set_terms)
        }
        exp, scale = self.logp, self.logp  # of the last chunk
        for number, chunk in enumerate(self.chunks):
            logits = self.source.logits(chunk)
            loss_, row_gradient = self._row_terms(logits, chunk, gradient and one_visit)
            loss = loss + loss_
            exp, scale = self._softmax(logits, chunk)
            for group, sums in predicted.items():
                if (window := self.windows[group][number]) is not None:
                    sums[window.pairs] += window.sums(_p_of(exp, scale, window))
            if mixes:
                self.source.mix(chunk, exp, scale)
            if one_visit:
                loss_, cotangents = self._token_terms(chunk, gradient)
                loss = loss + loss_
                if gradient:
                    self._pull(chunk, exp, scale, cotangents, [], row_gradient)
        if one_visit:
            return loss, self.source.gradients() if gradient else [None] * len(wanted)

        entries = {t.name: self._collect_entries(t) for t in self.set_terms if t.loss.family == "ranking"}
        with torch.set_grad_enabled(gradient):
            leaves = [*self.statistics.values(), *predicted.values(), *(e.values for e in entries.values())]
            for leaf in leaves:
                leaf.requires_grad_(gradient)
            total = self._sum_rows(self.token_terms, slice(0, len(self.logp)), self.statistics)
            total = total + self._set_terms(predicted, entries)
        loss = loss + total.detach()
        if not gradient:
            return loss, [None] * len(wanted)
        found = iter(_cotangents(total, leaves))
        for leaf in leaves:
            leaf.requires_grad_(False)
        row_grads = {name: next(found) for name in self.statistics}
        region_grads = {group: next(found) for group in predicted}
        entry_grads = {name: next(found) for name in entries}
        def columns(number: int, p: Callable[[Window], Tensor]) -> list[tuple[Tensor, Tensor]]:
            return self._column_gradients(number, p, region_grads, entries, entry_grads)

        for number, chunk in reversed(list(enumerate(self.chunks))):
            cotangents = {name: grad[chunk] for name, grad in row_grads.items()}
            if mixes:
                self._pull_mixed(chunk, cotangents, columns(number, partial(self._p, chunk)))
                continue
            row_gradient = None
            if number != len(self.chunks) - 1 or self.row_terms:
                logits = self.source.logits(chunk)
                _, row_gradient = self._row_terms(logits, chunk, True, add=False)
                exp = logits.sub_(self.lse[chunk, None]).exp_()
                scale = torch.ones_like(self.lse[chunk])
            found_ = columns(number, partial(_p_of, exp, scale))
            self._pull(chunk, exp, scale, cotangents, found_, row_gradient)
        return loss, self.source.gradients()

    def _p(self, chunk: slice, window: Window) -> Tensor:
        """p at the columns of a window, without the logits of all."""
        return self.source.columns(chunk, window.columns).sub_(self.lse[chunk, None]).exp_()

    def _softmax(self, logits: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
        """Keep log p and lse of a chunk; turn its logits, in place, into exp with p = exp * scale[:, None]."""
        if "mean_logit" in self.statistics:
            self.statistics["mean_logit"][chunk] = logits.mean(1)
        target = logits.gather(1, self.rows.labels[chunk, None]).squeeze(1)
        largest = logits.amax(1)
        exp = logits.sub_(largest[:, None]).exp_()
        total = exp.sum(1)
        log_total = total.log()
        self.lse[chunk] = largest + log_total
        self.logp[chunk] = target - largest - log_total
        return exp, total.reciprocal()

    def _pull(
        self,
        chunk: slice,
        exp: Tensor,
        scale: Tensor,
        cotangents: dict[str, Tensor],
        columns: list[tuple[Tensor, Tensor]],
        row_gradient: Tensor | None,
    ) -> None:
        """The gradient of a chunk of logits, in place of exp.

        With a the cotangent of log p, l that of lse, m that of the mean logit and b that of p at some columns:
        dz = a (onehot - p) + l p + m / V + p (b - <b, p>); ``columns`` has p b at those columns.
        """
        gradient = exp.mul_((self._slope(cotangents, columns) * scale)[:, None])
        for index, weighted in columns:
            gradient.index_add_(1, index, weighted)
        gradient.scatter_add_(1, self.rows.labels[chunk, None], cotangents["logp"][:, None])
        if "mean_logit" in cotangents:
            gradient += cotangents["mean_logit"][:, None] / gradient.shape[1]
        if row_gradient is not None:
            gradient += row_gradient
        self.source.pull(chunk, gradient)

    @staticmethod
    def _slope(cotangents: dict[str, Tensor], columns: list[tuple[Tensor, Tensor]]) -> Tensor:
        """What p of a row is multiplied by away from the columns: l - a - <b, p>."""
        slope = cotangents["lse"] - cotangents["logp"]
        for _, weighted in columns:
            slope = slope - weighted.sum(1)
        return slope

    def _column_gradients(
        self,
        number: int,
        p: Callable[[Window], Tensor],
        region_grads: dict[Group, Tensor],
        entries: dict[str, Entries],
        entry_grads: dict[str, Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        """For each group of sets, columns and p b at them, (n, columns), of a chunk."""
        found = []
        for group, sets_windows in self.windows.items():
            window = sets_windows[number]
            chosen = [t.name for t in self.set_terms if t.name in entries and (t.scope, t.per) == group]
            if window is None or (group not in region_grads and not chosen):
                continue
            weighted = p(window)
            if group in region_grads:
                b = window.lookup(region_grads[group], 0)[window.row_set]
            else:
                b = torch.zeros_like(weighted)
            for name in chosen:
                part = entries[name].chunks[number]
                at = entries[name].rows[part], entries[name].columns[part]
                b.index_put_(at, entry_grads[name][part], accumulate=True)
            found.append((window.columns, weighted.mul_(b)))
        return found

    def _pull_mixed(
        self, chunk: slice, cotangents: dict[str, Tensor], columns: list[tuple[Tensor, Tensor]]
    ) -> None:
        """The gradient of a chunk without its logits: away from a few columns it is p times one number a row."""
        columns = [*columns, (self.rows.labels[chunk], cotangents["logp"])]
        self.source.pull_mixed(chunk, self._slope(cotangents, columns[:-1]), columns, cotangents.get("mean_logit"))

    # The terms

    def _row_terms(
        self, logits: Tensor, chunk: slice, gradient: bool, add: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Value and gradient of the row terms on a chunk, by autograd."""
        if not self.row_terms:
            return self.logp.new_zeros(()), None
        leaf = logits.detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            total = self._sum_rows(
                self.row_terms, chunk, {"logits": leaf, "labels": self.rows.labels[chunk]}, add
            )
        return total.detach(), torch.autograd.grad(total, leaf)[0] if gradient else None

    def _token_terms(self, chunk: slice, gradient: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Value of the token terms on a chunk and the cotangents of its statistics."""
        leaves = {name: x[chunk].detach().requires_grad_(gradient) for name, x in self.statistics.items()}
        with torch.set_grad_enabled(gradient):
            total = self._sum_rows(self.token_terms, chunk, leaves)
        if not gradient:
            return total, leaves
        return total.detach(), dict(zip(leaves, _cotangents(total, leaves.values()), strict=True))

    def _sum_rows(
        self, terms: Sequence[Term], chunk: slice, statistics: dict[str, Tensor], add: bool = True
    ) -> Tensor:
        """The weighted terms of the rows of a chunk; ``add`` them to the sums that are reported."""
        total = self.logp.new_zeros(())
        for term in terms:
            value = row_values(term, self.rows.scopes[term.scope][chunk], **statistics).sum()
            if add:
                self.sums[term.name] += value.detach()
            total = total + term.weight * value / self.denominators[term.scope]
        return total

    def _set_terms(self, predicted: dict[Group, Tensor], entries: dict[str, Entries]) -> Tensor:
        total = self.logp.new_zeros(())
        for term in self.set_terms:
            sets = self.groups[term.scope, term.per]
            if not len(sets):
                continue
            values = set_values(term, sets, self.logp, predicted.get((term.scope, term.per)), entries.get(term.name))
            value = (values * sets.sizes).sum()
            self.sums[term.name] += value.detach()
            total = total + term.weight * value / self.denominators[term.scope]
        return total

    def _collect_entries(self, term: Term) -> Entries:
        """The errors of other rows at the present classes that a ranking term can see.

        Past the smallest error among the rows of a class, its Jaccard loss stays 1 and nothing counts any more.
        """
        sets = self.groups[term.scope, term.per]
        own = -self.logp[sets.members].expm1()
        limit = own.new_full((len(sets.labelled),), torch.inf).scatter_reduce(0, sets.row_pair, own, "amin")
        limit.clamp_min_(term.parameters.get("tolerance", 0.0))
        numbers = torch.arange(len(limit), device=limit.device)
        found: list[tuple[Tensor, ...]] = []
        chunks, count = [], 0
        for chunk, window in zip(self.chunks, self.windows[term.scope, term.per], strict=True):
            if window is not None:
                found.append(self._entries(chunk, window, limit, numbers))
            size = len(found[-1][0]) if window is not None else 0
            chunks.append(slice(count, count + size))
            count += size
        empty = numbers[:0]
        parts = [torch.cat(part) for part in zip((self.logp[:0], empty, empty, empty), *found, strict=True)]
        return Entries(parts[0], parts[1], parts[2], parts[3], chunks)

    def _entries(self, chunk: slice, window: Window, limit: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
        p = self._p(chunk, window)
        keep = (p >= window.lookup(limit, torch.inf)[window.row_set]) & (p > 0)
        keep.scatter_(1, window.own_column[:, None], False)
        rows, columns = keep.nonzero(as_tuple=True)
        pairs = window.lookup(numbers, -1)[window.row_set[rows], columns]
        return p[rows, columns], pairs, rows, columns


def _p_of(exp: Tensor, scale: Tensor, window: Window) -> Tensor:
    """p at the columns of a window, from p = exp * scale[:, None]."""
    return exp[:, window.columns].mul_(scale[:, None])


def _cotangents(total: Tensor, leaves: Iterable[Tensor]) -> list[Tensor]:
    """The gradient of a total for each of its leaves, zeros where it does not depend on one."""
    leaves = list(leaves)
    if not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
