"""One step of the optimiser by transformers' own Trainer, for many objectives in one launch of the processes.

    torchrun --nproc-per-node 2 one_step.py CASES.json GRADIENTS.pt

Rank 0 saves, for every case, the whole gradient that the optimizer sees and the loss that Trainer logs.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from helpers import Tokenizer
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from axolotl_cvloss import Objective, attach, install

ROWS, VOCAB = 8, 32


class HeadUnit(nn.Linear):
    """A head that can be named, so that FSDP makes it a unit of its own."""


def make_model(dtype=torch.float64, head_unit=False, adapter="full"):
    """A 2-layer Llama, the same in every process, and adapters that are no longer where they start."""
    set_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, pad_token_id=0, **shape)).to(dtype)
    model.lm_head.weight.data *= 30  # far from uniform predictions
    if head_unit:
        model.lm_head.__class__ = HeadUnit
    if adapter != "full":
        modules = ["q_proj", "v_proj", "down_proj", *(["lm_head"] if adapter == "LoRA with head" else [])]
        model = get_peft_model(model, LoraConfig(r=2, target_modules=modules, init_lora_weights=False)).to(dtype)
    return model


def make_rows(untrained=()):
    """Documents of many lengths, with prompts; those in ``untrained`` have no label."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for number in range(ROWS):
        length = int(torch.randint(5, 14, (), generator=generator))
        prompt = int(torch.randint(1, length - 2, (), generator=generator))
        ids = torch.randint(3, 12, (length,), generator=generator)
        labels = ids.clone()
        labels[: length if number in untrained else prompt] = -100
        acts = (ids % 3 == 0).long().tolist()  # as datasets have it
        logps = (-3 * torch.rand(length, generator=torch.Generator().manual_seed(number))).tolist()
        columns = {"importance": 0.5 + number % 3, "acts": acts, "reference": logps}
        rows.append({"input_ids": ids, "labels": labels, **columns})
    return rows


def padded(rows):
    ids, labels = (
        pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in (("input_ids", 0), ("labels", -100))
    )
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()}


def packed(rows):
    """One row of all documents, as Axolotl and TRL pack them."""
    positions = torch.cat([torch.arange(len(row["labels"])) for row in rows])
    joined = {name: torch.cat([row[name] for row in rows])[None] for name in ("input_ids", "labels")}
    joined["labels"][0, positions == 0] = -100
    return {**joined, "position_ids": positions[None]}


class Gradients(TrainerCallback):
    """The whole gradient that the optimizer sees."""

    seen = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                grad = parameter.grad
                grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
                self.seen[name.removeprefix("module.")] = grad.clone()


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def zero(stage):
    """A config for DeepSpeed's ZeRO."""
    sizes = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto")
    options = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    options |= {"gradient_clipping": "auto"}
    # Weights as small as these would stay whole from the second micro-batch on.
    small = ("stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size")
    whole = {"stage3_gather_16bit_weights_on_model_save": True}  # of any type
    optimization = {"stage": stage, **({**dict.fromkeys(small, 0), **whole} if stage == 3 else {})}
    return {"zero_optimization": optimization, **options, **sizes}


ZERO = {f"ZeRO-{stage}": {"deepspeed": zero(stage)} for stage in (2, 3)}  # arguments, by sharding


def weights(model):
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def run(case, folder, world):
    sharding, deepspeed = case["sharding"], case["sharding"].startswith("ZeRO")
    layers = ["LlamaDecoderLayer", *(["HeadUnit"] if case["head_unit"] else [])]
    fsdp = {"version": 2, "reshard_after_forward": case["reshard"], "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    fsdp |= {"transformer_layer_cls_to_wrap": layers, "cpu_ram_efficient_loading": False}
    # DeepSpeed keeps no gradients. With SGD and a rate of 1 the gradient of a step is what the weights lose.
    sgd = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant"}
    shardings = {name: {**arguments, **sgd} for name, arguments in ZERO.items()}
    shardings |= {"fsdp2": {"fsdp": "full_shard auto_wrap", "fsdp_config": fsdp}}
    model = make_model(getattr(torch, case["dtype"]), case["head_unit"], case["adapter"])
    before = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    install(model, Objective.from_config(case["cv_loss"], tokenizer=Tokenizer(*"0123456789")))
    gradients = Gradients()
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=not deepspeed,  # where told to, accelerate passes DeepSpeed by
        bf16=case["bf16"],
        max_steps=1,
        per_device_train_batch_size=ROWS // (world * case["accumulation"]),
        gradient_accumulation_steps=case["accumulation"],
        max_grad_norm=0.0,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **shardings.get(sharding, {}),
    )
    trainer = InOrder(
        model,
        arguments,
        train_dataset=make_rows(case["untrained"]),
        data_collator=packed if case["packed"] else padded,
        callbacks=[] if deepspeed else [gradients],
    )
    attach(trainer)
    trainer.train()
    sharded = any(hasattr(p, "full_tensor") for p in trainer.model.parameters())
    assert sharded == (sharding == "fsdp2"), "the model is not sharded as the case says"
    gradient = gradients.seen
    if deepspeed:
        after = weights(trainer.model)
        gradient = {name: before[name] - after[name] for name in before}
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return {"gradient": gradient, "loss": logged["loss"]}


def main(cases, output):
    import sharding_on_cpu  # noqa: F401
    from accelerate.state import AcceleratorState, GradientState, PartialState

    found = []
    with tempfile.TemporaryDirectory() as folder:
        for case in json.loads(Path(cases).read_text()):
            AcceleratorState._reset_state()
            GradientState._reset_state()
            found.append(run(case, folder, int(os.environ["WORLD_SIZE"])))
    if PartialState().is_main_process:
        torch.save(found, output)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
