"""Options of TRL's SFTConfig that ``cv_loss`` cannot be used with. Imports no host: anybody can check a config."""

from collections.abc import Callable, Mapping
from typing import Any

from ..config import KEY

# What `loss_type` is set to: SFTTrainer refuses it, so that a config with cv_loss never trains with another loss.
LOSS_TYPE = "cv_loss, which only CVLossSFTTrainer knows,"
PARALLEL = {"cp_size": "context", "sp_size": "sequence", "tp_size": "tensor"}


def conflicts(value_of: Callable[[str], Any]) -> list[str]:
    """Options that bring another loss or split a row of logits over ranks, and what to do instead."""
    found = []
    if (loss_type := value_of("loss_type")) not in (None, "nll", "chunked_nll", LOSS_TYPE):
        found.append(f"loss_type: {loss_type}: it brings another loss; remove it and name the loss in {KEY}")
    if smoothing := value_of("label_smoothing_factor"):
        instead = f"cross_entropy: {{label_smoothing: {smoothing:g}}}"
        found.append(f"label_smoothing_factor: it brings another loss; remove it and write {instead} in {KEY}")
    if value_of("use_liger_kernel") and (value_of("liger_kernel_config") or {}).get("fused_linear_cross_entropy", True):
        found.append(
            "use_liger_kernel and its fused cross-entropy: it replaces the loss; keep the other kernels with "
            "liger_kernel_config: {fused_linear_cross_entropy: false}"
        )
    return [f"{KEY} cannot be used with {problem}" for problem in found] + parallel(value_of("parallelism_config"))


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
