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
    """A model of the hub or of a folder, or a GGUF file, in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, file = (str(Path(name).parent), Path(name).name) if name.endswith(".gguf") else (name, None)
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(place, gguf_file=file, dtype="float32")
    if file:
        # transformers takes the begin of a message for its end, too.
        for which in ("eos", "pad"):
            setattr(tokenizer, f"{which}_token", tokenizer.convert_ids_to_tokens(model.config.eos_token_id))
    save_model(out, tokenizer, model)
