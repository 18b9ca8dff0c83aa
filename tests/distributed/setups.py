"""What the scripts that train on a setup have in common. A setup is a file in JSON, the first argument."""

import json
import sys
from pathlib import Path

import sharding_on_cpu  # noqa: F401
from crash import Crash
from peft import LoraConfig
from transformers import set_seed

setup = json.loads(Path(sys.argv[1]).read_text())
arguments = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, **setup["arguments"]}
arguments["lr_scheduler_type"] = "constant"
lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if setup["adapter"] == "LoRA" else None
set_seed(0)  # adapters start with random weights


def finish(trainer):
    """Train, from a checkpoint where the setup has one, and save."""
    trainer.add_callback(Crash())
    trainer.train(resume_from_checkpoint=setup["resume"])
    if "fsdp" in arguments:  # what is saved is to be whole
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
