"""Would it pay to leave out columns of the vocabulary when the gradient is pulled back?

    python benchmarks/skipping.py --model HuggingFaceTB/SmolLM2-135M --data gsm8k_train.jsonl

Away from a few columns the gradient of the logits is p times one number a row, and most p are tiny. Left out of `p
@ weight`, columns S change row i by no more than the sum of p_i[c] over S, times the largest weight. That is
rounding where the sum is below the precision of the gradient's dtype relative to 1 - p_i of the target, on which
all the gradient of the row depends. For a chunk of rows this measures the largest S for which it holds in every
row, and what the product takes with and without S. (The rows of `dz.T @ hidden` are the gradients of one token's
weights each; a small one is not rounding beside anything, and to Adam it is not small.)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import machine
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

PRECISIONS = {"bfloat16": 2**-9, "float32": 2**-24}


@torch.no_grad()
def collect(model_name: str, data: Path, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """p (N, V) and labels (N,) of the answers in a JSONL file of questions and answers, and the head's weight."""
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    found, labels = [], []
    for line in track(data.read_text().splitlines(), "reading"):
        example = json.loads(line)
        prompt = tokenizer(f"Question: {example['question']}\nAnswer: ")["input_ids"]
        answer = tokenizer(example["answer"])["input_ids"]
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        found.append(logits.softmax(1))
        labels += answer
        if len(labels) >= rows:
            break
    return torch.cat(found), torch.tensor(labels), model.get_output_embeddings().weight.detach()


def skippable(p: Tensor, labels: Tensor, precision: float) -> Tensor:
    """(V,) bool: the columns that all rows of the chunk can do without."""
    own = p.gather(1, labels[:, None])
    share = p.scatter(1, labels[:, None], 0) / (1 - own).clamp_min(1e-30)
    order = share.amax(0).argsort()
    spare = share[:, order].cumsum(1).amax(0) <= precision
    return torch.zeros_like(spare).scatter(0, order, spare)


def seconds(product: Callable[[], Tensor], repeats: int) -> float:
    product()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a causal language model, on disk or by name")
    parser.add_argument("--data", required=True, type=Path, help="JSONL with question and answer")
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 341])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()

    p, labels, weight = collect(options.model, options.data, options.rows)
    found = []
    for name, precision in PRECISIONS.items():
        dtype = getattr(torch, name)
        head = weight.to(dtype)
        for size in options.chunks:
            chunks = list(zip(p.split(size), labels.split(size), strict=True))[:-1]
            spare = [skippable(part, targets, precision) for part, targets in chunks]
            share = sum(s.float().mean().item() for s in spare) / len(spare)
            part, keep = chunks[0][0].to(dtype), (~spare[0]).nonzero().squeeze(1)
            whole = seconds(lambda part=part, head=head: part @ head, options.repeats)
            less = seconds(lambda part=part, head=head, keep=keep: part[:, keep] @ head[keep], options.repeats)
            found.append({"dtype": name, "rows": size, "skippable": share, "seconds": whole, "seconds without": less})
    options.out.mkdir(parents=True, exist_ok=True)
    target = float(p.gather(1, labels[:, None]).mean())
    record = {"machine": machine("cpu"), "model": Path(options.model).name, "N": len(labels), "mean p": target}
    (options.out / "skipping.json").write_text(json.dumps({**record, "chunks": found}, indent=1) + "\n")
    table = Table("dtype", "rows of a chunk", "columns that may be skipped", "product, ms", "without them, ms")
    for f in found:
        times = (f"{1000 * f[key]:.1f}" for key in ("seconds", "seconds without"))
        table.add_row(f["dtype"], str(f["rows"]), f"{100 * f['skippable']:.1f} %", *times)
    Console().print(table)


if __name__ == "__main__":
    main()
