"""Rows and a config of Axolotl for one dataset of the paper, to be given to `cvloss compare`.

    python benchmarks/paper/prepare.py gsm8k --model HuggingFaceTB/SmolLM2-1.7B --steps 3000
    cvloss compare outputs/paper/gsm8k/config.yaml --out outputs/paper/gsm8k/results ...

See README.md in this folder.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, AutoTokenizer

from axolotl_cvloss.command.scoring import TASKS
from axolotl_cvloss.hosts.axolotl_prompts import Example, Row

CONFIGS = Path(__file__).resolve().parents[2] / "example_configs"
# What a split is called in file names and on the hub. The rows of HellaSwag's test split have no labels: its validation
# split is for scoring, as in the paper. Files of MathQA often lack the training split; then dev is trained on.
TRAIN = ("train", "dev", "valid", "validation")
TEST = {"hellaswag": ("validation", "valid", "dev")}
# The paper puts LoRA on the head, too, for models of these types. A head tied to the embeddings cannot have it.
WITH_HEAD = ("llama", "stablelm")
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPU_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
REMOVED = ("val_set_size", "evals_per_epoch", "saves_per_epoch", "save_total_limit", "num_epochs", "cv_loss")


def recipe_of(name: str) -> dict[str, Any]:
    """Of the paper, from ``example_configs/NAME.yaml``."""
    return dict(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))


def example_of(recipe: dict[str, Any]) -> Example:
    return import_module(recipe["datasets"][0]["type"]).example


def rows_of(name: str, recipe: dict[str, Any], folder: Path | None) -> dict[str, list[Row]]:
    """The rows that can be trained on, shuffled, always in the same order."""
    splits = {"train": TRAIN, "test": TEST.get(name, ("test",))}
    found = {split: _from_files(name, folder, names) for split, names in splits.items()} if folder else None
    kept = found or _from_hub(recipe["datasets"][0], splits)
    example = example_of(recipe)
    for split, rows in kept.items():
        if not rows:
            raise FileNotFoundError(f"no rows of {name} to {split}: {folder} has no {name}_{splits[split][0]}.jsonl")
        kept[split] = [row for row in rows if example(row)]
        random.Random(0).shuffle(kept[split])
    return kept


def _from_files(name: str, folder: Path, splits: Iterable[str]) -> list[Row]:
    for path in (folder / f"{name}_{split}.jsonl" for split in splits):
        if path.exists():
            with path.open(encoding="utf-8") as lines:
                return [json.loads(line) for line in lines]
    return []


def _from_hub(dataset: dict[str, Any], splits: dict[str, tuple[str, ...]]) -> dict[str, list[Row]]:
    from datasets import load_dataset

    there = load_dataset(dataset["path"], dataset.get("name"))
    return {split: list(there[next(name for name in names if name in there)]) for split, names in splits.items()}


def config_of(
    recipe: dict[str, Any], out: Path, model: str, about: Any, tokens: dict[str, str], steps: int, batch: int, cpu: bool
) -> dict[str, Any]:
    """The recipe on the rows of ``out``. Warm-up is at most a tenth of the steps."""
    kind = recipe["datasets"][0]["type"]
    config = {key: value for key, value in recipe.items() if key not in REMOVED}
    files = {"datasets": out / "train.jsonl", "test_datasets": out / "test.jsonl"}
    for key, file in files.items():
        config[key] = [{"path": str(file), "ds_type": "json", "split": "train", "type": kind}]
    config |= {
        "base_model": model,
        "special_tokens": tokens,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "max_steps": steps,
        "warmup_steps": min(recipe["warmup_steps"], steps // 10),
        "micro_batch_size": batch,
        "logging_steps": max(1, steps // 20),
    }
    if about.model_type in WITH_HEAD and not about.tie_word_embeddings:
        config.pop("lora_target_linear")
        config["lora_target_modules"] = [*MODULES, "lm_head"]
    if cpu:
        config |= {"bf16": False, "fp16": False, "tf32": False}
        config |= dict.fromkeys(GPU_KERNELS, False)  # Axolotl turns them on by itself, on a CPU too
    return config


def tokens_of(model: str, about: Any) -> dict[str, str]:
    """An EOS token that stops the model's generation, and one to pad with, the EOS as in the paper."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    stops = about.eos_token_id if isinstance(about.eos_token_id, list) else [about.eos_token_id]
    if tokenizer.eos_token_id not in stops and stops != [None]:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stops[0])
    return {"eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token or tokenizer.eos_token}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=TASKS)
    parser.add_argument("--model", required=True, help="a folder or a name on the hub")
    parser.add_argument("--data", type=Path, help="a folder with files such as gsm8k_train.jsonl; default: the hub")
    parser.add_argument("--out", type=Path, help="default: outputs/paper/DATASET")
    parser.add_argument("--train", type=int, metavar="N", help="rows to train on; default: all")
    parser.add_argument("--test", type=int, metavar="N", help="rows to choose rates by and to score; default: all")
    parser.add_argument("--steps", type=int, metavar="N", help="default: the epochs of the paper's recipe")
    parser.add_argument("--batch", type=int, default=8, metavar="N")
    parser.add_argument("--cpu", action="store_true", help="no bfloat16 and no kernels of a GPU")
    args = parser.parse_args()
    recipe = recipe_of(args.dataset)
    out = args.out or Path("outputs/paper") / args.dataset
    rows = rows_of(args.dataset, recipe, args.data)
    rows = {"train": rows["train"][: args.train], "test": rows["test"][: args.test]}
    out.mkdir(parents=True, exist_ok=True)
    for split, found in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (out / f"{split}.jsonl").write_text(text, encoding="utf-8")
    steps = args.steps or recipe["num_epochs"] * math.ceil(len(rows["train"]) / args.batch)
    about = AutoConfig.from_pretrained(args.model)
    tokens = tokens_of(args.model, about)
    config = config_of(recipe, out, args.model, about, tokens, steps, args.batch, args.cpu)
    (out / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    print(f"{out}: {len(rows['train'])} rows to train on, {len(rows['test'])} of the test set, {steps} steps")


if __name__ == "__main__":
    main()
