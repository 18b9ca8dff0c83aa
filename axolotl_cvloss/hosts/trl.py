"""TRL: ``cv_loss`` in SFTConfig, and the objective in the place of SFTTrainer's own loss.

SFTTrainer computes its loss itself: in 1.9 on logits or in a forward of its own, later under a fused head whose
log-probabilities make the loss. Both pass by what a model returns as its loss. So ``compute_loss`` goes to
transformers' Trainer here, and what SFTTrainer logs is taken from the objective.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import Trainer
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer import sft_trainer

from ..model.installation import install, installation
from ..objective.config import KEY, ConfigError, CVLossConfig
from ..objective.objective import Objective
from . import prune_keys
from .columns import missing, per_token
from .pruning import streamed
from .transformers import ObjectiveTrainer, attach, switch_off
from .trl_keys import conflicts, conflicts_of, no_adapter, parallel

logger = logging.get_logger(__name__)


@dataclass
class CVLossSFTConfig(SFTConfig):
    """SFTConfig with the key ``cv_loss``. Without the key it is SFTConfig."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*SFTConfig._VALID_DICT_FIELDS, KEY]

    cv_loss: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Objective to train with: a loss, a mapping of losses to weights, or terms."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cv_loss is None:
            return
        problems = conflicts(partial(getattr, self))
        try:
            config = CVLossConfig.parse(self.cv_loss)
            problems += conflicts_of(config, lambda name: getattr(self, name, None))
            self.cv_loss = config.dump()
        except ConfigError as error:
            problems.append(str(error))
        if problems:
            raise ConfigError("\n".join(problems))
        self.loss_type = "nll"


class CVLossSFTTrainer(SFTTrainer):
    """SFTTrainer with the objective of ``args.cv_loss``. Without the key it is SFTTrainer.

    It takes what SFTTrainer takes, but for ``compute_loss_func``, and logs the same metrics, beside the terms.
    The model keeps the objective afterwards, for evaluations; ``uninstall(model)`` leaves it as it was found, which a
    plain SFTTrainer on it needs.
    """

    def __init__(self, model: Any, args: SFTConfig | None = None, *more: Any, **named: Any) -> None:
        if not isinstance(args, CVLossSFTConfig):
            given = type(args).__name__
            raise TypeError(f"{type(self).__name__} needs args=CVLossSFTConfig({KEY}=...), not a {given}")
        if args.cv_loss is None:
            logger.warning(f"{KEY}: the key is not in the config, so training uses TRL's own loss")
            super().__init__(model, args, *more, **named)
            return
        if named.get("compute_loss_func") is not None:
            raise ConfigError(
                f"{KEY} cannot be used with compute_loss_func: it brings another loss; remove it and register yours "
                "with register_loss"
            )
        config = CVLossConfig.parse(args.cv_loss)
        bound = inspect.signature(SFTTrainer.__init__).bind_partial(self, model, args, *more, **named).arguments
        if config.prune is not None and streamed(bound.get("train_dataset")):
            raise ConfigError("\n".join(prune_keys.conflicts(streamed="a streamed dataset")))
        adapted = not isinstance(model, str) or bound.get("peft_config") is not None  # of a model the model will tell
        if problems := no_adapter(config, adapted):
            raise ConfigError("\n".join(problems))
        _check_columns(bound, config)
        switch_off(args)
        with _adapters_on_the_head():
            super().__init__(model, args, *more, **named)
        # accelerate may have been told on the command line or in the environment.
        if problems := parallel(getattr(self.accelerator, "parallelism_config", None)):
            raise ConfigError("\n".join(problems))
        objective = Objective.from_config(args.cv_loss, diagnose=True)
        install(self.model, objective)
        attach(self)
        if columns := objective.config.columns:  # SFTTrainer has a list of the columns that it keeps
            self._set_signature_columns_if_needed()
            self._signature_columns.extend(columns)
        # SFTTrainer puts the coefficient of the auxiliary loss into the config, which most models have read by then.
        if self.aux_loss_enabled and hasattr(self.cv_loss.model, "router_aux_loss_coef"):
            self.cv_loss.model.router_aux_loss_coef = self.model.config.get_text_config().router_aux_loss_coef

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: SFTConfig, packing: bool, *more: Any, **named: Any
    ) -> Any:
        """SFTTrainer's, but with the columns that the key names: it would neither cut nor pack them, but drop them."""
        key = getattr(args, KEY, None)
        config = None if key is None else CVLossConfig.parse(key)
        if config is None or not config.columns:
            return super()._prepare_dataset(dataset, processing_class, args, packing, *more, **named)
        # Tokens and labels first, in full; then they are cut or packed together with what is beside them.
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset, whole.use_liger_kernel = None, False, False
        dataset = super()._prepare_dataset(dataset, processing_class, whole, False, *more, **named)
        with PartialState().main_process_first():
            cut = None if packing or args.max_length is None else (args.max_length, args.truncation_mode)
            dataset, there = per_token(dataset, config, cut, self._tokenizer, getattr(self, "chat_template", None))
            if not packing:
                whole.max_length, whole.shuffle_dataset = args.max_length, args.shuffle_dataset
                return super()._prepare_dataset(dataset, processing_class, whole, False, *more, **named)
            dataset = dataset.select_columns(["input_ids", "labels", *there])
            if args.shuffle_dataset:
                dataset = dataset.shuffle(seed=args.seed)
            dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
            return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | float | None = None,
    ) -> Any:
        if not isinstance(self, ObjectiveTrainer):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs.pop("_prediction_loss_only", None)  # SFTTrainer's word to its own loss
        inputs["use_cache"] = False
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        self._record_metrics(inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *more: Any, **named: Any) -> Any:
        if not isinstance(self, ObjectiveTrainer):
            return super().prediction_step(model, inputs, prediction_loss_only, *more, **named)
        # Newer versions of SFTTrainer hand out the logits by themselves and do not come by Trainer's step.
        with self._cv_evaluating(inputs, prediction_loss_only):
            return super().prediction_step(model, inputs, prediction_loss_only, *more, **named)

    def _record_metrics(self, inputs: dict[str, Any], outputs: Any) -> None:
        """Entropy, token accuracy, tokens and auxiliary loss of a micro-batch on all ranks, as SFTTrainer has them."""
        training = self.model.training
        result = self._cv_last
        trained, means = result.n_tokens, result.diagnostics
        mask = inputs.get("attention_mask")
        seen = inputs["input_ids"].numel() if mask is None else mask.sum()  # without a mask there is no padding
        aux_loss = outputs.aux_loss.detach() if self.aux_loss_enabled else 0.0
        numbers = [trained, seen, trained * means["entropy"], trained * means["accuracy"], aux_loss]
        local = torch.stack([torch.as_tensor(n, dtype=torch.float32, device=result.nll.device) for n in numbers])
        totals = self.accelerator.gather(local[None]).cpu().double().sum(0)  # float32 holds the counts of a rank
        trained, seen, entropy, correct, aux_loss = totals.tolist()
        if training:
            self._total_train_tokens += int(seen)
        metrics = self._metrics["train" if training else "eval"]
        metrics["entropy"].append(entropy / max(1, trained))
        metrics["mean_token_accuracy"].append(correct / max(1, trained))
        metrics["num_tokens"] = [self._total_train_tokens]
        if self.aux_loss_enabled:
            metrics["aux_loss"].append(aux_loss / self.args.world_size)


def _check_columns(given: Mapping[str, Any], config: CVLossConfig) -> None:
    """Raise for datasets of a trainer that have not got the columns that the key names."""
    evaluation = given.get("eval_dataset")
    sets = [(given.get("train_dataset"), False)]
    sets += [(each, True) for each in (evaluation.values() if isinstance(evaluation, Mapping) else [evaluation])]
    for dataset, evaluated in sets:
        if problem := missing(dataset, config, evaluated):
            raise ConfigError(problem)


def _only_for_ours(init: Callable[..., None]) -> Callable[..., None]:
    """Trainer's ``__init__``, which refuses a config with the key to every trainer but ours.

    Each of them takes the config, as it is one of transformers', and would train with a loss of its own. Their ways to
    look at ``loss_type`` differ between versions, and with Liger's kernels there is none; they all come by here. So
    does a model that still has an objective: SFTTrainer needs logits where that hands out none.
    """

    @wraps(init)
    def checked(self: Trainer, *given: Any, **named: Any) -> None:
        keys = [c.cv_loss for c in (*given, *named.values()) if isinstance(c, CVLossSFTConfig)]
        if any(key is not None for key in keys) and not isinstance(self, CVLossSFTTrainer):
            raise ConfigError(f"{KEY}: only CVLossSFTTrainer trains with it, and this is a {type(self).__name__}")
        model = named.get("model", given[0] if given else None)
        own = isinstance(self, SFTTrainer) and all(key is None for key in keys)
        if own and isinstance(model, torch.nn.Module) and (left := installation(model)) is not None:
            raise ConfigError(
                f"{KEY}: the model has the objective {left.objective} from before, and {type(self).__name__} would "
                "train with its own loss; call uninstall(model), or train with CVLossSFTTrainer"
            )
        init(self, *given, **named)

    return checked


Trainer.__init__ = _only_for_ours(Trainer.__init__)


@contextmanager
def _adapters_on_the_head() -> Iterator[None]:
    """Newer versions of TRL refuse adapters on the head, as their own loss passes them by; the objective does not."""
    known = vars(sft_trainer).get("BaseTunerLayer")
    if known is None:
        yield
        return
    sft_trainer.BaseTunerLayer = ()  # isinstance(head, ()) is False
    try:
        yield
    finally:
        sft_trainer.BaseTunerLayer = known
