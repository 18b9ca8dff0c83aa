"""What a trainer logs of an objective, by name: means of its terms over micro-batches, steps and processes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.sets import SetCounts
from ..engine.terms import Term
from ..objective.objective import ObjectiveResult
from .sums import Sums, Weighed


class Logs:
    """Of the micro-batches of one process since the last call of ``taken``, either of training or of evaluation."""

    def __init__(self, terms: Sequence[Term], training: bool) -> None:
        self.terms, self.training = terms, training
        self.scale = 1.0  # of what documents count by: makes their mean in a step 1
        self._sums = Sums(len(terms) + 2)  # the NLL, and what the model adds
        self._weighed = Weighed()
        self._gradients: Tensor | None = None  # of the terms, in the last micro-batch of a step that is logged

    @property
    def waiting(self) -> int:
        """Micro-batches whose values have not been fetched from the accelerator."""
        return self._sums.waiting

    def add(self, step: int, result: ObjectiveResult, counts: Sequence[Tensor | float] | None = None) -> None:
        """Of one micro-batch. ``counts`` has for each term, and the NLL, what its mean over a step is divided by."""
        names = [term.name for term in self.terms]
        rows: list[float] = [*(result.counts[name] for name in names), result.n_tokens]
        values = [*(result.terms[name] for name in names), result.nll]
        masses = [*(result.masses[name] for name in names), result.n_tokens]
        weights: list[Any] = list(masses)
        if counts is not None:
            # Of the mean over the rows of a step, this is what the rows of this micro-batch make.
            device = result.nll.device
            weights = [n / torch.as_tensor(count, device=device) for n, count in zip(masses, counts, strict=True)]
        if result.aux_loss is not None:
            rows, masses = [*rows, result.n_tokens], [*masses, result.n_tokens]
            values = [*values, result.aux_loss.to(result.nll.device)]
            weights = [*weights, 1.0 if self.training else result.n_tokens]  # it is a part of the mean already
        sets = [result.sets.get(name, SetCounts(0, 0)) for name in names]
        numbers = torch.zeros(4, len(names) + 2, dtype=torch.float64)
        numbers[0, : len(rows)], numbers[3, : len(rows)] = torch.tensor(rows), torch.tensor(masses)
        numbers[1:3, : len(sets)] = torch.tensor([[s.sets for s in sets], [s.classes for s in sets]])
        if self.training and result.document_weights is not None:
            self._weighed.add(result.document_weights * self.scale)
        weighted = torch.stack([value.detach() * weight for value, weight in zip(values, weights, strict=True)])
        self._sums.add(step, weighted, numbers)
        if result.gradients:
            self._gradients = torch.stack([result.gradients[name] for name in names])

    def fold(self) -> list[tuple[int, Tensor]]:
        """Fetch what waits. The step and the values of each micro-batch of which some are not finite."""
        return self._sums.fold()

    def lost(self, values: Tensor) -> bool:
        """Whether a term of a micro-batch is NaN, and with it the objective."""
        return bool(values[: len(self.terms)].isnan().any())

    def told(self, values: Tensor) -> tuple[str, str]:
        """What of a micro-batch is not finite, and why that may be."""
        finite = values.isfinite().tolist()
        names = [*(term.name for term in self.terms), "nll", "aux_loss"]
        bad = ", ".join(name for name, is_finite in zip(names, finite, strict=False) if not is_finite)
        if finite[len(self.terms)] and not all(finite[: len(self.terms)]):
            return bad, (
                "The NLL there is finite, so it is not the model but the loss: its formula at probabilities near 0 "
                "or 1 or at logits of -inf, or its parameters."
            )
        return bad, (
            "The logits there hold NaN or infinite values; a lower learning rate or max_grad_norm helps where "
            "training diverged."
        )

    def taken(self, gathered: Callable[[Tensor], Tensor], progress: float) -> dict[str, float]:
        """What is logged of all that was folded, by name; it begins anew.

        ``gathered`` makes (P, N) of all processes from (1, N) of each.

        ``cv_loss/nll`` and ``cv_loss/TERM`` are means over the rows of a step and then over steps, as Trainer's own
        ``loss`` is; so in training ``loss`` is the weighted sum of the terms (``eval_loss`` is a mean over examples of
        the means of their batches). ``cv_loss/aux_loss`` is what a model adds of its own, as it is in ``loss``.
        ``cv_loss/TERM/share`` is the norm of the weighted term's gradient in the logits over the sum of these norms, on
        a sample of the rows of the last micro-batch; of an objective with several terms, where steps are logged.
        ``cv_loss/TERM/tokens`` is the number of rows of a step, ``.../sets`` that of sets, ``.../classes`` that of
        classes present in a set. ``cv_loss/examples/`` has the smallest and the largest of what documents count by,
        where their mean is 1, and their effective number in a step, (sum w)^2 / sum w^2. An evaluation is one step, and
        nothing is logged of one without a trained row on any rank.
        """
        terms = self.terms
        # Of one shape on all ranks, whatever they have seen.
        squares = torch.zeros(len(terms), dtype=torch.float64)
        if self._gradients is not None:
            squares, self._gradients = self._gradients.cpu().double().square(), None
        every = gathered(torch.cat([self._sums.taken(), self._weighed.taken(), squares])[None])
        every, weighed, squares = every.split([every.shape[1] - 4 - len(terms), 4, len(terms)], 1)
        norms = squares.sum(0).sqrt()
        steps, sums = int(every[:, -1].max()) if self.training else 1, every[:, :-1].sum(0).view(5, len(terms) + 2)
        if not steps or (not self.training and not sums[1].any()):
            return {}
        means = (sums[0] / (steps if self.training else sums[4].clamp_min(1))).tolist()
        rows, sets, classes = (sums[1:4] / steps).tolist()
        logs = {f"cv_loss/{term.name}": mean for term, mean in zip(terms, means, strict=False)}
        logs["cv_loss/nll"] = means[-2]
        if rows[-1]:
            logs["cv_loss/aux_loss"] = means[-1]
        total, squares = weighed[:, 2:].sum(0)
        if float(squares):
            logs["cv_loss/examples/smallest"] = float(weighed[:, 0].min())
            logs["cv_loss/examples/largest"] = float(weighed[:, 1].max())
            logs["cv_loss/examples/effective"] = float(total**2 / squares) / steps
        for number, term in enumerate(terms):
            if float(norms.sum()):
                logs[f"cv_loss/{term.name}/share"] = float(norms[number] / norms.sum())
            logs[f"cv_loss/{term.name}/tokens"] = rows[number]
            if sets[number]:
                logs[f"cv_loss/{term.name}/sets"] = sets[number]
                logs[f"cv_loss/{term.name}/classes"] = classes[number] / sets[number]
            now = term.at(progress)
            for name in term.schedules if self.training else ():
                logs[f"cv_loss/{term.name}/{name}"] = now.weight if name == "weight" else now.parameters[name]
        return logs
