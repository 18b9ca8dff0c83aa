"""Axolotl: the ``cv_loss`` key in its schema, and the objective in its model and trainer."""

from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger
from pydantic import BaseModel, Field, model_validator

from ..config import KEY, CVLossConfig
from ..install import install, installation
from ..objective import Objective
from .transformers import attach

LOG = get_logger(__name__)

# Keys that bring another loss, or split a row of logits over ranks, and what to do instead.
CONFLICTS = {
    "cut_cross_entropy": "it replaces the loss; remove it (and its plugin), cv_loss has a cross_entropy term",
    "liger_cross_entropy": "it replaces the loss; set it to false, the other Liger kernels may stay",
    "liger_fused_linear_cross_entropy": "it replaces the loss; set it to false, the other Liger kernels may stay",
    "chunked_cross_entropy": "it replaces the loss; remove it, cv_loss works in chunks itself",
    "use_eaft": "it replaces the loss; remove it",
    "kd_trainer": "distillation brings its own loss; train with one or the other",
    "diffusion": "diffusion training brings its own loss; train with one or the other",
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


class CVLossArgs(BaseModel):
    """The key as part of Axolotl's schema."""

    cv_loss: Any = Field(
        default=None, description="Objective to train with: a loss, a mapping of losses to weights, or terms."
    )

    @model_validator(mode="before")
    @classmethod
    def check_cv_loss(cls, data: Any) -> Any:
        if KEY not in data:
            return data
        problems = [f"{KEY} cannot be used with {key}: {why}" for key, why in CONFLICTS.items() if data.get(key)]
        for key, why in PARALLEL.items():
            if str(data.get(key) or 1) != "1":
                problems.append(f"{KEY} cannot be used with {key} above 1: {why}")
        try:
            data[KEY] = CVLossConfig.parse(data[KEY]).dump()
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        return data


class CVLossPlugin(BasePlugin):
    """Train with the losses of the ``cv_loss`` key. Without the key it does nothing."""

    def get_input_args(self) -> str:
        return f"{CVLossArgs.__module__}.{CVLossArgs.__name__}"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        if cfg.get(KEY) is not None:
            install(model, Objective.from_config(_plain(cfg[KEY])))

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if cfg.get(KEY) is None:
            return
        attach(trainer)
        objective = installation(trainer.model).objective  # type: ignore[union-attr]
        LOG.info(f"cv_loss: training with {objective}; every term and the NLL are logged as cv_loss/...")
        LOG.info(
            "cv_loss: tokens are counted over the whole accumulation window and all ranks, so the gradient is the one "
            "of one big batch"
        )


def _plain(value: Any) -> Any:
    """Axolotl's DictDefault as plain data; it answers None for keys it does not have."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
