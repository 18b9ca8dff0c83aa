"""TRL from Python: LoRA on conversations, with 0.6 cross-entropy + 0.4 Lovász over what the assistant says."""

import sys

import torch
from datasets import load_dataset
from peft import LoraConfig

from axolotl_cvloss import CVLossSFTConfig, CVLossSFTTrainer

model, data = sys.argv[1:] or ("Qwen/Qwen2.5-0.5B-Instruct", "trl-lib/Capybara")
dataset = load_dataset(data)
trainer = CVLossSFTTrainer(
    model=model,
    args=CVLossSFTConfig(
        output_dir="outputs/trl_sft",
        cv_loss={"cross_entropy": 0.6, "lovasz": 0.4},
        assistant_only_loss=True,
        learning_rate=2e-4,
        num_train_epochs=1,
        logging_steps=5,
        bf16=torch.cuda.is_available(),
        report_to="none",
    ),
    train_dataset=dataset["train"],
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
)
trainer.train()
trainer.save_model()
