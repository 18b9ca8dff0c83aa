"""Options of TRL's SFTConfig beside ``cv_loss``: what is switched off and what is refused.

Imports no host: anybody can check a config.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ..objective.config import ADAPTER_OFF, KEY, CVLossConfig
from . import prune_keys

# Liger's ways to compute cross-entropy, and whether each is on where nothing is said of it. They say nothing of the
# objective, so they are switched off; its other kernels stay.
SAVERS = {"fused_linear_cross_entropy": True, "cross_entropy": False}
PARALLEL = {"cp_size": "context", "sp_size": "sequence", "tp_size": "tensor"}


def conflicts(value_of: Callable[[str], Any]) -> list[str]:
    """Options that bring another loss or split a row of logits over ranks, and what to do instead."""
    found = []
    if (loss_type := value_of("loss_type")) not in (None, "nll", "chunked_nll"):
        found.append(f"loss_type: {loss_type}: it brings another loss; remove it and name the loss in {KEY}")
    if smoothing := value_of("label_smoothing_factor"):
        instead = f"cross_entropy: {{label_smoothing: {smoothing:g}}}"
        found.append(f"label_smoothing_factor: it brings another loss; remove it and write {instead} in {KEY}")
    return [f"{KEY} cannot be used with {problem}" for problem in found] + parallel(value_of("parallelism_config"))


def conflicts_of(config: CVLossConfig, value_of: Callable[[str], Any]) -> list[str]:
    """The same for what the key itself says."""
    return (prune_conflicts(value_of) if config.prune else []) + config.without_reference()


def prune_conflicts(value_of: Callable[[str], Any]) -> list[str]:
    """The same where the key has ``prune``."""
    steps, epochs = value_of("max_steps"), value_of("num_train_epochs")
    return prune_keys.conflicts(
        packed="packing" if value_of("packing") else None,
        streamed="streaming" if value_of("streaming") else None,
        epochs=None if isinstance(steps, int) and steps > 0 else ("num_train_epochs", 3 if epochs is None else epochs),
    )


def savers(value_of: Callable[[str], Any]) -> dict[str, str]:
    """The fields of ``liger_kernel_config`` to switch off, and a sentence about each."""
    config = value_of("liger_kernel_config") or {}
    return {
        name: f"{KEY} computes its loss itself, without keeping logits where the losses allow it, so Liger's {name} is "
        "switched off"
        for name, default in SAVERS.items()
        if value_of("use_liger_kernel") and isinstance(config, Mapping) and config.get(name, default)
    }


def no_adapter(config: CVLossConfig, has_adapter: Any) -> list[str]:
    """What is wrong where the reference is to be the model without its adapters."""
    if not config.adapter_off or has_adapter:
        return []
    return [f"{KEY}.reference: {ADAPTER_OFF} needs an adapter: use_peft, or a peft_config; or leave it out"]


def parallel(config: Any) -> list[str]:
    """The same for accelerate's ParallelismConfig, or for the mapping that makes one."""

    def degree(size: str) -> int:
        return int((config.get(size) if isinstance(config, Mapping) else getattr(config, size, None)) or 1)

    return [
        f"{KEY} cannot be used with {size} above 1 ({kind} parallelism): it splits what the loss of a row needs over "
        f"GPUs, which {KEY} cannot follow yet; use FSDP or DeepSpeed ZeRO instead"
        for size, kind in PARALLEL.items()
        if degree(size) > 1
    ]
