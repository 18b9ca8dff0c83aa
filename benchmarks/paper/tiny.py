"""For --smoke: the random model and the generated problems of the demo, as files."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def make(folder: Path) -> tuple[Path, Path]:
    """The folders of the model and of the data."""
    model, data = folder / "tiny-model", folder / "tiny-data"
    if not (data / "gsm8k_test.jsonl").exists():
        sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))
        from model import build_model, build_tokenizer
        from problems import make_problems

        training = make_problems(200, held_out=False)
        tokenizer = build_tokenizer(training)
        tokenizer.save_pretrained(model)
        build_model(tokenizer).save_pretrained(model)
        data.mkdir(parents=True, exist_ok=True)
        for name, problems in ("train", training), ("test", make_problems(40, held_out=True)):
            text = "".join(json.dumps(problem) + "\n" for problem in problems)
            (data / f"gsm8k_{name}.jsonl").write_text(text)
    return model, data
