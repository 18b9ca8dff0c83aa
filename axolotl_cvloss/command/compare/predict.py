"""What a trained model writes, greedily and in batches, and the NLL of what it should have written.

python -m axolotl_cvloss.command.compare.predict MODEL ROWS.jsonl OUT.jsonl --batch N --new-tokens N

MODEL is the folder of a model or an adapter; ROWS are those of ``rows.py``. The prompt of a row is all that stands
before the last labelled stretch, and the stretch is the reference; a row without a prompt has its NLL alone.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .rows import Row, read, split
from .rows import write as write_rows

T = TypeVar("T")
SMALL = 8  # rows of one forward that keeps all its logits


def load(folder: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, which every host saves beside the model."""
    adapter = (Path(folder) / "adapter_config.json").exists()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if adapter:
        from peft import AutoPeftModelForCausalLM

        # In the dtype of the base model, as it was trained; by itself PEFT takes float32.
        model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="auto")
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def padded(rows: Sequence[Sequence[int]], filling: int, left: bool, device: Any) -> torch.Tensor:
    longest = max(map(len, rows))
    fillings = [[filling] * (longest - len(row)) for row in rows]
    return torch.tensor(
        [[*f, *row] if left else [*row, *f] for row, f in zip(rows, fillings, strict=True)], device=device
    )


@torch.no_grad()
def nll_of(model: PreTrainedModel, rows: Sequence[Row]) -> list[tuple[float, int]]:
    """The sum of -log p over the labelled tokens of each row, and how many they are."""
    # Padding stands at the end, where a causal model's labelled tokens do not see it.
    input_ids = padded([row["input_ids"] for row in rows], 0, False, model.device)
    labels = padded([row["labels"] for row in rows], -100, False, model.device)
    logits = model(input_ids, use_cache=False).logits[:, :-1].float()
    nll = cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none").double()
    counts = (labels[:, 1:] != -100).sum(1)
    return list(zip(nll.sum(1).tolist(), counts.tolist(), strict=True))


@torch.no_grad()
def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[str]:
    """A text for each prompt."""
    stops = {tokenizer.eos_token_id, *_several(model.generation_config.eos_token_id)} - {None}
    filling = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stops), 0)
    input_ids = padded(prompts, filling, True, model.device)
    mask = padded([[1] * len(prompt) for prompt in prompts], 0, True, model.device)
    found = model.generate(
        input_ids=input_ids,
        attention_mask=mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        eos_token_id=sorted(stops) or None,
        pad_token_id=filling,
    )
    return tokenizer.batch_decode(found[:, input_ids.shape[1] :], skip_special_tokens=True)


def _several(ids: Any) -> list[Any]:
    return ids if isinstance(ids, list) else [ids]


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    batch: int,
    new_tokens: int,
    on_rows: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """A record for each row: nll, a sum over its tokens; and prompt, reference and prediction where it has a prompt."""
    records: list[dict[str, Any]] = [{} for _ in rows]
    parts = [split(row) for row in rows]
    done = 0
    for few in batches(sorted(range(len(rows)), key=lambda place: len(parts[place][0])), batch):  # of nearly one length
        for part in batches(sorted(few, key=lambda place: len(rows[place]["input_ids"])), min(batch, SMALL)):
            for place, (nll, tokens) in zip(part, nll_of(model, [rows[place] for place in part]), strict=True):
                records[place] = {"nll": nll, "tokens": tokens}
        asked = [place for place in few if parts[place][0]]
        if asked and new_tokens:
            texts = write(model, tokenizer, [parts[place][0] for place in asked], new_tokens)
            for place, text in zip(asked, texts, strict=True):
                prompt, reference = (tokenizer.decode(ids, skip_special_tokens=True) for ids in parts[place])
                records[place] |= {"prompt": prompt, "reference": reference, "prediction": text}
        done += len(few)
        on_rows(done)
    return records


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "rows", "out"):
        parser.add_argument(name)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--new-tokens", type=int, required=True)
    args = parser.parse_args()
    rows, out = read(Path(args.rows)), Path(args.out)
    records = predict(
        *load(args.model),
        rows,
        args.batch,
        args.new_tokens,
        lambda done: print(f"{done}/{len(rows)} rows", file=sys.stderr, flush=True),
    )
    write_rows(records, out)


if __name__ == "__main__":
    main()
