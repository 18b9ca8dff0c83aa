"""Ask for a parallel form in two processes and train. Exits well where `attach` refuses before training."""

import sys

import sharding_on_cpu  # noqa: F401
from accelerate.parallelism_config import ParallelismConfig
from one_step import make_model, make_rows, padded
from transformers import Trainer, TrainingArguments

from axolotl_cvloss import Objective, attach, install

size, folder = sys.argv[1:]
arguments = TrainingArguments(
    output_dir=folder,
    use_cpu=True,
    max_steps=1,
    report_to=[],
    parallelism_config=ParallelismConfig(**{size: 2}),
    fsdp="full_shard",  # accelerate asks for it
)
model = make_model()
install(model, Objective.from_config("dice"))
trainer = Trainer(model, arguments, train_dataset=make_rows(), data_collator=padded)
try:
    attach(trainer)
except RuntimeError as error:
    print(f"refused: {error}")
