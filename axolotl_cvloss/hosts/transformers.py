"""transformers' Trainer: counting over the accumulation window, and logging the terms."""

import inspect
import math
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Trainer
from transformers.utils import logging

from ..engine.examples import of_all_processes
from ..engine.rows import COMPLETION, Rows
from ..engine.vocabulary import count_labels
from ..model.installation import (
    DOCUMENT_WEIGHTS,
    NUMBER,
    Evaluation,
    Installation,
    columns_as_bits,
    installation,
    without_adapters,
)
from ..objective.objective import Objective, ObjectiveResult
from . import pruning
from .columns import ColumnCollator
from .logs import Logs
from .short_answers import FEW_TOKENS, measures_overlap, told
from .sums import FEW
from .trl_keys import parallel, savers
from .virtual_tokens import conflicts, virtual_tokens, with_virtual_tokens

logger = logging.get_logger(__name__)

PATIENCE = 25  # steps in a row whose objective is NaN
ROUNDING = torch.finfo(torch.bfloat16).eps  # of a trainer's arithmetic with its loss


class ObjectiveTrainer(Trainer):
    """What a Trainer needs beside an installed objective. ``attach`` puts it right above Trainer in the bases."""

    cv_loss: Installation
    _cv_logs: dict[bool, Logs]  # of training and of evaluation
    _cv_last: ObjectiveResult  # of the last micro-batch
    _cv_expected: Tensor | float  # the gradient that must come back for its loss
    _cv_gradient: Tensor | None  # that which came
    _cv_used: bool  # a gradient came for some micro-batch
    _cv_asked: bool  # the model was asked for its loss in this training_step
    _cv_compared: bool
    _cv_told: bool  # of short answers, or that there are none
    _cv_reported: bool
    _cv_lost: set[int]  # steps since the last _cv_check of which the objective was NaN on this rank
    _cv_checked: int  # the last step of _cv_check
    _cv_virtual_tokens: int
    _cv_trained: Tensor  # rows of the step, on all ranks
    _cv_counted: list[Rows | None]  # of each micro-batch of the step, until it begins
    _cv_pruning: pruning.Pruning | None

    def get_train_dataloader(self) -> Any:
        if self._cv_pruning is None:
            return super().get_train_dataloader()
        trainer: Any = self
        given = trainer.train_dataset, trainer.data_collator
        trainer.train_dataset = pruning.numbered(trainer.train_dataset)
        trainer.data_collator = pruning.NumberCollator(trainer.data_collator)
        trainer._set_signature_columns_if_needed()
        if NUMBER not in trainer._signature_columns:
            trainer._signature_columns.append(NUMBER)
        try:
            return pruning.place(super().get_train_dataloader(), self._cv_pruning)
        finally:
            trainer.train_dataset, trainer.data_collator = given

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """The epoch to go on with, and its micro-batches so far. Trainer finds them in the length of whole epochs."""
        found = super()._init_training_state(*args, **kwargs)
        if self._cv_pruning is None:
            return found
        given = inspect.signature(super()._init_training_state).bind(*args, **kwargs).arguments
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        step = self.get_total_train_batch_size(self.args)
        steps = given["max_steps"], given["num_update_steps_per_epoch"]
        self._cv_pruning.start(len(self.train_dataset), *steps, step, seed)
        if not self.state.global_step:  # from the beginning
            return found
        epoch, done = self._cv_pruning.resume(given["resume_from_checkpoint"], self.args.process_index == 0)
        return epoch, done * self.args.gradient_accumulation_steps

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Trained rows of all micro-batches of a step, on all ranks, as the objective counts them.

        In an evaluation each batch has a mean of its own: its last batches may be filled with rows that count already.
        """
        if self.cv_loss.evaluation:
            return None
        objective = self.cv_loss.objective
        sums = torch.zeros(len(objective.selectors), dtype=torch.float64)
        trained = documents = 0
        self._cv_counted = [self._cv_rows(batch) for batch in batch_samples]
        for rows in self._cv_counted:
            if rows is None:
                continue  # not the end of it: what follows is done by all processes together
            sums += torch.tensor([rows.masses[selector] for selector in objective.selectors], dtype=torch.float64)
            trained += int(rows.scopes[COMPLETION].sum())
            if objective.config.examples is not None:
                documents += len(rows.of_documents()[2])
        totals = torch.cat([sums, torch.tensor([trained, documents])])
        totals = totals.to(device, torch.float32 if device.type == "mps" else torch.float64)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            totals = self.accelerator.gather(totals[None]).sum(0)
        totals = totals.clamp_min(1)
        *masses, self._cv_trained, documents = totals.long() if objective.config.examples is None else totals
        self.cv_loss.counts = dict(zip(objective.selectors, masses, strict=True))
        if objective.config.examples is not None:
            self._cv_logs[True].scale = float(documents / masses[0])
        # What goes through the model must be no fraction: FSDP casts these to bfloat16 on the way.
        return self._cv_trained.long()

    def _cv_record(self, result: ObjectiveResult) -> None:
        training, terms = self.cv_loss.model.training, self.cv_loss.objective.terms
        counts = None
        if training:
            known = self.cv_loss.counts
            counts = [
                *(known.get(term.rows, max(1, result.masses[term.name])) for term in terms),
                self._cv_trained if known else max(1, result.n_tokens),
            ]
            # Gradients are averaged over processes. Without a count the result is the micro-batch's own mean.
            part = 1.0 if self.cv_loss.counted else result.mass / known.get(COMPLETION, max(1, result.mass))
            self._cv_expected, self._cv_gradient = part * self.accelerator.num_processes, None
            self._cv_asked = result.loss.requires_grad
            if result.loss.requires_grad:
                result.loss.register_hook(self._cv_take_gradient)
            else:  # inside a checkpoint, which computes it again for the backward pass
                self._cv_used = True
        logs = self._cv_logs[training]
        logs.add(self.state.global_step, result, counts)
        if logs.waiting == FEW:
            self._cv_fold(training)
        self._cv_last = replace(result, loss=result.loss.detach())

    def _cv_take_gradient(self, gradient: Tensor) -> None:
        self._cv_gradient, self._cv_used = gradient.detach(), True

    def _cv_fold(self, training: bool) -> None:
        """Report the first value that is not finite, at most a few micro-batches after it was there."""
        logs = self._cv_logs[training]
        wrong = logs.fold()
        if training:
            self._cv_lost.update(step for step, values in wrong if logs.lost(values))
        if wrong and not self._cv_reported:
            self._cv_reported = True
            step, values = wrong[0]
            bad, why = logs.told(values)
            when = f"in step {step + 1}" if training else f"in the evaluation after step {step}"
            logger.error(f"cv_loss: {bad} became NaN or infinite {when} on rank {self.args.process_index}. {why}")

    def _cv_check(self) -> None:
        """Every few steps: stop where the objective was NaN in all of them, on whatever rank; all ranks stop alike."""
        step = self.state.global_step
        if not step or step % PATIENCE or step == self._cv_checked:
            return
        self._cv_checked = step
        self._cv_fold(training=True)
        lost = torch.tensor([[float(s in self._cv_lost) for s in range(step - PATIENCE, step)]])
        self._cv_lost.clear()
        lost = self._cv_of_all_processes(lost)
        if lost.any(0).all() and not os.environ.get("CVLOSS_GO_ON"):
            raise RuntimeError(
                f"cv_loss: the objective was NaN in all {PATIENCE} steps from {step - PATIENCE + 1} to {step}, so the "
                "run has stopped before it saves a model of NaN; an error in the log above says what became NaN first, "
                "and when. Go on from a checkpoint before that step (resume_from_checkpoint), with a lower learning "
                "rate or max_grad_norm where training diverged, or without the loss that gives NaN"
            )

    def _cv_flush(self, training: bool) -> dict[str, float]:
        """What is logged of the batches since the last call, on all ranks, by name."""
        self._cv_fold(training)
        return self._cv_logs[training].taken(self._cv_of_all_processes, self.cv_loss.progress)

    def _cv_of_all_processes(self, own: Tensor) -> Tensor:
        """(P, N) from (1, N) of each, in main memory."""
        if self.args.world_size > 1:
            return self.accelerator.gather(own.to(self.args.device, torch.float32)).cpu().to(own.dtype)
        return own

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._cv_lost, self._cv_checked = set(), 0
        output = super().train(*args, **kwargs)
        self.cv_loss.counts = {}  # they are those of the last step
        return output

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step; where documents are weighed by their losses, with the weights as a column."""
        samples, count = super().get_batch_samples(*args, **kwargs)
        objective, self.cv_loss.one_batch = self.cv_loss.objective, len(samples) == 1
        counted, self._cv_counted = self._cv_counted, []
        examples = objective.config.examples
        if examples is not None and examples.look == "step" and not self.cv_loss.one_batch:
            self.cv_loss.progress = self._cv_progress()
            if objective.weighs(self.cv_loss.progress):
                self._cv_look(samples, counted)
        return samples, count

    def _cv_look(self, samples: list[Any], counted: list[Rows | None]) -> None:
        """Put the weights of its documents into each of the micro-batches of a step, whose rows have been counted.

        They come from the losses of the documents of all, on all processes: of one forward pass each without gradient
        and in evaluation mode. A step of one micro-batch needs none of them, as its own pass knows the losses.
        """
        installed, objective = self.cv_loss, self.cv_loss.objective
        rows = {number: own for number, own in enumerate(counted) if own is not None}
        looked: list[Tensor] = []
        installed.looked = looked
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                for sample in samples:  # one without labels too: processes go in step
                    self.model_wrapped(**self._prepare_inputs(dict(sample)))
        finally:
            installed.looked = None
        found: list[tuple[Any, Tensor, Tensor]] = []
        for (number, own), logps in zip(rows.items(), looked, strict=True):
            found.append((samples[number], *objective.losses_of(own, logps.cpu().flatten()[own.tokens])))
        empty = torch.zeros(0, dtype=torch.float64)
        losses = torch.cat([empty, *(own for _, own, _ in found)])
        masses = torch.cat([empty, *(own for _, _, own in found)])
        losses, masses, here = of_all_processes(losses, masses, self.args.device)
        weights = objective.weights_of(losses, masses)[here].split([len(own) for _, own, _ in found])
        for (sample, _, _), weight in zip(found, weights, strict=True):
            sample[DOCUMENT_WEIGHTS] = weight.contiguous().view(torch.int64)

    def _prepare_inputs(self, inputs: Any) -> Any:
        columns = self.cv_loss.objective.config.columns
        return super()._prepare_inputs(columns_as_bits(inputs, columns) if columns else inputs)

    def _cv_rows(self, batch: Any) -> Rows | None:
        """The rows of a micro-batch, as the objective counts them; None where it has no labels."""
        batch = with_virtual_tokens(self._cv_virtual_tokens, batch)
        labels, shifted = batch.get("labels"), batch.get("shift_labels")
        if labels is None and shifted is None:
            return None
        return self.cv_loss.objective.select_rows(
            labels if shifted is None else shifted,
            shift=shifted is None,
            columns=self.cv_loss.columns(batch),
            **{name: batch.get(name) for name in ("position_ids", "attention_mask", "input_ids")},
        )

    def _cv_progress(self) -> float:
        """How much of training is done."""
        if self._cv_pruning is not None:
            return self._cv_pruning.progress
        return self.state.global_step / max(1, self.state.max_steps)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.cv_loss.progress = self._cv_progress()
        self._cv_asked = False
        self._cv_check()
        self.cv_loss.sample = self._cv_samples()
        try:
            loss = super().training_step(*args, **kwargs)
        finally:
            self.cv_loss.sample = False
        self._cv_compare(loss)
        return loss

    def _cv_samples(self) -> bool:
        """Whether this is the last micro-batch of a step that will be logged, of several terms."""
        step, state = self.state.global_step + 1, self.state
        logged = self.args.logging_strategy == "steps" and step % max(1, state.logging_steps) == 0
        first = self.args.logging_first_step and step == 1
        several = len(self.cv_loss.objective.terms) > 1
        return several and (logged or first) and self.accelerator.sync_gradients

    def _cv_compare(self, loss: Tensor | None = None) -> None:
        """Stop where the last micro-batch did not train with the objective, once and in full.

        What autograd has handed back for the objective tells, whatever a trainer does between the model and that. It
        may add something, as some adapters of peft do in the model; that is said.
        """
        if not self._cv_used or (self._cv_asked and self._cv_gradient is None):
            raise RuntimeError(
                f"cv_loss: {type(self).__name__} computes a loss of its own, so the objective would not be trained "
                "with; use another trainer, or remove cv_loss"
            )
        waits = self._cv_compared and self._cv_logs[True].waiting  # to ask the accelerator each time would slow it down
        if loss is None or self._cv_gradient is None or waits:
            return
        scaler = self.accelerator.scaler
        times = float(self._cv_gradient) / (1.0 if scaler is None else scaler.get_scale())
        expected = float(self._cv_expected)
        # DeepSpeed scales the loss by itself.
        if abs(times - expected) > ROUNDING * expected and not self.is_deepspeed_enabled:
            raise RuntimeError(
                f"cv_loss: {type(self).__name__} trains with {times:g} times the objective where {expected:g} times "
                "would be right, so with another loss. Its compute_loss must pass num_items_in_batch on to the model "
                "and return the model's loss times the number of processes; or use another trainer"
            )
        last = self._cv_last
        rest = float(loss) - times * (float(last.loss) + (0.0 if last.aux_loss is None else float(last.aux_loss)))
        if not self._cv_compared and abs(rest) > ROUNDING * abs(float(loss)):
            logger.warning(
                f"cv_loss: {type(self).__name__} or an adapter adds {rest:g} to the objective; that is in loss, but in "
                "no entry cv_loss/"
            )
        self._cv_compared = True

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any) -> Any:
        with self._cv_evaluating(inputs, prediction_loss_only):
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    @contextmanager
    def _cv_evaluating(self, inputs: dict[str, Any], prediction_loss_only: bool) -> Iterator[None]:
        """Tell the objective that what comes is a batch of an evaluation."""
        self.cv_loss.evaluation = Evaluation(not prediction_loss_only, self._cv_own_rows(inputs))
        try:
            yield
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
        self._cv_logs[False] = Logs(self.cv_loss.objective.terms, training=False)
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{k}": v for k, v in self._cv_flush(training=False).items()})
        return output

    def _cv_tell_of_short_answers(self, logs: dict[str, float]) -> None:
        """At the first steps that are logged: what is counted tells of them."""
        if self._cv_told or not self.is_world_process_zero():
            return
        self._cv_told = True
        counted = {
            term.loss.name: [logs.get(f"cv_loss/{term.name}/{what}", 0) for what in ("tokens", "sets")]
            for term in self.cv_loss.objective.terms
            if measures_overlap(term.loss, term.per) and not self.cv_loss.objective.config.papers_code
        }
        if names := [name for name, (tokens, sets) in counted.items() if 0 < tokens <= FEW_TOKENS * sets]:
            logger.warning(told(names, "the documents have"))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self._cv_fold(training=True)  # of the last batches too, where steps are not logged
        if "loss" in logs:
            self._cv_compare()  # here too, for a trainer with a training_step of its own
            logs.update(self._cv_flush(training=True))
            if self._cv_pruning is not None:
                logs["cv_loss/prune/left_out"] = self._cv_pruning.left_out
            self._cv_tell_of_short_answers(logs)
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
                "train_dataset of known length with labels to count: it is streamed, or gets its labels in the "
                "collator, as images do. Leave the loss out, or train with transformers' Trainer, after "
                "install(model, Objective.from_config(..., label_counts=counts)), and attach(trainer)"
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
    """Make a trainer count and log for the objective installed in its model, and say which one it is.

    The model keeps the objective after training, for evaluations; ``uninstall(model)`` gives it its own forward back.

    Raises:
        RuntimeError: No objective is installed, or the trainer cannot give the right gradient.
    """
    connect(trainer)
    if trainer.is_world_process_zero():
        objective = installation(trainer.model).objective  # type: ignore[union-attr]
        # Of what is less than a warning, Trainer and TRL show nothing unless they are told to.
        logger.warning(f"cv_loss: training with {objective}; every term and the NLL are logged as cv_loss/...")


def connect(trainer: Trainer) -> None:
    """``attach`` without a word, for hosts that have a log of their own."""
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
    config = installed.objective.config
    problems = conflicts(trainer.model, config) + (pruning.conflicts(trainer) if config.prune else [])
    if problems:
        raise RuntimeError("\n".join(problems))
    if problems := config.without_reference():
        raise RuntimeError("\n".join(problems))
    if problem := without_adapters(installed.model, installed.objective):
        raise RuntimeError(problem)
    switch_off(trainer.args)
    installed.objective = _complete(installed.objective, trainer)
    if wanted := config.columns:
        for name in ("data_collator", "eval_data_collator"):  # Axolotl has two
            if (collator := getattr(trainer, name, None)) is not None:
                setattr(trainer, name, ColumnCollator(collator, wanted))
    # Behind all classes of the trainer, just before Trainer: their log() adds to the logs first.
    cls = type(trainer)
    bases = (ObjectiveTrainer,) if cls is Trainer else (cls, ObjectiveTrainer)
    trainer.__class__ = type(cls.__name__, bases, {"__module__": cls.__module__})
    assert isinstance(trainer, ObjectiveTrainer)
    trainer.cv_loss = installed
    trainer._cv_logs = {training: Logs(installed.objective.terms, training) for training in (True, False)}
    trainer._cv_gradient = None
    trainer._cv_used = trainer._cv_asked = trainer._cv_compared = trainer._cv_told = trainer._cv_reported = False
    trainer._cv_lost, trainer._cv_checked = set(), 0
    trainer._cv_virtual_tokens = virtual_tokens(trainer.model)
    trainer._cv_pruning = installed.pruning = pruning.Pruning(config.prune) if config.prune else None
    if trainer._cv_pruning is not None:
        trainer.add_callback(trainer._cv_pruning)
    installed.listeners = [_recorder(trainer)]
    # Without these the gradient depends on how tokens fall into micro-batches and ranks.
    trainer.model_accepts_loss_kwargs = True
    trainer.loss_is_scaled_for_ga = None  # newer Trainers: whatever its class says, the count decides
    trainer.args.average_tokens_across_devices = True
