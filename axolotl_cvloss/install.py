"""Put an objective into a model's forward, so that the loss is computed where the head's weights are whole.

Under FSDP and ZeRO-3 the weights of the head exist in full only inside the forward of the model, so this is the one
place that works for every way of training. Wrappers that come later (peft, DDP, FSDP, accelerate, torch.compile)
end up calling the patched forward.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .objective import Objective, ObjectiveResult

_ATTRIBUTE = "_cv_loss_installation"
_ROW_INPUTS = ("position_ids", "attention_mask", "input_ids")


class Installation:
    """An objective in a model.

    ``listeners`` are called with every result; ``counts`` holds, by scope, the rows of the accumulation window, for
    terms whose rows are not the ones that ``num_items_in_batch`` counts.
    """

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        self.model = model
        self.objective = objective
        self.listeners: list[Callable[[ObjectiveResult], None]] = []
        self.counts: Mapping[str, Tensor] = {}
        self._saved = {name: model.__dict__.get(name) for name in ("forward", "accepts_loss_kwargs")}
        original = model.forward
        signature = inspect.signature(original)
        names = list(signature.parameters)

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            kwargs.update(zip(names, args, strict=False))
            if kwargs.get("labels") is None and kwargs.get("shift_labels") is None:
                kwargs.pop("num_items_in_batch", None)
                return original(**kwargs)
            return self._forward(original, **kwargs)

        # Trainer reads from the signature which columns of the dataset the model takes.
        itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        forward.__signature__ = signature.replace(parameters=[itself, *signature.parameters.values()])  # type: ignore
        forward.__doc__ = original.__doc__
        model.forward = MethodType(forward, model)  # type: ignore[method-assign]
        model.accepts_loss_kwargs = True  # type: ignore[assignment]  # Trainer then passes num_items_in_batch

    def remove(self) -> None:
        for name, value in self._saved.items():
            self.model.__dict__.pop(name, None)
            if value is not None:
                self.model.__dict__[name] = value
        del self.model.__dict__[_ATTRIBUTE]

    def _forward(
        self,
        original: Callable[..., Any],
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> Any:
        inputs.pop("skip_logits", None)  # a wish of Trainer to Liger's forward
        outputs = original(**inputs, return_dict=True)
        result = self._compute(outputs.logits, labels, shift_labels, num_items_in_batch, inputs)
        loss = result.loss
        if (aux_loss := outputs.get("aux_loss")) is not None:  # load balancing of a mixture of experts
            config = self.model.config.get_text_config()  # type: ignore[union-attr,operator]
            loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss.to(loss.device)
        outputs["loss"] = loss
        outputs.move_to_end("loss", last=False)
        for listener in self.listeners:
            listener(result)
        if return_dict is False:
            return outputs.to_tuple()
        return outputs

    @torch.compiler.disable
    def _compute(
        self,
        logits: Tensor,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        num_items_in_batch: Tensor | float | None,
        inputs: dict[str, Any],
    ) -> ObjectiveResult:
        shift = shift_labels is None
        target = labels if shift_labels is None else shift_labels
        assert target is not None
        counts = None
        if num_items_in_batch is not None:
            counts = {**self.counts, "completion": num_items_in_batch}
        return self.objective.from_logits(
            logits,
            target,
            shift=shift,
            num_items_in_batch=counts,
            **{name: inputs.get(name) for name in _ROW_INPUTS},
        )


def install(model: nn.Module, objective: Objective) -> nn.Module:
    """Make ``model(input_ids=..., labels=..., num_items_in_batch=...)`` return the loss of the objective.

    Without labels the model is untouched. Call it before the model is wrapped by accelerate, DDP or FSDP; a peft
    model may come before or after. Installing again replaces the objective.

    Args:
        model: A causal language model of transformers, or a peft model of one.
        objective: What to train with.

    Returns:
        The model.
    """
    base = _base(model)
    if installation(model) is not None:
        uninstall(model)
    base.__dict__[_ATTRIBUTE] = Installation(base, objective)
    return model


def uninstall(model: nn.Module) -> nn.Module:
    """Give the model its own forward back. A model without an objective is left as it is."""
    if (installed := installation(model)) is not None:
        installed.remove()
    return model


def installation(model: nn.Module) -> Installation | None:
    """The installation in a model, also where the model has been wrapped since, or None."""
    found = [m.__dict__[_ATTRIBUTE] for m in model.modules() if _ATTRIBUTE in m.__dict__]
    return found[0] if found else None


def _base(model: nn.Module) -> nn.Module:
    """The language model inside a peft model; another model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
