"""peft's prompt learning: what stands before a batch when it comes to the model. Nothing of peft is imported."""

from typing import Any

import torch

from ..engine.rows import IGNORE_INDEX
from ..objective.config import CVLossConfig

# They stand in the cache of keys and values, before no token of the batch and no label.
IN_THE_CACHE = ("PREFIX_TUNING", "CARTRIDGE")


def virtual_tokens(model: Any) -> int:
    """How many virtual tokens peft puts before the embeddings and the labels of a batch.

    The last of them predicts the first token of the batch, so where that has a label there is a row more.
    """
    config = _prompt_learning(model)
    return config.num_virtual_tokens if config is not None and config.peft_type not in IN_THE_CACHE else 0


def conflicts(model: Any, config: CVLossConfig) -> list[str]:
    """What of an objective cannot be had with the prompt learning of a model."""
    if (prompt := _prompt_learning(model)) is None:
        return []
    name = f"peft's {type(prompt).__name__}"
    if prompt.peft_type == "CPT":
        return [f"cv_loss cannot be used with {name}: it computes a loss of its own; use PromptTuningConfig"]
    if not virtual_tokens(model):
        return []
    if keys := config.columns.values():
        return [
            f"{next(iter(keys))} cannot be used with {name}: it puts virtual tokens before the tokens that the "
            "column has numbers for; use PrefixTuningConfig or LoRA, or leave it out"
        ]
    wanted = [
        f"{what} of {term.loss}"
        for term in config.terms
        for what, there in (("scope: sequence", term.scope == "sequence"), ("goldfish", term.goldfish is not None))
        if there
    ]
    if wanted:
        return [
            f"cv_loss: {' and '.join(wanted)} cannot be used with {name}: it gives the model embeddings in the place "
            "of the tokens that are needed for this; use PrefixTuningConfig or LoRA, or leave it out"
        ]
    return []


def with_virtual_tokens(count: int, batch: Any) -> Any:
    """The labels and the mask of a batch as the model gets them; positions and tokens it does not get."""
    if not count:
        return batch
    values = {"labels": IGNORE_INDEX, "attention_mask": 1}
    return {
        name: torch.nn.functional.pad(batch[name], (count, 0), value=value)
        for name, value in values.items()
        if batch.get(name) is not None
    }


def _prompt_learning(model: Any) -> Any:
    """The config of a peft model's active adapter, where that is prompt learning."""
    config = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
    return config if getattr(config, "is_prompt_learning", False) else None
