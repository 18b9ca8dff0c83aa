"""Keys of Axolotl's YAML that ``cv_loss`` cannot be used with. Imports no host, so that anybody can check a config."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any

from ..config import KEY

# Keys that bring another loss, or split a row of logits over ranks, and what to do instead.
CONFLICTS = {
    "cut_cross_entropy": "it replaces the loss; remove it (and its plugin), cv_loss has a cross_entropy term",
    "liger_cross_entropy": "it replaces the loss; set it to false, the other Liger kernels may stay",
    "liger_fused_linear_cross_entropy": "it replaces the loss; set it to false, the other Liger kernels may stay",
    "flash_attn_cross_entropy": "it replaces the loss; remove it, cv_loss has a cross_entropy term",
    "chunked_cross_entropy": "it replaces the loss; remove it, cv_loss works in chunks itself",
    "use_eaft": "it replaces the loss; remove it",
    "kd_trainer": "distillation brings its own loss; train with one or the other",
    "diffusion": "diffusion training brings its own loss; remove its plugin or train without cv_loss",
    "hatchery": "it trains on a remote machine that knows nothing of cv_loss; remove its plugin",
    "rl": "preference and reinforcement learning bring their own losses; use cv_loss for supervised fine-tuning",
    "reward_model": "a reward model has no tokens to predict; use cv_loss for supervised fine-tuning",
    "process_reward_model": "a reward model has no tokens to predict; use cv_loss for supervised fine-tuning",
    "orpo_alpha": "ORPO brings its own loss; remove it",
}
# Degrees above 1 of these are refused.
PARALLEL = {
    "context_parallel_size": "it splits a sequence over GPUs, which cv_loss cannot follow yet; use FSDP instead",
    "sequence_parallel_degree": "it splits a sequence over GPUs, which cv_loss cannot follow yet; use FSDP instead",
    "tensor_parallel_size": "it splits the vocabulary over GPUs, which cv_loss cannot follow yet; use FSDP instead",
}


def conflicts(value_of: Callable[[str], Any]) -> list[str]:
    """What is wrong with a config that has ``cv_loss``, one line a key; ``value_of`` gives the value of a key."""
    found = [f"{KEY} cannot be used with {key}: {why}" for key, why in CONFLICTS.items() if value_of(key)]
    for key, why in PARALLEL.items():
        if str(value_of(key) or 1) != "1":
            found.append(f"{KEY} cannot be used with {key} above 1: {why}")
    return found


def misspelt(keys: Iterable[Any], known: Iterable[str] = ()) -> str | None:
    """What is wrong where one of the keys is nearly ``cv_loss``; None where none is."""
    unknown = {str(key).lower(): key for key in keys if key not in known}
    for match in difflib.get_close_matches(KEY, unknown, n=1, cutoff=0.8):
        return f"unknown key {unknown[match]}: did you mean {KEY}?"
    return None
