"""What the scripts here make: rows of examples, and a model with its tokenizer."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def save_rows(out: Path, **splits: Iterable[dict[str, str]]) -> None:
    """A JSON line an example, by split."""
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    for name, examples in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))


def save_model(out: Path, tokenizer: Any, model: Any) -> None:
    tokenizer.save_pretrained(out / "model")
    model.save_pretrained(out / "model")
    print(f"{len(tokenizer)} tokens, {model.num_parameters():,} weights")


def save_pretrained(out: Path, name: str) -> None:
    """A model of the hub or of a folder, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    save_model(out, AutoTokenizer.from_pretrained(name), AutoModelForCausalLM.from_pretrained(name, dtype="float32"))
