"""The modules of the experiment are found by name, as its commands find them."""

import sys

import pytest
from experiment import FOLDER

MODULES = ("prepare", "summary")


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def untrained(tmp_path):
    """The untrained model of the demo and its tokenizer."""
    sys.path.insert(0, str(FOLDER.parents[1] / "demo"))
    from model import build_model, build_tokenizer
    from problems import make_problems

    sys.path.pop(0)
    for name in "model", "problems":
        sys.modules.pop(name, None)
    tokenizer = build_tokenizer(make_problems(50, held_out=False))
    tokenizer.save_pretrained(tmp_path / "model")
    build_model(tokenizer).save_pretrained(tmp_path / "model")
    return tmp_path / "model"
