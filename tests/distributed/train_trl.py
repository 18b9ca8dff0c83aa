"""SFTTrainer on a setup, with FSDP on a CPU where the setup asks for it.

torchrun --nproc-per-node 2 train_trl.py SETUP.yaml
"""

from datasets import load_dataset
from setups import arguments, finish, lora, setup
from transformers import AutoModelForCausalLM, AutoTokenizer

from axolotl_cvloss import CVLossSFTConfig, CVLossSFTTrainer

trainer = CVLossSFTTrainer(
    AutoModelForCausalLM.from_pretrained(setup["model"]),
    CVLossSFTConfig(**arguments, cv_loss=setup["cv_loss"], bf16=False, gradient_checkpointing=False),
    train_dataset=load_dataset("json", data_files=setup["data"], split="train"),
    eval_dataset=load_dataset("json", data_files=setup["data"], split="test"),
    processing_class=AutoTokenizer.from_pretrained(setup["model"]),
    peft_config=lora,
)
finish(trainer)
