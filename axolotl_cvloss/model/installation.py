"""Put an objective into a model's forward, so that the loss is computed where the head's weights are whole.

Under FSDP and ZeRO-3 the weights of the head exist in full only inside the forward of the model, so this is the one
place that works for every way of training. Wrappers that come later (peft, DDP, FSDP, accelerate, torch.compile)
end up calling the patched forward.
"""

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..engine import ranks
from ..engine.rows import COMPLETION, IGNORE_INDEX, Selector
from ..engine.sources import Head
from ..objective.config import ADAPTER_OFF, KEY, NEEDS_LOGITS
from ..objective.objective import Objective, ObjectiveResult
from .adapters import adapters_off, not_a_reference
from .head import HeadTap, partitioned
from .inspection import ANOTHER, Verdict, agree, inspected, processed, telling, undisturbed

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_cv_loss_installation"
_REPLACED = "_cv_loss_replaced"
# Of a batch: the weights (D,) of its documents as the bits of float64, which FSDP would cast to bfloat16 on the way.
DOCUMENT_WEIGHTS = "cv_loss_document_weights"
NUMBER = "cv_loss_number"  # of a batch: the number of each example in the training set, where ``prune`` asks for it
# Of a batch, before the name of a column: its numbers as bits of float32, as FSDP and DeepSpeed cast what is not whole.
_BITS = "cv_loss_bits_of_"
_ROW_INPUTS = ("position_ids", "attention_mask", "input_ids")


@dataclass(frozen=True)
class Evaluation:
    """Of one batch: whether the outputs must have logits, and how many of the first rows count; None: all."""

    keep_logits: bool
    first_rows: int | None


@dataclass(frozen=True)
class _Replaced:
    """The instance's forward before ours, if it had one, and ours, which does nothing without an installation."""

    before: Callable[..., Any] | None
    ours: Callable[..., Any]


class Pruning(Protocol):
    """What a trainer knows of ``prune``."""

    def weights_of(self, numbers: Tensor) -> Tensor | None:
        """What examples weigh; None: all alike."""

    def add(self, numbers: Tensor, logp: Tensor) -> None:
        """The example of each trained row of a micro-batch, and its log p."""


class Installation:
    """An objective in a model.

    ``listeners`` are called with every result; ``counts`` holds, by scope, the rows of the accumulation window, or what
    these count by where the objective has ``examples``, for what ``num_items_in_batch`` does not say; ``counted`` is
    whether the last forward was given that; ``sample`` is whether the next results shall have ``gradients``;
    ``evaluation`` is what a trainer says of a batch that it evaluates on; ``pruning`` is that of a trainer that leaves
    examples out. Without an evaluation the outputs have logits where the model is in evaluation mode, and in training
    only where the objective needs them. ``one_batch`` is whether a step is one micro-batch of each process. While
    ``looked`` is a list, the forward puts the log p of the tokens of a batch there (B, T), and there is no loss.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self.model = model
        self.objective = objective
        self.listeners: list[Callable[[ObjectiveResult], None]] = []
        self.counts: Mapping[Selector, Tensor] = {}
        self.progress = 0.0  # how much of training is done, for what follows a schedule
        self.counted = self.sample = self.one_batch = False
        self.looked: list[Tensor] | None = None
        self.evaluation: Evaluation | None = None
        self.pruning: Pruning | None = None
        self._columns = objective.config.columns
        self._column_names = {*self._columns, *(_BITS + name for name in self._columns)}
        if objective.config.needs_logits and objective.config.head != "logits":
            logger.warning(f"cv_loss: {objective} {NEEDS_LOGITS}; `head: logits` silences this warning")
        self._tap = HeadTap(model)
        self._verdict: Verdict | None = None  # not known before the first batch
        self._fused_batches = 0
        self._accepted = model.__dict__.get("accepts_loss_kwargs")
        model.accepts_loss_kwargs = True  # type: ignore[assignment]  # Trainer then passes num_items_in_batch
        if _REPLACED not in model.__dict__:
            self._replace_forward()

    def _replace_forward(self) -> None:
        model, signature = self.model, inspect.signature(self.model.forward)
        names = list(signature.parameters)

        @partial(torch.compiler.disable, recursive=False)
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # Not self: the module may be a copy of the model, or have another objective now, or none.
            installed = module.__dict__.get(_ATTRIBUTE)
            if installed is None:
                return _original(module)(*args, **kwargs)
            named = {**dict(zip(names, args, strict=False)), **kwargs}
            if named.get("labels") is None and named.get("shift_labels") is None:
                for name in ("num_items_in_batch", NUMBER, DOCUMENT_WEIGHTS, *installed._column_names):
                    kwargs.pop(name, None)
                return installed.original(*args, **kwargs)
            return installed._forward(**named)

        # Trainer reads from the signature which columns of the dataset the model takes.
        parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY), *signature.parameters.values()]
        last = len(parameters) - any(p.kind is p.VAR_KEYWORD for p in parameters)
        parameters[last:last] = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in self._columns
            if name not in names
        ]
        forward.__signature__ = signature.replace(parameters=parameters)
        forward.__doc__ = model.forward.__doc__
        model.__dict__[_REPLACED] = _Replaced(model.__dict__.get("forward"), forward)
        model.forward = MethodType(forward, model)

    @property
    def original(self) -> Callable[..., Any]:
        """The model's own forward."""
        return _original(self.model)

    def columns(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The columns that the key names, of a batch to train on.

        Raises:
            ValueError: It has not got one of them.
        """
        found = _columns(batch, self._columns)
        for name, key in self._columns.items():
            if name not in found:
                raise ValueError(
                    f"{key}: the batch has no column {name}, only {', '.join(n for n in batch if n not in found)}. The "
                    "dataset must have it when it comes to the trainer: one number an example, or one a token"
                )
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> "Installation":
        """For a copy of the model. It belongs to no trainer."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        memo[id(self.objective)] = self.objective
        state = {**self.__dict__, "listeners": [], "counts": {}}
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in state.items()})
        return copied

    def __reduce__(self) -> Any:
        raise TypeError(
            "cv_loss: a model with an objective cannot be pickled; call uninstall(model) before. state_dict and "
            "save_pretrained work with it"
        )

    def remove(self) -> None:
        own = self.model.__dict__
        del own[_ATTRIBUTE]
        _put_back(own, "accepts_loss_kwargs", self._accepted)
        # Where somebody has wrapped our forward since, as accelerate does in autocast, taking it away would take the
        # wrapper too; it stays, and passes on to the model's own.
        if getattr(own.get("forward"), "__func__", None) is own[_REPLACED].ours:
            _put_back(own, "forward", own.pop(_REPLACED).before)

    def _forward(
        self,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> Any:
        inputs.pop("skip_logits", None)  # a wish of Trainer to Liger's forward
        numbers, weights = inputs.pop(NUMBER, None), inputs.pop(DOCUMENT_WEIGHTS, None)
        columns = self.columns(inputs) if self.model.training else _columns(inputs, self._columns)
        inputs = {name: value for name, value in inputs.items() if name not in self._column_names}
        run = partial(self.original, **inputs, return_dict=True)
        counts = self._counts_of_the_step(num_items_in_batch)
        given: dict[str, Any] = {
            "labels": labels if shift_labels is None else shift_labels,
            "shift": shift_labels is None,
            "num_items_in_batch": counts,
            "columns": columns,
            "progress": self.progress,
            "sample": self.sample,
            "weigh": self.model.training and self.evaluation is None,
            "document_weights": None if weights is None else weights.cpu().view(torch.float64),
            **{name: inputs.get(name) for name in _ROW_INPUTS},
        }
        if self.model.training and self.objective.config.prune is not None:
            numbers = self._weighed_by_pruning(numbers, given)
        mask, length = given["attention_mask"], given["labels"].shape[-1]
        if mask is not None and mask.dim() == 2:  # it may begin with a cache, such as that of prefix tuning
            given["attention_mask"] = mask[:, -length:]
        if self.evaluation and self.evaluation.first_rows is not None:
            given |= _padding_from(self.evaluation.first_rows, given)
        if self._verdict is None:
            # Not by a decorator: that would load the compiler as soon as this module is imported.
            torch.compiler.disable(self._judge)(run, given["labels"], given["attention_mask"])
        if self.looked is not None:
            self.looked.append(self._own_logps(run, given))
            return {"loss": torch.zeros((), device=given["labels"].device)}
        if given["weigh"] and counts is not None and weights is None and not self.one_batch:
            self._demand_a_look()
        if self.objective.needs_reference and self.objective.config.adapter_off:
            # In evaluation mode: what the reference says of a token follows from those before it, not from dropout.
            with adapters_off(self.model):
                given["reference_logps"] = self._own_logps(run, given)
        both = self._fused(run, given) if self._wants_fused() else None
        if both is None:
            outputs = run()
            if outputs.logits.shape[:-1] != given["labels"].shape:
                raise ValueError(
                    f"cv_loss: {type(self.model).__name__} returns logits of the shape {tuple(outputs.logits.shape)} "
                    f"for labels of {tuple(given['labels'].shape)}, and each label needs its row: no logits_to_keep, "
                    "and no images that the model puts into the sequence beside what has labels"
                )
            result = torch.compiler.disable(self.objective.from_logits)(outputs.logits, **given)
        else:
            outputs, result = both
        if self.model.training and self.pruning is not None:
            assert result.places is not None
            assert result.logp is not None
            of_rows = numbers.roll(-1, dims=1) if given["shift"] else numbers
            self.pruning.add(of_rows.flatten()[result.places.to(of_rows.device, non_blocking=True)], result.logp)
        self.counted = counts is not None
        # Of a model on several devices, the head's is not Trainer's; and Trainer scales the loss in place.
        loss = result.loss.to(given["labels"].device, copy=True)
        # As the rest of the loss, what is added is a mean over the step, of which this micro-batch is a part.
        share = 1.0 if counts is None else result.mass / max(1, float(counts[COMPLETION]))
        if isinstance(added := share * self._auxiliary(outputs, loss.device), Tensor):
            loss, result = loss + added, replace(result, aux_loss=added.detach())
        for listener in self.listeners:
            listener(result)
        outputs = type(outputs)(**{**outputs, "loss": loss})
        return outputs.to_tuple() if return_dict is False else outputs

    def _counts_of_the_step(
        self, num_items_in_batch: Tensor | float | None
    ) -> Mapping[Selector, Tensor | float] | None:
        """What sums are divided by, where that is known of all micro-batches of the step."""
        if num_items_in_batch is None:
            return None
        if self.objective.config.examples is not None and self.counts:  # a Trainer counts tokens
            return self.counts
        return {**self.counts, COMPLETION: num_items_in_batch}

    def _weighed_by_pruning(self, numbers: Tensor | None, given: dict[str, Any]) -> Tensor:
        """The number of the example of each token, (B, T), whose weights are put to what the objective is given."""
        if self.pruning is None or numbers is None:
            raise ValueError(
                "cv_loss.prune: no trainer leaves examples out here; call attach(trainer), and leave prune "
                "out in a loop of your own"
            )
        numbers = numbers.view(len(numbers), -1).expand_as(given["labels"])
        if (drawn := self.pruning.weights_of(numbers)) is not None:
            column = given["columns"].get(self.objective.config.example_weights or "")
            given["example_weights"] = drawn if column is None else drawn * column.view(len(column), -1)
        return numbers

    def _demand_a_look(self) -> None:
        """Raise where losses of other micro-batches would be needed, and nobody has looked at them."""
        examples = self.objective.config.examples
        if self.objective.weighs(self.progress) and examples is not None and examples.look == "step":
            raise ValueError(
                "cv_loss.examples.look: step needs a look at all micro-batches of the step before the first is trained "
                "on; attach(trainer) takes one. In a loop of your own with several micro-batches a step, take look: "
                "batch"
            )

    def _own_logps(self, run: "partial[Any]", given: Mapping[str, Any]) -> Tensor:
        """``token_logps`` of the objective, from what it is given."""
        rows = {name: given[name] for name in ("labels", "shift", "columns", *_ROW_INPUTS)}
        return self.token_logps(run, self.objective, rows)

    def token_logps(self, run: "partial[Any]", objective: Objective, rows: Mapping[str, Any]) -> Tensor:
        """(B, T), log p of each token that a term of an objective looks at, 0 elsewhere; the logits are not kept.

        Args:
            run: The model's own forward on the batch that ``rows`` tells of, once it has been looked at.
        """
        verdict, found = self._verdict, []
        assert verdict is not None
        run = self._without_cache(run)

        def take(hidden_states: Tensor, head: Head) -> Tensor:
            given = {"scale": verdict.scale, "softcap": verdict.softcap, **rows}
            found.append(objective.logps_from_hidden(hidden_states, head, **given))
            return torch.zeros_like(hidden_states[..., :1])

        with undisturbed(self.model):
            if verdict.unfusable:
                return torch.compiler.disable(objective.logps_from_logits)(run().logits, **rows)
            self._tap.run(run, take)
        return found[0]

    def _without_cache(self, run: "partial[Any]") -> "partial[Any]":
        return partial(run, use_cache=False) if "use_cache" in inspect.signature(self.original).parameters else run

    def _auxiliary(self, outputs: Any, device: torch.device) -> Tensor | float:
        """The auxiliary loss in the outputs, such as load balancing of a mixture of experts, as the model adds it."""
        if (aux_loss := outputs.get("aux_loss")) is None:
            return 0.0
        config = self.model.config.get_text_config()  # type: ignore[union-attr,operator]
        names = ("router_aux_loss_coef", "aux_loss_coef")
        found = [getattr(owner, name) for owner in (self.model, config) for name in names if hasattr(owner, name)]
        if not found:
            raise ValueError(f"cv_loss: {type(self.model).__name__} has an aux_loss, but no {' or '.join(names)}")
        return found[0] * aux_loss.to(device)

    def _judge(self, run: "partial[Any]", labels: Tensor, attention_mask: Tensor | None) -> None:
        """What the first batch with labels says of the model; an error where its own loss is another one."""
        with self._tap.alone:
            if self._verdict is not None:  # another thread was faster
                return
            if problems := without_adapters(self.model, self.objective):
                raise RuntimeError(problems)
            run = self._without_cache(run)  # no model caches in training
            if run.keywords.get("past_key_values") is not None:  # such as of prefix tuning; it grows when it is used
                run = partial(run, past_key_values=None, attention_mask=attention_mask)
            verdict = inspected(self._tap, run, labels, attention_mask, self._auxiliary)
            name = type(self.model).__name__
            if verdict.other_loss:
                raise RuntimeError(
                    f"cv_loss: {name} cannot be trained: {verdict.other_loss}. An objective takes the place of the "
                    "mean cross-entropy of each next token"
                )
            if verdict.unknown:
                logger.warning(
                    f"cv_loss: the own loss of {name} could not be looked at, as {verdict.unknown}. It must be the "
                    "mean cross-entropy of each next token, for an objective takes the place of that"
                )
            config = self.objective.config
            if verdict.unfusable and config.head != "logits" and not config.needs_logits:
                verdict = self._kept(verdict.unfusable)
            self._verdict = verdict

    def _kept(self, why: str) -> Verdict:
        """Go on with full logits, or stop where fused was asked for."""
        if self.objective.config.head == "fused":
            raise RuntimeError(
                f"cv_loss.head: fused is not possible with {type(self.model).__name__}: {why}. "
                "Use head: auto or head: logits"
            )
        logger.warning(
            f"cv_loss: the logits of {type(self.model).__name__} are kept in full, as {why}. "
            "This takes more memory; `head: logits` silences this warning"
        )
        return Verdict(unfusable=why)

    def _wants_fused(self) -> bool:
        keep_logits = self.evaluation.keep_logits if self.evaluation else not self.model.training
        config = self.objective.config
        assert self._verdict is not None
        return not (config.head == "logits" or config.needs_logits or keep_logits or self._verdict.unfusable)

    def _fused(self, run: Callable[[], Any], given: dict[str, Any]) -> tuple[Any, ObjectiveResult] | None:
        """The outputs without logits and the objective, or None where it turns out that the logits are needed.

        What the model does to logits is looked at again in batches 1, 2, 4, 8, ...
        """
        assert self._verdict is not None
        postprocessing: Any = {"scale": self._verdict.scale, "softcap": self._verdict.softcap}
        results: list[ObjectiveResult] = []
        looks: list[Tensor] = []
        first = self._fused_batches == 0

        def take(hidden_states: Tensor, head: Head) -> Tensor:
            results.append(self.objective.from_hidden(hidden_states, head, **given, **postprocessing))
            self._fused_batches += 1
            if self._fused_batches & (self._fused_batches - 1):
                return torch.zeros_like(hidden_states[..., :1])
            looks.append(telling((*hidden_states.shape[:-1], 1), hidden_states))
            return looks[0].clone()

        outputs: Any = None
        why = ""
        try:
            outputs = self._tap.run(run, take)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            if not first or not results:
                raise
            why = f"its forward fails without all logits ({error})"
        if not why and len(results) != 1:
            why = f"its forward calls the head {len(results)} times"
        elif not why and looks:
            why = torch.compiler.disable(self._seen_again)(outputs.logits, processed(looks[0], **postprocessing))
        if first:
            if not ranks.everywhere(not why, given["labels"].device):
                self._verdict = self._kept(why or ANOTHER)
                return None
        elif why:  # too late for all processes to turn round together
            raise RuntimeError(f"cv_loss: with {type(self.model).__name__} {why}, unlike before; use head: logits")
        (result,) = results
        if outputs.logits.requires_grad:  # see ``partitioned``
            result = replace(result, loss=result.loss + outputs.logits.flatten()[:0].sum())
        outputs = type(outputs)(**{name: value for name, value in outputs.items() if name != "logits"})
        return outputs, result

    def _seen_again(self, seen: Tensor, expected: Tensor) -> str:
        """What is wrong with what the model has done to logits, or empty."""
        if seen.shape != expected.shape or not agree(seen.detach(), expected):
            return "what happens to the logits of the head is another thing"
        head = self._tap.find()
        if seen.requires_grad and head is not None and not partitioned(head):
            return "what happens to the logits of the head has weights that train"
        return ""


def without_adapters(model: nn.Module, objective: Objective) -> str:
    """Why the model without its adapters cannot be the reference, where the objective wants it to be; or empty."""
    wanted = objective.needs_reference and objective.config.adapter_off
    why = not_a_reference(_base(model)) if wanted else ""
    return f"{KEY}.reference: {ADAPTER_OFF} cannot be used here: {why}" if why else ""


def install(model: nn.Module, objective: Objective | Mapping[str, Any] | str) -> nn.Module:
    """Make ``model(input_ids=..., labels=..., num_items_in_batch=...)`` return the loss of the objective.

    Without labels the model is untouched. Call it before the model is wrapped by accelerate, DDP or FSDP; a peft
    model may come before or after. Installing again replaces the objective, at any time.

    Args:
        model: A causal language model of transformers, or a peft model of one.
        objective: What to train with, or what would stand behind the key.

    Returns:
        The model.

    Raises:
        TypeError: The model takes no ``input_ids``, so it is no language model.
        ValueError: The model is an encoder-decoder, or what would stand behind the key is wrong. Other models whose
            own loss is not the mean cross-entropy of each next token stop at their first batch.
    """
    taken = inspect.signature(model.forward).parameters
    if "input_ids" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise TypeError(
            f"cv_loss: install takes a causal language model, and {type(model).__name__} is none: its forward takes "
            f"{', '.join(taken) or 'nothing'}, and no input_ids"
        )
    if not isinstance(objective, Objective):
        objective = Objective.from_config(objective)
    installed = installation(model)
    base = _base(model) if installed is None else installed.model
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"cv_loss: {type(base).__name__} is an encoder-decoder, whose labels are in line with the logits; "
            "objectives are for causal language models, where each row predicts the next token"
        )
    uninstall(model)
    before = base.forward
    base.__dict__[_ATTRIBUTE] = Installation(base, objective)
    _follow(model, base, before)
    return model


def uninstall(model: nn.Module) -> nn.Module:
    """Give the model its own forward back. A model without an objective is left as it is."""
    if (installed := installation(model)) is not None:
        before = installed.model.forward
        installed.remove()
        _follow(model, installed.model, before)
    return model


def _follow(model: nn.Module, base: nn.Module, before: Callable[..., Any]) -> None:
    """Some wrappers, such as peft's of LLaMA-Adapter, keep the forward of what they wrap instead of looking it up."""
    for module in model.modules():
        if module is not base and module.__dict__.get("forward") == before:
            module.__dict__["forward"] = base.forward


def installation(model: nn.Module) -> Installation | None:
    """The installation in a model, also where the model has been wrapped since, or None."""
    found = [m.__dict__[_ATTRIBUTE] for m in model.modules() if _ATTRIBUTE in m.__dict__]
    return found[0] if found else None


def _padding_from(first: int, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Labels and mask of a batch whose rows count as padding from this one on."""
    changed = {"labels": given["labels"].clone()}
    changed["labels"][first:] = IGNORE_INDEX
    if given["attention_mask"] is not None:
        changed["attention_mask"] = given["attention_mask"].clone()
    elif given["position_ids"] is None:
        changed["attention_mask"] = torch.ones_like(given["labels"])
    if "attention_mask" in changed:
        changed["attention_mask"][first:] = 0
    return changed


def _original(model: nn.Module) -> Callable[..., Any]:
    return model.__dict__[_REPLACED].before or MethodType(type(model).forward, model)


def columns_as_bits(batch: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The batch with these columns as whole numbers, which keep all digits on their way to the forward."""
    given = dict(batch)
    for name in names:
        if isinstance(values := given.get(name), Tensor) and values.is_floating_point():
            given[_BITS + name] = given.pop(name).float().contiguous().view(torch.int32)
    return given


def _columns(batch: Mapping[str, Any], names: Iterable[str]) -> dict[str, Tensor]:
    """Those that the batch has."""
    bits = {name: batch[_BITS + name].view(torch.float32) for name in names if batch.get(_BITS + name) is not None}
    return {**{name: batch[name] for name in names if batch.get(name) is not None}, **bits}


def _put_back(attributes: dict[str, Any], name: str, value: Any) -> None:
    """An attribute as it was before; None: there was none."""
    attributes.pop(name, None)
    if value is not None:
        attributes[name] = value


def _base(model: nn.Module) -> nn.Module:
    """The language model inside a peft model; another model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
