"""An objective: a weighted sum of losses, computed from logits or from hidden states and a head."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .config import KEY, ConfigError, CVLossConfig
from .engine.compute import Outcome, compute
from .engine.dense import add_dense
from .engine.evaluate import Term
from .engine.sets import SetCounts
from .engine.sources import Head, LinearSource, LogitSource, ModuleSource, TensorSource
from .head import is_linear
from .registry import available_losses
from .rows import IGNORE_INDEX, Filter, Goldfish, Rows, aligned_labels, select_rows
from .vocabulary import NumberTokens, number_tokens, rarity

Count = Tensor | float | None


@dataclass
class ObjectiveResult:
    """What an objective says of a batch.

    loss: scalar, differentiable; the weighted sum of the terms.
    terms: the unweighted mean of each term over its rows, detached.
    nll: mean -log p of the trained rows, in nats, detached; there whatever the terms are.
    n_tokens: number of trained rows.
    counts: for each term, the number of rows its mean is over.
    sets: for each set-level term, the number of sets, and of classes present in them.
    diagnostics: means over the trained rows of ``entropy`` (in nats) and ``accuracy`` (the likeliest token is the
        label), where ``objective.diagnose`` asks for them.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    nll: Tensor
    n_tokens: int
    counts: dict[str, int] = field(default_factory=dict)
    sets: dict[str, SetCounts] = field(default_factory=dict)
    diagnostics: dict[str, Tensor] = field(default_factory=dict)


class Objective:
    """A weighted sum of losses.

    >>> objective = Objective.from_config({"cross_entropy": 0.6, "lovasz": 0.4})
    >>> result = objective.from_logits(logits, labels)
    >>> result.loss.backward()
    """

    def __init__(self, config: CVLossConfig) -> None:
        self.config = config
        self.diagnose = False  # entropy and accuracy in the results, for hosts that log them
        self.label_counts: Tensor | None = None
        losses = available_losses()
        self.terms: list[Term] = []
        self.filters: dict[str, Filter] = {}
        for term in config.terms:
            same = sum(t.loss.name == term.loss for t in self.terms)
            name = f"{term.loss}_{same + 1}" if same else term.loss
            per = "global" if term.reduce == "global" else term.per
            scope: str = term.scope
            if term.goldfish is not None:
                fish = Goldfish(term.goldfish.k, term.goldfish.h)
                self.filters[str(fish)] = fish
                scope += f"/{fish}"
            if losses[term.loss].family == "number":
                scope += f"/{_number_filter(term.parameters)}"
            self.terms.append(Term(name, losses[term.loss], term.weight, scope, per, term.parameters, term.schedules))
        self.advance(0.0)
        self.scopes = tuple(dict.fromkeys(["completion", *(term.scope for term in self.terms)]))

    @classmethod
    def from_config(cls, config: Any, *, tokenizer: Any = None, label_counts: Tensor | None = None) -> "Objective":
        """An objective from any spelling of the ``cv_loss`` key.

        Args:
            config: What would stand behind the key.
            tokenizer: Says which tokens are numbers, for losses that need to know.
            label_counts: (V,), how often each token is a label in the training set, for losses that need to know.

        Raises:
            ConfigError: A ValueError that names the key, what was wrong, and what is allowed.
        """
        objective = cls(CVLossConfig.parse(config))
        if tokenizer is not None:
            objective.take_tokenizer(tokenizer)
        objective.label_counts = label_counts
        return objective

    def take_tokenizer(self, tokenizer: Any) -> None:
        """Learn which tokens are numbers.

        Raises:
            ConfigError: The vocabulary has none of those that a loss wants.
        """
        for term in self.terms:
            if term.loss.family == "number":
                found = number_tokens(tokenizer, term.parameters["max_digits"])
                if not found:
                    raise ConfigError(
                        f"{KEY}.{term.loss.name}.max_digits: the vocabulary has no token that is a number of at most "
                        f"{term.parameters['max_digits']} digits"
                    )
                term.numbers = numbers = NumberTokens(tuple(found), tuple(found.values()))
                self.filters[_number_filter(term.parameters)] = numbers

    @property
    def needs_tokenizer(self) -> bool:
        return any(term.loss.family == "number" and term.numbers is None for term in self.terms)

    @property
    def needs_label_counts(self) -> bool:
        return self.label_counts is None and any("rarity" in term.loss.statistics for term in self.terms)

    def select_rows(self, labels: Tensor, **inputs: Any) -> Rows:
        """The rows that the terms look at; keywords as those of ``rows.select_rows``.

        Raises:
            ValueError: A term needs a tokenizer or label counts that the objective has not got.
        """
        if self.needs_tokenizer or self.needs_label_counts:
            what = "tokenizer" if self.needs_tokenizer else "label_counts"
            raise ValueError(f"{KEY}: {self} needs to know more; use Objective.from_config(..., {what}={what})")
        return select_rows(labels, scopes=self.scopes, filters=self.filters, **inputs)

    def advance(self, progress: float) -> None:
        """Set weights and parameters that follow a schedule to their values after a fraction of training, 0 to 1."""
        for term in self.terms:
            term.advance(progress)

    def __str__(self) -> str:
        def weight(term: Term) -> str:
            schedule = term.schedules.get("weight")
            return f"{term.weight:g}" if schedule is None else str(schedule)

        return " + ".join(f"{weight(term)} {term.name}" for term in self.terms) + (
            " (the paper's code)" if self.config.reference else ""
        )

    def __repr__(self) -> str:
        return f"Objective({self.config.dump()})"

    def from_logits(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        shift: bool = True,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        example_weights: Tensor | None = None,
        num_items_in_batch: Count | Mapping[str, Count] = None,
    ) -> ObjectiveResult:
        """The objective of a batch of logits.

        Args:
            logits: (B, T, V) or (N, V); bf16, fp16 and fp32 are computed in float32, float64 in float64.
            labels: (B, T) or (N,), int64; -100 is ignored.
            shift: Row t predicts label t + 1 (the causal convention); False: labels are aligned with rows.
            position_ids: (B, T); tell packed documents apart, as they restart at each.
            attention_mask: (B, T); 0 is padding; only ``scope: sequence`` and numbered documents need it.
            input_ids: (B, T); only ``scope: sequence`` and goldfish need them.
            example_weights: (B,), or (B, T) where a row has several documents; the values of an example's rows, or of
                its sets, are multiplied by them. What they are divided by stays the number of rows. The NLL is not
                weighted.
            num_items_in_batch: What sums over rows are divided by, where accumulated micro-batches make one step:
                the trained tokens of all of them. A mapping gives a count for each scope. None: the rows given.

        Raises:
            IndexError: A label is outside the vocabulary.
            ValueError: Shapes do not fit, or input_ids are missing.
        """
        _check_shapes("logits", "V", logits, labels)
        labels = labels.to(logits.device)
        rows = self.select_rows(
            labels,
            shift=shift,
            position_ids=position_ids,
            attention_mask=attention_mask,
            input_ids=input_ids,
            example_weights=example_weights,
        )
        if self.config.reference:
            return self._reference(logits, labels, shift, rows, num_items_in_batch)
        return self._compute(TensorSource(logits, rows.index), rows, num_items_in_batch)

    def from_hidden(
        self,
        hidden_states: Tensor,
        head: Tensor | nn.Module | Head,
        labels: Tensor,
        *,
        shift: bool = True,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        example_weights: Tensor | None = None,
        num_items_in_batch: Count | Mapping[str, Count] = None,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> ObjectiveResult:
        """The objective of hidden states under a head, without keeping the logits.

        The logits are ``head(hidden_states) * scale``, then ``softcap * tanh(logits / softcap)`` where a softcap is
        given.

        Args:
            hidden_states: (B, T, H) or (N, H).
            head: The weight (V, H), or the module. The weight of a plain ``nn.Linear`` is read; any other module is
                called, so that adapters and quantised weights are honoured.
            labels: (B, T) or (N,); for this and the rest see ``from_logits``.
            scale: What the logits are multiplied by.
            softcap: Bound of the logits.
        """
        _check_shapes("hidden_states", "H", hidden_states, labels)
        if self.config.needs_logits:
            which = "the paper's code" if self.config.reference else "a term of the family dense"
            raise ValueError(f"cv_loss: {which} needs logits; use from_logits")
        labels = labels.to(hidden_states.device)
        rows = self.select_rows(
            labels,
            shift=shift,
            position_ids=position_ids,
            attention_mask=attention_mask,
            input_ids=input_ids,
            example_weights=example_weights,
        )
        source = _head_source(hidden_states, head, rows.index, scale, softcap)
        return self._compute(source, rows, num_items_in_batch)

    def _compute(
        self, source: LogitSource, rows: Rows, num_items_in_batch: Count | Mapping[str, Count]
    ) -> ObjectiveResult:
        _check_labels(rows.labels, source.vocab_size)
        if rows.weights is not None:
            rows = replace(rows, weights=rows.weights.to(source.dtype))
        counts = {scope: int(mask.sum()) for scope, mask in rows.scopes.items()}
        denominators = _denominators(counts, num_items_in_batch, rows.labels.device)
        dense = [term for term in self.terms if term.loss.family == "dense"]
        others = [term for term in self.terms if term not in dense]
        # With no other term there is still the NLL, which wants no gradient.
        with torch.autocast(rows.labels.device.type, enabled=False):
            with torch.set_grad_enabled(torch.is_grad_enabled() and bool(others)):
                known = {} if self.label_counts is None else {"rarity": rarity(self.label_counts, rows.labels)}
                averaged = num_items_in_batch is None
                outcome = compute(source, others, rows, counts, denominators, averaged, self.diagnose, known)
            if dense:
                outcome = add_dense(outcome, source.tensors[0], dense, rows, counts, denominators)
        return self._result(outcome, counts)

    def _result(self, outcome: Outcome, counts: dict[str, int]) -> ObjectiveResult:
        return ObjectiveResult(
            loss=outcome.loss,
            terms={term.name: outcome.means[term.name] for term in self.terms},
            nll=outcome.nll,
            n_tokens=counts["completion"],
            counts={term.name: counts[term.scope] for term in self.terms},
            sets=outcome.sets,
            diagnostics=outcome.diagnostics,
        )

    def _reference(
        self,
        logits: Tensor,
        labels: Tensor,
        shift: bool,
        rows: Rows,
        num_items_in_batch: Count | Mapping[str, Count],
    ) -> ObjectiveResult:
        """The paper's code: dense losses on (B, T, V), masked rows and all.

        Its training step cuts off the columns before the first trained token of the batch; so does this for
        unaligned labels.
        """
        _check_labels(rows.labels, logits.shape[-1])
        counts = {scope: int(mask.sum()) for scope, mask in rows.scopes.items()}
        denominators = _denominators(counts, num_items_in_batch, rows.labels.device)
        logits = logits if logits.dim() == 3 else logits[None]
        if logits.dtype != torch.float64:
            logits = logits.float()
        aligned = aligned_labels(labels, shift)
        everything = aligned.new_full((aligned.numel(),), IGNORE_INDEX)
        everything[rows.index] = rows.labels
        targets = {"completion": aligned, "sequence": everything.view_as(aligned)}
        # The NLL and what else is reported beside the terms.
        source = TensorSource(logits.detach(), rows.index)
        outcome = compute(source, [], rows, counts, denominators, diagnose=self.diagnose)
        if not counts["completion"]:
            loss = logits.flatten()[:0].sum()
            return self._result(replace(outcome, loss=loss, means={t.name: loss.detach() for t in self.terms}), counts)
        loss, means = logits.new_zeros(()), {}
        for term in self.terms:
            target = targets[term.scope]
            first = int((target != IGNORE_INDEX).any(0).nonzero()[0]) if shift else 0
            reference = term.loss.reference
            assert reference is not None
            known = {k: v for k, v in term.parameters.items() if k in inspect.signature(reference).parameters}
            value = reference(logits[:, first:], target[:, first:], **known)
            means[term.name] = value.detach()
            loss = loss + term.weight * value * counts[term.scope] / denominators[term.scope]
        return self._result(replace(outcome, loss=loss, means=means), counts)


def _number_filter(parameters: Mapping[str, Any]) -> str:
    return f"numbers of {parameters['max_digits']} digits"


def _check_shapes(name: str, last: str, tensor: Tensor, labels: Tensor) -> None:
    if tensor.shape[:-1] != labels.shape:
        raise ValueError(
            f"{name} {tuple(tensor.shape)} and labels {tuple(labels.shape)} do not fit; "
            f"expected (B, T, {last}) and (B, T), or (N, {last}) and (N,)"
        )


def _check_labels(labels: Tensor, vocab_size: int) -> None:
    """Raise for a label that is no column of the logits, and name it."""
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= vocab_size):
        wrong = labels[(labels < 0) | (labels >= vocab_size)]
        raise IndexError(
            f"label {int(wrong[0])} is outside the vocabulary: allowed are 0 to {vocab_size - 1}, and -100 for "
            "rows to ignore"
        )


def _denominators(
    counts: dict[str, int], num_items_in_batch: Count | Mapping[str, Count], device: torch.device
) -> dict[str, Tensor | float]:
    """What the sum over the rows of each scope is divided by.

    Where only the trained tokens of the step are known, a micro-batch's mean over another scope counts by its share
    of the trained tokens.
    """
    if num_items_in_batch is None:
        return {scope: float(max(1, count)) for scope, count in counts.items()}
    if not isinstance(num_items_in_batch, Mapping):
        num_items_in_batch = {"completion": num_items_in_batch}
    given = {scope: _at_least_one(count, device) for scope, count in num_items_in_batch.items() if count is not None}
    share = given.get("completion", 1.0) / max(counts["completion"], 1e-30)
    return {scope: given.get(scope, max(1, count) * share) for scope, count in counts.items()}


def _head_source(
    hidden_states: Tensor, head: Tensor | nn.Module | Head, index: Tensor, scale: float, softcap: float | None
) -> LogitSource:
    weight, bias = head, None
    if not isinstance(head, Tensor):
        if isinstance(head, nn.Module):
            head = Head(head, head)
        module = head.module
        if not is_linear(module):
            parameters = [p for p in module.parameters() if p.requires_grad]
            return ModuleSource(hidden_states, head.forward, parameters, index, scale, softcap)
        weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    assert not isinstance(bias, nn.Module)
    device = hidden_states.device.type
    compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return LinearSource(hidden_states, weight, bias, index, scale, softcap, compute_dtype)


def _at_least_one(count: Tensor | float, device: torch.device) -> Tensor | float:
    """A step whose rows are all masked has a count of 0, and a sum of 0 to divide by it."""
    if not isinstance(count, Tensor):
        return max(1, count)
    if count.numel() != 1:
        raise ValueError(f"num_items_in_batch: one number is expected, not a tensor of shape {tuple(count.shape)}")
    return count.to(device).reshape(()).clamp(min=1)
