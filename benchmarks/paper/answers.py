"""What a model writes, greedily and in batches, and the NLL of the targets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from axolotl_cvloss import Objective
from axolotl_cvloss.scoring import score

Pair = tuple[str, str]  # prompt and target
T = TypeVar("T")


def load_tokenizer(model: str, config: Any) -> PreTrainedTokenizerBase:
    """With an EOS token that stops the model's generation, and a token to pad with on the left."""
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if tokenizer.eos_token_id not in stops and stops != [None]:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stops[0])
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # as in the paper
    return tokenizer


def load_model(model: str, adapter: Path | None, device: str) -> PreTrainedModel:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    if adapter:
        loaded = PeftModel.from_pretrained(loaded, str(adapter))
        if dtype == torch.float32:  # merged into bfloat16, much of a small adapter would be rounded away
            loaded = loaded.merge_and_unload()
    return loaded.to(device).eval()


def evaluate(
    task: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    batch: int,
    new_tokens: int,
    file: Path,
    on_batch: Callable[[float], None],
) -> dict[str, float]:
    """Scores and NLL; the predictions are kept in ``file``, in the format of `cvloss score`."""
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))  # little padding in a batch
    texts, nll, tokens = [""] * len(pairs), 0.0, 0
    for number, part in enumerate(_batches(order, batch), start=1):
        chosen = [pairs[i] for i in part]
        for i, text in zip(part, write(model, tokenizer, [prompt for prompt, _ in chosen], new_tokens), strict=True):
            texts[i] = text
        for few in _batches(chosen, 8):  # the logits of a batch are large
            total, count = nll_of(model, tokenizer, few)
            nll, tokens = nll + total, tokens + count
        on_batch(min(1.0, number * batch / len(pairs)))
    records = [
        {"task": task, "prediction": text, "reference": target, "prompt": prompt}
        for text, (prompt, target) in zip(texts, pairs, strict=True)
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return {**score(records)[task], "nll": nll / tokens}


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@torch.no_grad()
def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], new_tokens: int) -> list[str]:
    inputs = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False).to(model.device)
    found = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def nll_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair]) -> tuple[float, int]:
    """The sum of -log p over the tokens of the targets and their EOS, and how many they are."""
    rows = [tokens_and_labels(tokenizer, pair) for pair in pairs]
    longest = max(len(tokens) for tokens, _ in rows)
    input_ids, labels = (
        torch.tensor([row[i] + [filling] * (longest - len(row[i])) for row in rows], device=model.device)
        for i, filling in enumerate([tokenizer.pad_token_id, -100])
    )
    # Padding stands at the end, where a causal model's rows of the targets do not see it.
    result = Objective.from_config("cross_entropy").from_logits(model(input_ids).logits, labels)
    count = int(result.n_tokens)
    return float(result.nll) * count, count


def tokens_and_labels(tokenizer: PreTrainedTokenizerBase, pair: Pair) -> tuple[list[int], list[int]]:
    """As Axolotl's strategy makes them for training."""
    prompt, target = pair
    asked = tokenizer(prompt).input_ids
    if asked and asked[-1] == tokenizer.eos_token_id:
        asked = asked[:-1]
    told = [*tokenizer(target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return asked + told, [-100] * len(asked) + told
