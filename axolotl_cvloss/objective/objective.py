"""An objective: a weighted sum of losses, computed from logits or from hidden states and a head."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..engine.batch import Batch
from ..engine.examples import of_all_processes, reweighted, worst
from ..engine.families.paper import as_in_the_paper
from ..engine.passes import Outcome, compute, target_logps
from ..engine.random_state import RandomState
from ..engine.rows import COMPLETION, REFERENCE, Goldfish, Rows, Selector, select_rows
from ..engine.sets import SetCounts
from ..engine.sources import Head, LogitSource, TensorSource, device_of, head_source
from ..engine.terms import Term
from ..engine.views import fused
from ..engine.vocabulary import counted
from ..losses.registry import available_losses
from .config import KEY, ConfigError, CVLossConfig

Count = Tensor | float | None
Counts = Count | Mapping[str | Selector, Count]

SAMPLE = 256  # rows, for the gradients of single terms
POWERS = {"tokens": 0.0, "square_root": 0.5, "examples": 1.0}  # rows of a document with n of them weigh n^-power


@dataclass
class ObjectiveResult:
    """What an objective says of a batch.

    loss: scalar, differentiable; the weighted sum of the terms.
    terms: the unweighted mean of each term over its rows, detached.
    nll: mean -log p of the trained rows, in nats, detached; there whatever the terms are.
    n_tokens: number of trained rows.
    counts: for each term, the number of rows its mean is over.
    masses: for each term, what its mean is divided by: counts, or where ``examples.normalize`` says so, the number of
        documents or the sum of the square roots of their rows.
    mass: the same of the trained rows.
    document_weights: (D,) what each document with trained rows counts by, the sum of their weights, in main memory;
        None unless the key has ``examples``.
    sets: for each set-level term, the number of sets, and of classes present in them.
    diagnostics: means over the trained rows of ``entropy`` (in nats) and ``accuracy`` (the likeliest token is the
        label), where ``objective.diagnose`` asks for them.
    gradients: for each term the norm of the weighted term's gradient in the logits, on a sample of the rows, where that
        was asked for.
    places, logp: of each trained row its place among the B * T rows of logits, in main memory, and its log p, detached;
        None unless the key has ``prune``.
    aux_loss: what an installed model adds of its own (load balancing of experts), as it is added, detached.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    nll: Tensor
    n_tokens: int
    counts: dict[str, int] = field(default_factory=dict)
    masses: dict[str, float] = field(default_factory=dict)
    mass: float = 0.0
    document_weights: Tensor | None = None
    sets: dict[str, SetCounts] = field(default_factory=dict)
    diagnostics: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    places: Tensor | None = None
    logp: Tensor | None = None
    aux_loss: Tensor | None = None


class BatchInputs(TypedDict, total=False):
    """What is known of a batch beside logits and labels. All of it may be left out.

    shift: Row t predicts label t + 1 (the causal convention, the default); False: labels are aligned with rows.
    position_ids: (B, T); tell packed documents apart, as they restart at each.
    attention_mask: (B, T); 0 is padding; only ``scope: sequence`` and numbered documents need it.
    input_ids: (B, T); only ``scope: sequence`` and goldfish need them.
    reference_logps: In the shape of the labels; log p of each of these tokens under a reference model, for losses that
        need it. Of tokens that are not trained any number will do.
    example_weights: (B,), or (B, T) where a row has several documents; the values of an example's rows, or of its sets,
        are multiplied by them. What they are divided by stays the number of rows. The NLL is not weighted.
    document_weights: (D,) of ``examples.reweight`` or ``cvar``, the weights of the documents with trained rows, where
        they are known. Without, the losses of the documents given are looked at first, with ``look: step`` beside those
        of all other processes.
    columns: The columns of the dataset that the key names (``objective.config.columns``), by name; each (B,), or in the
        shape of the labels. A token's number counts for the row that predicts this token. ``where`` of a term needs
        its own; that of ``example_weights`` is used where no weights are given.
    num_items_in_batch: What sums over rows are divided by, where accumulated micro-batches make one step: the trained
        tokens of all of them, or with ``examples.normalize`` what ``Objective.mass`` gives, summed over them. A mapping
        gives a number for each scope. None, the default: of the rows given.
    """

    shift: bool
    position_ids: Tensor | None
    attention_mask: Tensor | None
    input_ids: Tensor | None
    example_weights: Tensor | None
    reference_logps: Tensor | None
    document_weights: Tensor | None
    columns: Mapping[str, Tensor]
    num_items_in_batch: Counts


class Objective:
    """A weighted sum of losses.

    >>> objective = Objective.from_config({"cross_entropy": 0.6, "lovasz": 0.4})
    >>> result = objective.from_logits(logits, labels)
    >>> result.loss.backward()

    Args:
        config: The parsed key.
        tokenizer: Says which tokens are numbers, for losses that need to know.
        label_counts: (V,), how often each token is a label in the training set, for losses that need to know.
        diagnose: Entropy and accuracy in the results too, for hosts that log them.

    Raises:
        ConfigError: The vocabulary has none of the tokens that a loss wants.
    """

    def __init__(
        self, config: CVLossConfig, *, tokenizer: Any = None, label_counts: Tensor | None = None, diagnose: bool = False
    ) -> None:
        self.config, self.tokenizer, self.label_counts, self.diagnose = config, tokenizer, label_counts, diagnose
        losses = available_losses()
        self.terms: list[Term] = []
        for term in config.terms:
            loss = losses[term.loss]
            number = 1 + sum(t.loss.name == loss.name for t in self.terms)
            while number > 1 and f"{loss.name}_{number}" in losses:  # another loss has this name
                number += 1
            rows = Selector(term.scope, where=term.where)
            if term.goldfish is not None:
                rows = rows.only(Goldfish(term.goldfish.k, term.goldfish.h))
            made = Term(
                name=loss.name if number == 1 else f"{loss.name}_{number}",
                loss=as_in_the_paper(loss) if config.papers_code else loss,
                weight=term.weight,
                rows=rows,
                per="global" if term.reduce == "global" else term.per,
                parameters=term.parameters,
                schedules=term.schedules,
            )
            if tokenizer is not None and loss.kind.informed is not None:
                try:
                    made = loss.kind.informed(made, tokenizer)
                except ValueError as error:
                    raise ConfigError(f"{KEY}.{error}") from error
            self.terms.append(made.at(0.0))
        self.selectors = tuple(dict.fromkeys([COMPLETION, *(term.rows for term in self.terms)]))

    @classmethod
    def from_config(
        cls, config: Any, *, tokenizer: Any = None, label_counts: Tensor | None = None, diagnose: bool = False
    ) -> "Objective":
        """An objective from any spelling of the ``cv_loss`` key: what would stand behind the key, and see above.

        Raises:
            ConfigError: A ValueError that names the key, what was wrong, and what is allowed.
        """
        return cls(CVLossConfig.parse(config), tokenizer=tokenizer, label_counts=label_counts, diagnose=diagnose)

    def __reduce__(self) -> Any:
        """From its config, as the losses are found by their names."""
        more = {"tokenizer": self.tokenizer, "label_counts": self.label_counts, "diagnose": self.diagnose}
        return partial(Objective.from_config, self.config.dump(), **more), ()

    @property
    def needs_tokenizer(self) -> bool:
        return self.tokenizer is None and any(term.loss.kind.informed for term in self.terms)

    @property
    def needs_label_counts(self) -> bool:
        return self.label_counts is None and any(term.loss.needs_label_counts for term in self.terms)

    @property
    def needs_reference(self) -> bool:
        return any(term.loss.needs_reference for term in self.terms)

    def select_rows(self, labels: Tensor, *, columns: Mapping[str, Tensor] | None = None, **inputs: Any) -> Rows:
        """The rows that the terms look at, in main memory; keywords as those of ``rows.select_rows``.

        Raises:
            ValueError: A term needs a tokenizer or label counts that the objective has not got.
        """
        if self.needs_tokenizer or self.needs_label_counts:
            what = "tokenizer" if self.needs_tokenizer else "label_counts"
            raise ValueError(f"{KEY}: {self} needs to know more; use Objective.from_config(..., {what}={what})")
        examples = self.config.examples
        power = POWERS[examples.normalize] if examples else 0.0
        for keyword, name in self.config.given_by.items():
            if inputs.get(keyword) is None and columns and name in columns:
                inputs[keyword] = columns[name]
        return select_rows(labels, selectors=self.selectors, columns=columns, power=power, **inputs)

    def weighs(self, progress: float) -> bool:
        """Whether documents are weighed by their losses after a fraction of training."""
        return self.config.examples is not None and self.config.examples.weighs(progress)

    def weights_of(self, losses: Tensor, masses: Tensor) -> Tensor:
        """The weights of the documents of a set, from their losses and masses, as in ``engine.examples``."""
        examples = self.config.examples
        assert examples is not None
        if not len(losses):
            return losses
        if examples.cvar is not None:
            return worst(losses, masses, **examples.cvar.model_dump())
        assert examples.reweight is not None
        return reweighted(losses, masses, examples.reweight.by, examples.reweight.r)

    def losses_of(self, rows: Rows, logp: Tensor) -> tuple[Tensor, Tensor]:
        """The mean NLL of each document with trained rows, (D,), and its mass, from log p of the rows, (N,)."""
        assert self.config.examples is not None
        members, number, sizes = rows.of_documents()
        logp = logp.detach().cpu().double()[members]
        losses = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, number, -logp) / sizes
        return losses, sizes.double() ** (1 - POWERS[self.config.examples.normalize])

    def mass(self, labels: Tensor, **inputs: Any) -> float:
        """What the sum over the trained rows of a batch is divided by: their number, unless the key has ``examples``.

        Its sum over the micro-batches of a step is the ``num_items_in_batch`` that makes them one big batch. Keywords
        as those of ``rows.select_rows``.
        """
        return self.select_rows(labels, **inputs).masses[COMPLETION]

    def __str__(self) -> str:
        def weight(term: Term) -> str:
            schedule = term.schedules.get("weight")
            return f"{term.weight:g}" if schedule is None else str(schedule)

        terms = " + ".join(f"{weight(term)} {term.name}" for term in self.terms)
        how = "the paper's code" if self.config.papers_code else self.config.examples
        return f"{terms} ({how})" if how else terms

    def __repr__(self) -> str:
        return f"Objective({self.config.dump()})"

    def from_logits(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        progress: float = 0.0,
        sample: bool = False,
        weigh: bool = True,
        **inputs: Unpack[BatchInputs],
    ) -> ObjectiveResult:
        """The objective of a batch of logits.

        Args:
            logits: (B, T, V) or (N, V); bf16, fp16 and fp32 are computed in float32, float64 in float64.
            labels: (B, T) or (N,), int64; -100 is ignored. They and the rest may be on any device.
            progress: How much of training is done, 0 to 1, for weights and parameters that follow a schedule.
            sample: Also ``gradients``, unless a term needs all logits.
            weigh: Documents by their losses, where the key says so; False: all alike, as in an evaluation.
            inputs: What else is known of the batch; see ``BatchInputs``.

        Raises:
            IndexError: A label is outside the vocabulary.
            ValueError: Shapes do not fit, or input_ids are missing.
        """
        _check_shapes("logits", "V", logits, labels)
        return self._of(partial(TensorSource, logits), logits.device, labels, inputs, progress, sample, weigh)

    def from_hidden(
        self,
        hidden_states: Tensor,
        head: Tensor | nn.Module | Head,
        labels: Tensor,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        progress: float = 0.0,
        sample: bool = False,
        weigh: bool = True,
        **inputs: Unpack[BatchInputs],
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
            which = "the paper's code" if self.config.papers_code else "a term of the family dense"
            raise ValueError(f"cv_loss: {which} needs logits; use from_logits")
        return self._of(*_of_hidden(hidden_states, head, scale, softcap), labels, inputs, progress, sample, weigh)

    def _of(
        self,
        source_of: Callable[[Tensor], LogitSource],
        device: torch.device,
        labels: Tensor,
        inputs: BatchInputs,
        progress: float,
        sample: bool,
        weigh: bool,
    ) -> ObjectiveResult:
        """``source_of`` makes the source of some rows of the batch, whose places it gets in main memory."""
        count, weights = inputs.pop("num_items_in_batch", None), inputs.pop("document_weights", None)
        rows = self.select_rows(labels, **inputs)
        if weigh and self.weighs(progress):
            rows = self._weighed(source_of, device, rows, weights)
        return self._compute(source_of, device, rows, count, progress, sample)

    def logps_from_logits(self, logits: Tensor, labels: Tensor, **inputs: Any) -> Tensor:
        """Log p of each token that some term trains, and 0 elsewhere, without gradient: ``reference_logps``.

        Args:
            logits: (B, T, V) or (N, V), of a model that is to be the reference.
            labels: (B, T) or (N,); they and the keywords are those of ``from_logits`` that tell which rows there are.

        Returns:
            In the shape of the labels, float32, or float64 for such logits.
        """
        _check_shapes("logits", "V", logits, labels)
        return self._logps(partial(TensorSource, logits), logits.device, labels, inputs)

    def logps_from_hidden(
        self,
        hidden_states: Tensor,
        head: Tensor | nn.Module | Head,
        labels: Tensor,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The same from hidden states under a head, without keeping the logits; see ``from_hidden``."""
        _check_shapes("hidden_states", "H", hidden_states, labels)
        return self._logps(*_of_hidden(hidden_states, head, scale, softcap), labels, inputs)

    def _logps(
        self,
        source_of: Callable[[Tensor], LogitSource],
        device: torch.device,
        labels: Tensor,
        inputs: dict[str, Any],
    ) -> Tensor:
        rows = self.select_rows(labels, **inputs)
        found = _target_logps(source_of, device, rows)
        place = rows.tokens.to(device, non_blocking=True)
        return found.new_zeros(labels.numel()).index_copy_(0, place, found).view(labels.shape)

    def _weighed(
        self,
        source_of: Callable[[Tensor], LogitSource],
        device: torch.device,
        rows: Rows,
        weights: Tensor | None,
    ) -> Rows:
        """The rows with the weights of their documents, found by a look at the log p of all if they are not given."""
        assert self.config.examples is not None
        if weights is None:
            with RandomState(device).again():  # a head may have dropout; the objective draws the same
                logp = _target_logps(source_of, device, rows)
            losses, masses = self.losses_of(rows, logp)
            here = torch.ones(len(losses), dtype=torch.bool)
            if self.config.examples.look == "step":
                losses, masses, here = of_all_processes(losses, masses, device)
            weights = self.weights_of(losses, masses)[here]
        return rows.weighed(weights.detach().cpu().double())

    def _compute(
        self,
        source_of: Callable[[Tensor], LogitSource],
        device: torch.device,
        rows: Rows,
        num_items_in_batch: Counts,
        progress: float,
        sample: bool,
    ) -> ObjectiveResult:
        if self.needs_reference and REFERENCE not in rows.given:
            column = self.config.reference_logps
            where = f" in the column {column}, of an evaluation set too" if column else " beside the labels"
            raise ValueError(f"{KEY}: {self} needs reference_logps{where}: log p under a reference model")
        source = source_of(rows.index)
        _check_labels(rows.labels, source.vocab_size)
        terms = [term.at(progress) for term in self.terms]
        source.fused = fused(source, terms)
        batch = _batch(source, rows, num_items_in_batch, device)
        gradients = self._sampled(source_of, terms, batch) if sample and not self.config.needs_logits else {}
        with torch.autocast(device.type, enabled=False):
            outcome = compute(source, terms, batch, self.diagnose, self._known(batch))
        return self._result(outcome, batch, gradients)

    def _known(self, batch: Batch) -> dict[str, Tensor]:
        if self.label_counts is None:
            return batch.rows.given
        # In float64 as far as here, which not every device has.
        found = counted(self.label_counts, batch.host.labels)
        device = batch.rows.labels.device
        moved = {name: x.to(batch.dtype).to(device, non_blocking=True) for name, x in found.items()}
        return {**moved, **batch.rows.given}

    def _sampled(
        self, source_of: Callable[[Tensor], LogitSource], terms: Sequence[Term], batch: Batch
    ) -> dict[str, Tensor]:
        """The norm of each weighted term's gradient in the logits of the first documents.

        They are at most SAMPLE rows, and as many logits as the engine has at a time.
        """
        rows = batch.host.first(min(SAMPLE, batch.chunks[0].rows.stop) if batch.chunks else 0)
        device, count = batch.loss.device, len(rows.labels)
        if count:
            with RandomState(device).again():  # a head may have dropout; the rest draws as if nothing had been
                logits = source_of(rows.index).logits(slice(0, count))
        else:
            logits = torch.zeros(0, batch.vocab_size, dtype=batch.dtype, device=device)
        logits.requires_grad_()
        found = {}
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for term in terms:  # all, on every process: they may talk to each other
                alone = replace(batch, rows=rows.to(device, batch.dtype), host=rows, sums={}, groups={}, statistics={})
                source = TensorSource(logits, torch.arange(count))
                outcome = compute(source, [term], alone, known=self._known(alone))
                (gradient,) = torch.autograd.grad(outcome.loss, logits)
                found[term.name] = gradient.norm()
        return found

    def _result(self, outcome: Outcome, batch: Batch, gradients: dict[str, Tensor]) -> ObjectiveResult:
        counts, masses = batch.counts, batch.host.masses
        result = ObjectiveResult(
            loss=outcome.loss,
            terms={term.name: outcome.means[term.name] for term in self.terms},
            nll=outcome.nll,
            n_tokens=counts[COMPLETION],
            counts={term.name: counts[term.rows] for term in self.terms},
            masses={term.name: masses[term.rows] for term in self.terms},
            mass=masses[COMPLETION],
            document_weights=None if self.config.examples is None else _document_weights(batch.host),
            sets=outcome.sets,
            diagnostics=outcome.diagnostics,
            gradients=gradients,
        )
        if self.config.prune is not None:
            trained, logp = batch.host.scopes[COMPLETION].nonzero().squeeze(1), batch.statistics["logp"].detach()
            result.places = batch.host.index[trained]
            result.logp = logp[trained.to(logp.device, non_blocking=True)]
        return result


def _of_hidden(
    hidden_states: Tensor, head: Tensor | nn.Module | Head, scale: float, softcap: float | None
) -> tuple[Callable[[Tensor], LogitSource], torch.device]:
    """What makes the source of some rows, whose places it gets in main memory, and where that is."""
    hidden_states = hidden_states.to(device_of(head, hidden_states.device))
    device = hidden_states.device

    def source_of(index: Tensor) -> LogitSource:
        return head_source(hidden_states, head, index.to(device, non_blocking=True), scale, softcap)

    return source_of, device


def _target_logps(source_of: Callable[[Tensor], LogitSource], device: torch.device, rows: Rows) -> Tensor:
    """(N,) log p of the target of each row, without gradient."""
    source = source_of(rows.index)
    _check_labels(rows.labels, source.vocab_size)
    source.fused = fused(source, ())
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return target_logps(source, _batch(source, rows, None, device))


def _batch(source: LogitSource, rows: Rows, num_items_in_batch: Counts, device: torch.device) -> Batch:
    counts = {selector: int(mask.sum()) for selector, mask in rows.scopes.items()}
    return Batch(
        rows=rows.to(device, source.dtype),
        host=rows,
        counts=counts,
        denominators=_denominators(rows.masses, num_items_in_batch, device, source.dtype),
        averaged=num_items_in_batch is None,
        vocab_size=source.vocab_size,
        dtype=source.dtype,
        at_once=source.at_once(),
    )


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


def _document_weights(rows: Rows) -> Tensor:
    """(D,) the sum of the weights of each document's trained rows."""
    members, number, sizes = rows.of_documents()
    if (weights := rows.weights.get(COMPLETION)) is None:
        return sizes.double()
    return torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, number, weights[members].double())


def _denominators(
    masses: Mapping[Selector, float], given: Counts, device: torch.device, dtype: torch.dtype
) -> dict[Selector, Tensor | float]:
    """What the sum over the rows of each selector is divided by; ``masses`` are those of the micro-batch.

    Where only the trained tokens of the step are known, a micro-batch's mean over other rows counts by its share of the
    trained tokens.
    """
    if given is None:
        return {rows: max(1.0, mass) for rows, mass in masses.items()}
    if not isinstance(given, Mapping):
        given = {COMPLETION: given}
    known = {
        rows if isinstance(rows, Selector) else Selector(rows): _at_least_one(count, device, dtype)
        for rows, count in given.items()
        if count is not None
    }
    if COMPLETION not in known:  # nothing is known of the step, so what is left out is divided by its own rows
        return {rows: known.get(rows, max(1.0, mass)) for rows, mass in masses.items()}
    share = known[COMPLETION] / max(masses[COMPLETION], 1e-30)
    return {rows: known.get(rows, max(1.0, mass) * share) for rows, mass in masses.items()}


def _at_least_one(count: Tensor | float, device: torch.device, dtype: torch.dtype) -> Tensor | float:
    """A step whose rows are all masked has a count of 0, and a sum of 0 to divide by it."""
    if not isinstance(count, Tensor):
        return max(1, count)
    if count.numel() != 1:
        raise ValueError(f"num_items_in_batch: one number is expected, not a tensor of shape {tuple(count.shape)}")
    return count.to(device, dtype if count.is_floating_point() else None).reshape(()).clamp(min=1)
