"""SFTTrainer on a setup, with FSDP on a CPU where the setup asks for it.

torchrun --nproc-per-node 2 train_trl.py SETUP.json
"""

import json
import sys
from pathlib import Path

import sharding_on_cpu  # noqa: F401
from crash import Crash
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from axolotl_cvloss import CVLossSFTConfig, CVLossSFTTrainer

setup = json.loads(Path(sys.argv[1]).read_text())
set_seed(0)  # adapters start with random weights
trainer = CVLossSFTTrainer(
    AutoModelForCausalLM.from_pretrained(setup["model"]),
    CVLossSFTConfig(
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        lr_scheduler_type="constant",
        **setup["arguments"],
    ),
    train_dataset=load_dataset("json", data_files=setup["data"], split="train"),
    processing_class=AutoTokenizer.from_pretrained(setup["model"]),
    peft_config=LoraConfig(r=4, target_modules="all-linear") if setup["adapter"] == "LoRA" else None,
    callbacks=[Crash()],
)
trainer.train(resume_from_checkpoint=setup["resume"])
if "fsdp" in setup["arguments"]:  # what is saved is to be whole
    trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
trainer.save_model()
