"""A whole training step under Axolotl: a mix of three losses against Axolotl's own cross-entropy.

    python benchmarks/training_step.py --steps 10 --repeats 2

Real runs of `axolotl train`, alternately without the plugin and with it, on the same batches. A step takes the time
between two lines of the log, which comes once a step. See README.md in this folder.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from report import machine, write
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
HOST, PLUGIN = "Axolotl's cross-entropy", "mix of three losses"
OBJECTIVES = {
    HOST: {},
    PLUGIN: {
        "plugins": ["axolotl_cvloss.CVLossPlugin"],
        "cv_loss": {"cross_entropy": 0.6, "generalized_dice": 0.2, "lovasz": 0.2},
    },
}
TIME_LIMIT, MEMORY_LIMIT = 1.03, 1.0
WARM_UP = 2  # steps

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
WORDS = [f"w{i}" for i in range(2000)]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


def build_model(folder: Path, shape: dict[str, Any]) -> Path:
    """A Llama with random weights, and a tokenizer of ``WORDS``."""
    set_seed(0)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    config = LlamaConfig(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_problems(path: Path, count: int) -> Path:
    """Texts of about the lengths of GSM8K in tokens: questions of 30 to 100, answers of 60 to 200."""
    rng = random.Random(0)
    frequency = [1 / (i + 1) for i in range(len(WORDS))]
    with path.open("w") as file:
        for _ in range(count):
            question, answer = (
                " ".join(rng.choices(WORDS, frequency, k=rng.randint(*length))) for length in ((30, 100), (60, 200))
            )
            file.write(json.dumps({"question": question, "answer": answer}) + "\n")
    return path


def make_config(args: argparse.Namespace, folder: Path, objective: str) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    return {
        "base_model": str(args.model),
        **OBJECTIVES[objective],
        "datasets": [
            {
                "path": str(args.data),
                "ds_type": "json",
                "split": "train",
                "type": {
                    "field_instruction": "question",
                    "field_output": "answer",
                    "format": "{instruction}\n",
                    "no_input_format": "{instruction}\n",
                },
            }
        ],
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "output_dir": str(folder / "output"),
        "sequence_len": 512,
        "micro_batch_size": args.batch,
        "gradient_accumulation_steps": 1,
        "max_steps": args.steps,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "seed": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": on_gpu,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
    }


def train(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Run `axolotl train`: seconds of each step after the warm-up, tokens a second, and peak memory."""
    path.write_text(yaml.safe_dump(config))
    command = [Path(sys.executable).with_name("axolotl"), "train", path, "--launcher", "python"]
    times, logs, printed, peak = [], [], [], 0
    with subprocess.Popen(
        list(map(str, command)),
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout:  # universal newlines: also where a progress bar writes over itself
            printed.append(line)
            if found := re.search(r"\{'loss': .*\}", line):
                times.append(time.perf_counter())
                logs.append(ast.literal_eval(found.group()))
                peak = peak_memory(process.pid, logs[-1])  # before the model is saved, which needs memory too
    if process.returncode or len(logs) != config["max_steps"]:
        sys.exit(
            f"axolotl train ended with code {process.returncode} after {len(logs)} steps:\n{''.join(printed[-60:])}"
        )
    for made in "output_dir", "dataset_prepared_path":  # every run does the same
        shutil.rmtree(config[made])
    seconds = [end - start for start, end in zip(times[WARM_UP - 1 :], times[WARM_UP:], strict=False)]
    tokens = [int(log["tokens/total"]) for log in logs]
    return {
        "seconds": seconds,
        "tokens": [end - start for start, end in zip(tokens[WARM_UP - 1 :], tokens[WARM_UP:], strict=False)],
        "bytes": peak,
        "loss": float(logs[-1]["loss"]),
    }


def peak_memory(pid: int, log: dict[str, Any]) -> int:
    """Of the GPU where there is one, else the resident memory of the process."""
    if torch.cuda.is_available():
        return int(float(log["memory/max_allocated (GiB)"]) * 2**30)
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(found.group(1)) if found else 0


def compare(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Ratios of a step to the host's step on the same batch: their median, and the range of those of the repeats."""
    rows = []
    for name, own in runs.items():
        by_repeat = []
        for run, host in zip(own, runs[HOST], strict=True):
            assert run["tokens"] == host["tokens"], "the two runs must see the same batches"
            by_repeat.append([a / b for a, b in zip(run["seconds"], host["seconds"], strict=True)])
        seconds = [second for run in own for second in run["seconds"]]
        ratio = statistics.median(ratio for ratios in by_repeat for ratio in ratios)
        medians = [statistics.median(ratios) for ratios in by_repeat]
        memory = [run["bytes"] / host["bytes"] for run, host in zip(own, runs[HOST], strict=True)]
        rows.append(
            {
                "case": name,
                "seconds": statistics.median(seconds),
                "seconds_min": min(seconds),
                "seconds_max": max(seconds),
                "tokens_per_second": sum(sum(run["tokens"]) for run in own) / sum(seconds),
                "bytes": statistics.median(run["bytes"] for run in own),
                "time_ratio": ratio,
                "time_ratio_min": min(medians),
                "time_ratio_max": max(medians),
                "memory_ratio": statistics.median(memory),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("objective")
    for column in "s a step", "min-max", "tokens/s", "peak, MB", "time ratio", "of repeats", "memory ratio":
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["case"],
            f"{row['seconds']:.3g}",
            f"{row['seconds_min']:.3g}-{row['seconds_max']:.3g}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['time_ratio']:.3f}",
            f"{row['time_ratio_min']:.3f}-{row['time_ratio_max']:.3f}",
            f"{row['memory_ratio']:.3f}",
        )
    console = Console(width=None if Console().is_terminal else 130, highlight=False)
    console.print(table)
    for what, limit in ("time", TIME_LIMIT), ("memory", MEMORY_LIMIT):
        ratio = rows[-1][f"{what}_ratio"]
        console.print(f"{what} {ratio:.3f}, limit {limit}: {'reached' if ratio <= limit else 'NOT reached'}")


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        given = {"model": args.model and str(args.model.name), "data": args.data and str(args.data.name)}
        shape = SMOLLM2_135M | ({"num_hidden_layers": 2, "vocab_size": 4096} if args.tiny else {})
        args.model = args.model or build_model(folder / "model", shape)
        args.data = args.data or build_problems(folder / "problems.jsonl", args.steps * args.batch)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in OBJECTIVES}
        for repeat in range(1, args.repeats + 1):
            for name in OBJECTIVES:
                run = train(make_config(args, folder, name), folder / "config.yaml")
                runs[name].append(run)
                median, megabytes = statistics.median(run["seconds"]), run["bytes"] / 1e6
                print(
                    f"repeat {repeat} of {args.repeats}  {median:7.3f} s a step {megabytes:9.1f} MB  {name}", flush=True
                )
    rows = compare(runs)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {"steps": args.steps, "repeats": args.repeats, "batch": args.batch, "tiny": args.tiny, **given}
    path = args.out / f"training_step_{device}"
    write(path, rows, machine=machine(device), settings=settings, objectives=OBJECTIVES, records=runs)
    show(rows)
    print(f"Written: {path}.csv and .json")
    if args.check and rows[-1]["memory_ratio"] > MEMORY_LIMIT:
        sys.exit("memory limit missed")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model; else a Llama of 135M random weights is made")
    parser.add_argument("--data", type=Path, help="JSONL with question and answer; else random words (for no --model)")
    parser.add_argument("--steps", type=int, default=10, help=f"of a run, {WARM_UP} of them for warming up")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tiny", action="store_true", help="2 layers and 4096 tokens, to try this out")
    parser.add_argument("--check", action="store_true", help="end with code 1 where the memory limit is missed")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"--steps must be above {WARM_UP}")
    return args


if __name__ == "__main__":
    main()
