"""transformers' Trainer: counting over the accumulation window, and logging the terms."""

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.utils import logging

from ..engine.sets import SetCounts
from ..installation import Evaluation, Installation, installation
from ..objective import Objective, ObjectiveResult
from ..rows import COMPLETION
from ..vocabulary import count_labels
from .example_weights import WeightCollator
from .trl_keys import parallel, savers

logger = logging.get_logger(__name__)


class ObjectiveTrainer(Trainer):
    """What a Trainer needs beside an installed objective. ``attach`` puts it right above Trainer in the bases."""

    cv_loss: Installation
    _cv_records: dict[bool, list[tuple[int, ObjectiveResult]]]
    _cv_reported: bool
    _cv_used: bool

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Trained rows of all micro-batches of a step, on all ranks, as the objective counts them.

        In an evaluation each batch has a mean of its own: its last batches may be filled with rows that count already.
        """
        if self.cv_loss.evaluation or not batch_samples or "labels" not in batch_samples[0]:
            return None
        objective = self.cv_loss.objective
        totals = torch.zeros(len(objective.selectors), dtype=torch.long, device=device)
        for batch in batch_samples:
            shifted = batch.get("shift_labels")
            rows = objective.select_rows(
                batch["labels"] if shifted is None else shifted,
                shift=shifted is None,
                **{name: batch.get(name) for name in ("position_ids", "attention_mask", "input_ids")},
            )
            totals += torch.stack([rows.scopes[selector].sum() for selector in objective.selectors]).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            totals = self.accelerator.gather(totals[None]).sum(0)
        self.cv_loss.counts = dict(zip(objective.selectors, totals.clamp_min(1), strict=True))
        return self.cv_loss.counts[COMPLETION]

    def _cv_record(self, result: ObjectiveResult) -> None:
        self._cv_used = self._cv_used or self.cv_loss.model.training
        result = replace(result, loss=result.loss.detach())
        self._cv_records[self.cv_loss.model.training].append((self.state.global_step, result))

    def _cv_flush(self, training: bool) -> dict[str, float]:
        """What is logged of the batches since the last call, on all ranks, by name.

        ``cv_loss/nll`` and ``cv_loss/TERM`` are means over the rows of a step and then over steps, as Trainer's own
        ``loss`` is; so in training ``loss`` is the weighted sum of the terms (``eval_loss`` is a mean over examples of
        the means of their batches). ``cv_loss/TERM/tokens`` is the number of rows of a step, ``.../sets`` that of sets,
        ``.../classes`` that of classes present in a set. An evaluation is one step, and nothing is logged of one
        without a trained row on any rank.
        """
        records, self._cv_records[training] = self._cv_records[training], []
        terms = [term.name for term in self.cv_loss.objective.terms]
        names = [*terms, "nll"]
        steps = sorted({step for step, _ in records}) if training else [self.state.global_step]
        # For each step: the sums of values over rows, and the numbers of rows, sets and classes.
        sums = torch.zeros(len(steps), 4, len(names), dtype=torch.float64)
        for step, result in records:
            values = torch.stack([*(result.terms[name] for name in terms), result.nll])
            values = values.detach().cpu().double()  # in this order: Apple's GPUs have no float64
            self._cv_check(step, training, names, values)
            rows = torch.tensor([*(result.counts[name] for name in terms), result.n_tokens])
            sets = [result.sets.get(name, SetCounts(0, 0)) for name in names]
            counts = torch.tensor([[s.sets for s in sets], [s.classes for s in sets]])
            sums[steps.index(step)] += torch.cat([torch.stack([values * rows, rows]), counts])
        if self.args.world_size > 1:
            sums = self.accelerator.gather(sums.to(self.args.device, torch.float32)[None]).sum(0).cpu()
        if not training and not sums[:, 1].any():
            return {}
        means = (sums[:, 0] / sums[:, 1].clamp_min(1)).mean(0).tolist()
        _, rows, sets, classes = sums.mean(0).tolist()
        logs = {f"cv_loss/{name}": mean for name, mean in zip(names, means, strict=True)}
        for number, term in enumerate(self.cv_loss.objective.terms):
            logs[f"cv_loss/{term.name}/tokens"] = rows[number]
            if sets[number]:
                logs[f"cv_loss/{term.name}/sets"] = sets[number]
                logs[f"cv_loss/{term.name}/classes"] = classes[number] / sets[number]
            now = term.at(self.cv_loss.progress)
            for name in term.schedules if training else ():
                logs[f"cv_loss/{term.name}/{name}"] = now.weight if name == "weight" else now.parameters[name]
        return logs

    def _cv_check(self, step: int, training: bool, names: list[str], values: Tensor) -> None:
        wrong = [name for name, value in zip(names, values.tolist(), strict=True) if not math.isfinite(value)]
        if wrong and not self._cv_reported:
            self._cv_reported = True
            when = f"in step {step + 1}" if training else f"in the evaluation after step {step}"
            logger.error(
                f"cv_loss: {', '.join(wrong)} became NaN or infinite {when} on rank {self.args.process_index}. The "
                "logits there hold NaN or infinite values; a lower learning rate or max_grad_norm helps where "
                "training diverged."
            )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.cv_loss.progress = self.state.global_step / max(1, self.state.max_steps)
        loss = super().training_step(*args, **kwargs)
        self._cv_demand_use()
        return loss

    def _cv_demand_use(self) -> None:
        if not self._cv_used:
            raise RuntimeError(
                f"cv_loss: {type(self).__name__} computes a loss of its own and never asks the model for one, so the "
                "objective would not be trained with; use another trainer, or remove cv_loss"
            )

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        self.cv_loss.evaluation = Evaluation(not prediction_loss_only, self._cv_own_rows(inputs))
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        finally:
            self.cv_loss.evaluation = None

    def _cv_own_rows(self, inputs: dict[str, Any]) -> int | None:
        """How many rows of a batch are no repetition; accelerate fills the last batches of several ranks up.

        It has the rows of rank 0 first, and knows how many of all are not repeated. None: all, or it cannot be told, as
        where a batch is one line of packed documents, or the dataset has no length.
        """
        state, labels = self.accelerator.gradient_state, inputs.get("labels")
        if self.args.world_size == 1 or labels is None or not state.end_of_dataloader or state.remainder <= 0:
            return None
        loader = state.active_dataloader
        sampler = loader.batch_sampler
        if loader is not self.callback_handler.eval_dataloader or not getattr(sampler, "even_batches", True):
            return None
        cut = isinstance(loader, DataLoaderDispatcher) or getattr(sampler, "split_batches", False)
        if not cut and len(labels) != self.args.eval_batch_size:
            return None
        return max(0, state.remainder - self.args.process_index * len(labels))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._cv_records[False].clear()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{k}": v for k, v in self._cv_flush(training=False).items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self._cv_demand_use()  # here too, for a trainer with a training_step of its own
        if "loss" in logs and self._cv_records[True]:
            logs.update(self._cv_flush(training=True))
        # Perplexity is exp of the NLL, not of the objective.
        for key in [key for key in logs if key == "ppl" or key.endswith("_ppl")]:
            if (nll := logs.get(f"{key[:-3]}cv_loss/nll")) is not None:
                logs[key] = math.exp(min(nll, 700.0))
        super().log(logs, *args, **kwargs)


def _complete(objective: Objective, trainer: Trainer) -> Objective:
    """The objective with what its losses need to know of the tokenizer and of the training set."""
    tokenizer, label_counts = objective.tokenizer, objective.label_counts
    if objective.needs_tokenizer:
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        if not hasattr(tokenizer, "get_vocab"):
            raise RuntimeError(
                f"cv_loss: {objective} needs a tokenizer; give the trainer one as processing_class, or the objective: "
                "Objective.from_config(..., tokenizer=tokenizer)"
            )
    if objective.needs_label_counts:
        data = trainer.train_dataset
        if not hasattr(data, "__len__") or "labels" not in (data[0] if len(data) else ()):
            raise RuntimeError(
                f"cv_loss: {objective} needs to know how often each token is a label, and the trainer has no "
                "train_dataset of known length with labels to count; give them: "
                "Objective.from_config(..., label_counts=counts)"
            )
        rows = tqdm(range(len(data)), desc="cv_loss: counting labels", disable=not trainer.is_world_process_zero())
        label_counts = count_labels(data[i]["labels"] for i in rows)
    return Objective(objective.config, tokenizer=tokenizer, label_counts=label_counts, diagnose=objective.diagnose)


def _recorder(trainer: ObjectiveTrainer) -> Callable[[ObjectiveResult], None]:
    """Tells a trainer of results as long as somebody else wants it: its optimizer is larger than the model."""
    known = weakref.ref(trainer)

    def record(result: ObjectiveResult) -> None:
        if (trainer := known()) is not None:
            trainer._cv_record(result)

    return record


def switch_off(args: Any) -> None:
    """Take Liger's cross-entropy out of training arguments; Trainer brings its kernels into the model in train()."""
    for name, note in savers(partial(getattr, args)).items():
        args.liger_kernel_config = {**(args.liger_kernel_config or {}), name: False}
        logger.warning(note)


def attach(trainer: Trainer) -> None:
    """Make a trainer count and log for the objective installed in its model.

    Raises:
        RuntimeError: No objective is installed, or the trainer cannot give the right gradient.
    """
    installed = installation(trainer.model)
    if installed is None:
        raise RuntimeError("cv_loss: no objective is installed in the trainer's model")
    if trainer.args.n_gpu > 1:
        raise RuntimeError(
            "cv_loss: DataParallel (several GPUs in one process) copies the model and loses the objective; start one "
            "process a GPU with accelerate launch or torchrun"
        )
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        raise RuntimeError(
            "cv_loss: the trainer has a loss of its own (compute_loss_func or label_smoothing_factor); remove it"
        )
    # From TrainingArguments, the command line or the environment, or from a model that is split already.
    if problems := parallel(getattr(trainer.accelerator, "parallelism_config", None)):
        raise RuntimeError("\n".join(problems))
    switch_off(trainer.args)
    installed.objective = _complete(installed.objective, trainer)
    if column := installed.objective.config.example_weights:
        trainer.data_collator = WeightCollator(trainer.data_collator, column)
    # Behind all classes of the trainer, just before Trainer: their log() adds to the logs first.
    cls = type(trainer)
    bases = (ObjectiveTrainer,) if cls is Trainer else (cls, ObjectiveTrainer)
    trainer.__class__ = type(cls.__name__, bases, {"__module__": cls.__module__})
    assert isinstance(trainer, ObjectiveTrainer)
    trainer.cv_loss = installed
    trainer._cv_records = {True: [], False: []}
    trainer._cv_reported = trainer._cv_used = False
    installed.listeners = [_recorder(trainer)]
    # Without these two the gradient depends on how tokens fall into micro-batches and ranks.
    trainer.model_accepts_loss_kwargs = True
    trainer.args.average_tokens_across_devices = True
