"""peft's adapters in a model: switched off for a forward of the model that they were put into. No peft is imported."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# Ways to begin that leave the weights of the model as they are; others take out of these what the adapter begins with.
KEEPING = (True, False, "gaussian", "eva", "orthogonal")


def not_a_reference(model: nn.Module) -> str:
    """Why a model without its adapters is not the model as it was, or empty."""
    layers = _adapted(model)
    if not layers:
        return "the model has no adapter that can be switched off, such as LoRA"
    if why := begins_elsewhere(model):
        return why
    own = {
        id(parameter)
        for layer in layers
        for name, parameter in layer.named_parameters()
        if name.partition(".")[0] in layer.adapter_layer_names  # type: ignore[operator]
    }
    outside = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    return f"{outside[0]} trains too, and is no adapter" if outside else ""


def begins_elsewhere(model: nn.Module) -> str:
    """How adapters have changed the weights under them when they began, or empty."""
    for config in getattr(model, "peft_config", {}).values():
        begun = getattr(config, "init_lora_weights", True)
        if begun not in KEEPING:
            return f"init_lora_weights: {begun} changes the weights under the adapters"
    return ""


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapters and trained copies of modules.

    Not by peft's disable_adapter: that also takes requires_grad from the adapters for a while, and DDP and FSDP, which
    look at it when they make parameters whole, have wrapped them already.
    """
    layers: list[Any] = [layer for layer in _adapted(model) if not layer.disable_adapters]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _adapted(model: nn.Module) -> list[nn.Module]:
    """The layers with an adapter, and those of which a copy trains."""
    return [module for module in model.modules() if hasattr(module, "_disable_adapters")]
