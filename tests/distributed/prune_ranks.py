"""Training with ``prune`` by transformers' own Trainer, for some cases in one launch of the processes.

    torchrun --nproc-per-node 2 prune_ranks.py CASES.json FOUND.json

Rank 0 writes for each run what each rank has seen in each epoch: numbers of examples, their weights and the losses that
the epoch was drawn from; and a digest of the model. Each case is run whole, and once more from a checkpoint.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import datasets
import sharding_on_cpu  # noqa: F401
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from one_step import make_model, padded
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments

from axolotl_cvloss import Objective, attach, install

COUNT = 43
LAYERS = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
# From a checkpoint of several processes on a CPU, Trainer cannot load an optimizer with a state, and FSDP none without.
SGD = {"optim": "sgd", "learning_rate": 0.5}
FSDP2 = {
    "optim": "adamw_torch",
    "learning_rate": 0.02,
    "fsdp": "full_shard auto_wrap",
    "fsdp_config": {"version": 2, "reshard_after_forward": True, "cpu_ram_efficient_loading": False, **LAYERS},
}


def make_rows():
    """Rows that can be told apart by their second token and the third."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for number in range(COUNT):
        length = int(torch.randint(5, 12, (), generator=generator))
        ids = torch.randint(3, 12, (length,), generator=generator)
        ids[1], ids[2] = 3 + number // 9, 3 + number % 9
        rows.append({"input_ids": ids, "labels": torch.cat([torch.full((2,), -100), ids[2:]])})
    return rows


def number_of(tokens):
    return 9 * (tokens[1] - 3) + tokens[2] - 3


class Watch(TrainerCallback):
    def __init__(self, trainer):
        self.pruning, self.epochs = trainer._cv_pruning, []
        trainer.cv_loss.model.register_forward_pre_hook(self.see, with_kwargs=True)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epochs.append({"examples": [], "losses": self.pruning.losses.tolist()})

    def see(self, model, inputs, given):
        for line, mask in zip(given["input_ids"], given.get("attention_mask", given["labels"]), strict=True):
            tokens = line[mask != 0]
            starts = [0, len(tokens)]
            if "position_ids" in given:
                starts = [*(given["position_ids"][0] == 0).nonzero().flatten().tolist(), len(tokens)]
            for i in range(len(starts) - 1):
                number = int(number_of(tokens[starts[i] : starts[i + 1]]))
                weight = float(self.pruning.weights_of(torch.tensor(number)))
                self.epochs[-1]["examples"].append([number, weight])


def run(case, folder, checkpoint):
    AcceleratorState._reset_state()
    GradientState._reset_state()
    model = make_model()
    install(model, Objective.from_config(case["cv_loss"]))
    rows = make_rows()
    data = datasets.Dataset.from_list([{name: x.tolist() for name, x in row.items()} for row in rows])
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            num_train_epochs=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            save_strategy="steps",
            save_steps=1,
            report_to=[],
            disable_tqdm=True,
            **case["arguments"],
            **(FSDP2 if case["sharded"] else SGD),
        ),
        train_dataset=data.with_format("torch") if case["library"] else rows,
        data_collator=DataCollatorWithFlattening() if case["flattened"] else padded,
    )
    attach(trainer)
    watch = Watch(trainer)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=checkpoint)
    weights = [parameter.detach() for parameter in trainer.model.parameters()]
    assert all(hasattr(weight, "full_tensor") for weight in weights) == case["sharded"]
    weights = torch.cat([w.full_tensor().flatten() if case["sharded"] else w.flatten() for w in weights])
    mine = {"epochs": watch.epochs, "model": hashlib.sha256(weights.numpy().tobytes()).hexdigest()}
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"ranks": every, "logs": logs, "steps": trainer.state.global_step, "whole": trainer._cv_pruning.whole}


PartialState(cpu=True)  # starts what the processes talk by
cases = json.loads(Path(sys.argv[1]).read_text())
found = []
for case in cases:
    with tempfile.TemporaryDirectory(dir=Path(sys.argv[2]).parent) as own:
        folder = [own]
        dist.broadcast_object_list(folder)  # that of rank 0 for all
        whole = run(case, folder[0], None)
        dist.barrier()  # rank 0 has written the checkpoints
        again = run(case, folder[0], f"{folder[0]}/checkpoint-{case['resume']}")
        dist.barrier()
    found.append({"whole": whole, "again": again})
if dist.get_rank() == 0:
    Path(sys.argv[2]).write_text(json.dumps(found))
dist.destroy_process_group()
