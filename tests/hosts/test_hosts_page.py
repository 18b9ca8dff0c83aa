"""The snippets of docs/hosts.md on TRL, transformers and plain loops run, on a tiny model."""

import pytest
import torch
from datasets import Dataset
from helpers import snippet
from transformers import Trainer, TrainingArguments

from axolotl_cvloss import Objective, install

# What a machine without a GPU and a test of seconds need.
SMALL = {
    "bf16": False,
    "use_cpu": True,
    "max_steps": 4,
    "gradient_accumulation_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "learning_rate": 1e-2,
}


@pytest.fixture
def rows(tokenizer, problems):
    return [tokenizer(f"{row['prompt']} {row['completion']}")["input_ids"] for row in problems["train"]]


def collate(batch):
    ids = [torch.tensor(row["input_ids"]) for row in batch]
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.where(ids != 0, ids, -100)}


SMALLER = ('output_dir="outputs"', "output_dir=folder, **SMALL")


def test_trl(files, problems, tmp_path):
    pytest.importorskip("trl")
    names = {"dataset": Dataset.from_list(problems["train"]), "folder": str(tmp_path), "SMALL": SMALL}
    code = snippet("CVLossSFTTrainer", SMALLER, ('"Qwen/Qwen2.5-0.5B"', f'"{files / "model"}"'))
    exec(code, names)
    history = names["trainer"].state.log_history
    assert {"cv_loss/lovasz", "entropy", "mean_token_accuracy"} <= history[0].keys()
    assert history[3]["loss"] < history[0]["loss"]


def test_trainer(make_model, rows, tmp_path):
    dataset = Dataset.from_dict({"input_ids": rows})
    names = {"model": make_model(), "dataset": dataset, "collate": collate, "folder": str(tmp_path), "SMALL": SMALL}
    exec(snippet("Trainer(model", SMALLER), names)
    history = names["trainer"].state.log_history
    assert {"cv_loss/cross_entropy", "cv_loss/lovasz", "cv_loss/nll"} <= history[0].keys()
    assert history[3]["loss"] < history[0]["loss"]


def test_trainer_needs_no_more_than_install(make_model, rows, tmp_path):
    """Without attach too, accumulation is one big batch."""
    weights = []
    for size in (8, 2):
        model = install(make_model().double(), Objective.from_config({"cross_entropy": 0.6, "lovasz": 0.4}))
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 1}
        arguments = TrainingArguments(str(tmp_path), optim="sgd", max_grad_norm=0, **{**SMALL, **sizes})
        data = [{"input_ids": row} for row in rows[:8]]
        Trainer(model, arguments, train_dataset=data, data_collator=collate).train()
        weights.append(list(model.parameters()))
    for one_batch, accumulated in zip(*weights, strict=True):
        torch.testing.assert_close(accumulated, one_batch, rtol=1e-6, atol=1e-9)


def test_loop(make_model, rows):
    """Its first step is that of one big batch."""
    models = [make_model().double(), make_model().double()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    data = [{"input_ids": row} for row in rows[:12]]
    loader = torch.utils.data.DataLoader(data, batch_size=3, collate_fn=collate)
    exec(snippet("Accelerator()"), {"model": models[0], "optimizer": optimizers[0], "loader": loader})

    batch = collate(data)
    labels = batch.pop("labels")
    result = Objective.from_config({"cross_entropy": 0.6, "lovasz": 0.4}).from_logits(models[1](**batch).logits, labels)
    result.loss.backward()
    optimizers[1].step()
    for ours, expected in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


def test_tensors(make_model, rows):
    model = make_model()
    batch = collate([{"input_ids": row} for row in rows[:3]])
    labels = batch["labels"]
    hidden_states = model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    names = {
        "objective": Objective.from_config("dice"),
        "logits": model.lm_head(hidden_states),
        "labels": labels,
        "hidden_states": hidden_states,
        "head": model.lm_head,
    }
    exec(snippet("from_logits"), names)
    assert names["result"].n_tokens == (labels[:, 1:] != -100).sum()
    assert model.lm_head.weight.grad is not None
