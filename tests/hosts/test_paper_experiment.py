"""The paper's experiment from the first row to the table: real trainings of a tiny model, killed in between."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytest.importorskip("axolotl")
pytestmark = pytest.mark.hosts

RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "paper" / "run.py"


def start(folder, *options):
    command = [sys.executable, str(RUN), "--smoke", "--work", str(folder / "work"), *options]
    log = (folder / "log").open("a")
    # A session of its own, so that a kill takes Axolotl along.
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(condition, process, folder, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        assert time.monotonic() < end, (folder / "log").read_text()[-3000:]
        time.sleep(0.1)


def log_of(loss, folder):
    return "".join(path.read_text() for path in (folder / "work").glob(f"runs/*/*{loss}*/train.log"))


def lines(folder):
    path = folder / "work" / "results" / "runs.jsonl"
    return [json.loads(text) for text in path.read_text().split("\n")[:-1]] if path.exists() else []


def test_smoke_killed_in_the_second_training_and_started_again(tmp_path):
    process = start(tmp_path)
    try:
        # The untrained model and the first loss are done, and Axolotl trains with the second.
        wait_for(lambda: len(lines(tmp_path)) == 2, process, tmp_path)
        wait_for(lambda: re.search(r"\b[1-5]/6 \[", log_of("lovasz", tmp_path)), process, tmp_path)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not list((tmp_path / "work").glob("runs/*/*lovasz*/trained.json"))
    before = lines(tmp_path)
    assert [line["loss"] for line in before] == [None, "cross_entropy"]

    process = start(tmp_path)
    assert process.wait(timeout=600) == 0, (tmp_path / "log").read_text()[-3000:]
    after = lines(tmp_path)
    assert after[:2] == before  # nothing was done twice
    assert [line["loss"] for line in after] == [None, "cross_entropy", "lovasz"]
    folders = [folder for folder in (tmp_path / "work").glob("runs/*/*") if folder.name != "gsm8k-untrained"]
    assert all((folder / "adapter" / "adapter_model.safetensors").exists() for folder in folders)
    assert not list((tmp_path / "work").glob("runs/*/*/attempt-*"))

    untrained, first, second = after
    assert first["nll"] < untrained["nll"]
    assert second["nll"] < untrained["nll"]
    assert first["nll"] != second["nll"]
    # Before the first update the losses see the same batch and the same model.
    logs = [log_of(loss, tmp_path) for loss in ("cross_entropy", "lovasz")]
    assert len({re.search(r"'cv_loss/nll': '?([\d.]+)", log)[1] for log in logs}) == 1
    for line in after:
        assert {"stage", "dataset", "mix", "reference", "seed", "lr", "train_examples", "steps"} <= line.keys()
        assert {"exact_match", "nll", "machine", "versions", "validation", "test"} <= line.keys()
        assert line["test"]["examples"] == line["test_examples"] == 8
        assert str(tmp_path) not in json.dumps(line)
    assert second["mix"] == {"cross_entropy": 0.6, "lovasz": 0.4}
    results = tmp_path / "work" / "results"
    assert "| lovasz | 0.003 | 1 |" in (results / "table.md").read_text()
    assert (results / "exact_match.png").exists()

    # Both started from the same LoRA: 6 steps of Adam move a weight by less than 0.02, and the start is within 0.09.
    starts = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in folders]
    for name in (name for name in starts[0] if "lora_A" in name):
        assert (starts[0][name] - starts[1][name]).abs().max() < 0.04

    # The predictions are kept in the scorer's format.
    from axolotl_cvloss.scoring import score_file

    (predictions,) = (tmp_path / "work").glob("runs/*/*lovasz*/test.jsonl")
    scores = score_file(predictions)["gsm8k"]
    assert scores == {name: second["test"][name] for name in scores}
