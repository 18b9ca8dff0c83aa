"""Axolotl: the ``cv_loss`` key in its schema, and the objective in its model and trainer."""

import sys
from typing import Any

try:
    from axolotl.integrations.base import BasePlugin
    from axolotl.utils.logging import get_logger
    from pydantic import BaseModel, Field, model_validator

    from ..model.installation import install, installation
    from ..objective.config import KEY, ConfigError, CVLossConfig
    from ..objective.objective import Objective
    from .axolotl_columns import carry
    from .axolotl_keys import MAMBA, conflicts, conflicts_of, misspelt, on_command_line, savers, spell_out
    from .transformers import ObjectiveTrainer, connect
except ImportError as error:
    # Axolotl prints an ImportError of a plugin and trains on without it. Any other error stops the run.
    raise RuntimeError(f"axolotl_cvloss.CVLossPlugin cannot be loaded, so the run stops here: {error}") from error

LOG = get_logger(__name__)


class CVLossArgs(BaseModel):
    """The key as part of Axolotl's schema."""

    cv_loss: Any = Field(
        default=None, description="Objective to train with: a loss, a mapping of losses to weights, or terms."
    )

    @model_validator(mode="before")
    @classmethod
    def check_cv_loss(cls, data: Any) -> Any:
        prepare(data)
        # Axolotl drops keys that it does not know, so a misspelt one would change nothing.
        if problem := misspelt(data, cls.model_fields):
            raise ValueError(problem)
        if KEY not in data:
            return data
        problems = conflicts(data.get)
        try:
            config = CVLossConfig.parse(data[KEY])
            problems += conflicts_of(config, data.get)
            data[KEY] = config.dump()
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        return data

    @model_validator(mode="after")
    def check_defaults(self) -> "CVLossArgs":
        """Keys that have defaults as soon as a plugin is listed, as that of diffusion has."""
        if self.cv_loss is not None and (problems := conflicts(lambda key: getattr(self, key, None))):
            raise ValueError("\n".join(problems))
        return self


def prepare(data: Any) -> None:
    """Spell the key out, and switch off what would compute another loss in its place."""
    spell_out(data)
    if KEY in data:
        for key, note in savers(data.get).items():
            data[key] = False
            LOG.info(note)


class CVLossPlugin(BasePlugin):
    """Train with the losses of the ``cv_loss`` key. Without the key it does nothing."""

    def get_input_args(self) -> str:
        return f"{CVLossArgs.__module__}.{CVLossArgs.__name__}"

    def register(self, cfg: Any) -> None:
        """The first hook: the config is what the YAML and Axolotl's command line gave, and no plugin has read it."""
        for key, value in on_command_line(sys.argv[1:]).items():
            cfg[key] = value
        prepare(cfg)
        try:
            carry(CVLossConfig.parse(_plain(cfg[KEY])) if cfg.get(KEY) is not None else None)
        except ConfigError:
            carry(None)  # the schema says what is wrong

    def pre_model_load(self, cfg: Any) -> None:
        if cfg.get(KEY) is not None and cfg.get("model_config_type") == "mamba":
            raise ValueError(f"{KEY} cannot be used with {cfg['base_model']}: {MAMBA}")

    def post_model_load(self, cfg: Any, model: Any) -> None:
        if cfg.get(KEY) is not None:
            install(model, Objective.from_config(_plain(cfg[KEY])))

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Not for callbacks: of the hooks that see the trainer, `axolotl evaluate` has only this one."""
        if cfg.get(KEY) is None:
            LOG.warning(f"{KEY}: the key is not in the config, so training uses the loss of the model")
            return []
        connect(trainer)
        objective = installation(trainer.model).objective  # type: ignore[union-attr]
        LOG.info(f"cv_loss: training with {objective}; every term and the NLL are logged as cv_loss/...")
        LOG.info(
            "cv_loss: tokens are counted over the whole accumulation window and all ranks, so the gradient is the one "
            "of one big batch"
        )
        return []

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        if cfg.get(KEY) is not None and not isinstance(trainer, ObjectiveTrainer):
            raise RuntimeError(f"{KEY}: this version of Axolotl made a trainer that the objective was not attached to")


def _plain(value: Any) -> Any:
    """Axolotl's DictDefault as plain data; it answers None for keys it does not have."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
