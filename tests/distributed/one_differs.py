"""Two processes of which one sees something else: both must go the same way, or they wait for each other for ever.

torchrun --nproc-per-node 2 one_differs.py FOLDER
"""

import logging
import math
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from one_step import InOrder, make_model, make_rows, padded
from transformers import LlamaForCausalLM, TrainingArguments

from axolotl_cvloss import Objective, attach, install, register_loss

# In place of a wait without end an error. Terms over all processes call collectives of their own.
rank = PartialState(cpu=True, timeout=timedelta(seconds=60)).process_index
OBJECTIVE = {"terms": [{"loss": "dice", "per": "batch", "reduce": "global"}, {"loss": "cross_entropy", "weight": 0.5}]}


class Biased(LlamaForCausalLM):
    """Does more to its logits than to scale and to cap them."""

    def forward(self, *args, labels=None, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits + torch.linspace(0, 1, outputs.logits.shape[-1])
        if labels is not None:
            outputs.loss = self.loss_function(outputs.logits, labels, self.config.vocab_size)
        return outputs


class Reader(LlamaForCausalLM):
    """Looks at logits that are not there where the head is fused."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits[:, :, 5]
        return outputs


def half(rows):
    return rows[: len(rows) // 2] if rank == 0 else rows[len(rows) // 2 :]


def logits_of(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def two_batches(of_rank_1):
    """The loss of two batches, of which each process holds a half, is the loss of the whole batch."""
    batch = padded(make_rows())
    count = int((batch["labels"][:, 1:] != -100).sum())
    models = make_model(), make_model()
    models[1].__class__ = of_rank_1
    with torch.no_grad():
        logits = torch.cat([logits_of(models[0], batch)[:4], logits_of(models[1], batch)[4:]])
    alone = {"terms": [{"loss": "dice", "per": "batch"}, OBJECTIVE["terms"][1]]}
    expected = Objective.from_config(alone).from_logits(logits, batch["labels"]).loss.item()
    model = models[rank]
    install(model, Objective.from_config(OBJECTIVE))
    model.train()
    for _ in range(2):
        outputs = model(**{name: half(values) for name, values in batch.items()}, num_items_in_batch=count)
        outputs.loss.backward()
        loss = outputs.loss.detach().clone()
        dist.all_reduce(loss)
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        assert outputs.logits is not None, "fused, though another process cannot"


class Skips(InOrder):
    """On rank 1 it leaves some micro-batches out, as one does whose rows are too long to fit."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if rank == 1 and self.state.global_step in (1, 2, 3) and model.training:
            return 0 * model(input_ids=inputs["input_ids"]).logits.sum()
        return super().compute_loss(model, inputs, *args, **kwargs)


def logged(folder):
    """Steps that rank 1 has nothing of: one of two between two logs, and both."""
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        max_steps=4,
        per_device_train_batch_size=2,
        logging_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model = make_model()
    install(model, Objective.from_config({"cross_entropy": 0.6, "lovasz": 0.4}))
    trainer = Skips(model, arguments, train_dataset=[*make_rows(), *make_rows()], data_collator=padded)
    attach(trainer)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4]
    for entry in entries:
        total = 0.6 * entry["cv_loss/cross_entropy"] + 0.4 * entry["cv_loss/lovasz"]
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
        assert entry["cv_loss/lovasz/tokens"] > 0


def stopped(folder):
    """The value of a loss is NaN on rank 1 alone, its gradient nowhere."""
    register_loss("odd", family="token")(lambda logp: (math.nan if rank else 0.0) - logp)
    arguments = TrainingArguments(
        output_dir=folder, use_cpu=True, max_steps=30, save_strategy="no", report_to=[], disable_tqdm=True
    )
    model = make_model()
    install(model, Objective.from_config("odd"))
    trainer = InOrder(model, arguments, train_dataset=[*make_rows()] * 60, data_collator=padded)
    attach(trainer)
    with pytest.raises(RuntimeError, match="NaN in all 25 steps from 1 to 25"):
        trainer.train()


logging.disable(logging.ERROR)
two_batches(Biased)
two_batches(Reader)
logged(sys.argv[1])
stopped(sys.argv[1])
if rank == 0:
    print("both went the same way")
PartialState().destroy_process_group()
