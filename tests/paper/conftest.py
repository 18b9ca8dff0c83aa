"""The modules of the experiment are found by name, as its command finds them; and the model and data of --smoke."""

import json
import sys
from types import SimpleNamespace

import pytest
from experiment import FOLDER

MODULES = ("answers", "plans", "run", "seeding", "summary", "tasks", "tiny", "training")


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def tiny(tmp_path):
    """The model and the data of --smoke."""
    import tiny
    from answers import load_model, load_tokenizer
    from transformers import AutoConfig

    model, data = tiny.make(tmp_path)
    for name in "model", "problems":  # of the demo
        sys.modules.pop(name, None)
    tokenizer = load_tokenizer(str(model), AutoConfig.from_pretrained(model))
    return SimpleNamespace(model=load_model(str(model), None, "cpu"), tokenizer=tokenizer, folder=model, data=data)


@pytest.fixture
def pairs(tiny):
    import tasks

    return [tasks.task("gsm8k").example(json.loads(line)) for line in (tiny.data / "gsm8k_test.jsonl").open()][:6]
