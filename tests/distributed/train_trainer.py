"""transformers' Trainer on a setup, with FSDP on a CPU where the setup asks for it.

torchrun --nproc-per-node 2 train_trainer.py SETUP.yaml
"""

import json
import os
from pathlib import Path

from peft import get_peft_model
from setups import arguments, finish, lora, setup
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from axolotl_cvloss import Objective, attach, install

tokenizer = AutoTokenizer.from_pretrained(setup["model"])


def rows(part):
    found = []
    for line in Path(setup["data"][part]).read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        found.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return found


model = AutoModelForCausalLM.from_pretrained(setup["model"])
if lora is not None:
    model = get_peft_model(model, lora)
if os.environ.get("NAN_ON_RANK") == os.environ["RANK"]:
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output * float("nan"))
install(model, Objective.from_config(setup["cv_loss"]))
pad = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=32)  # rank 0 can hand on batches of one width only
trainer = Trainer(
    model,
    TrainingArguments(**arguments),
    train_dataset=rows("train"),
    eval_dataset=rows("test")[1:],  # 11, so that the last batches are filled, whatever their size
    data_collator=DataCollatorWithFlattening() if setup["packing"] == "packed" else pad,
)
attach(trainer)
finish(trainer)
