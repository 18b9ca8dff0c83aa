"""`cvloss compare` and `cvloss predict` for real: a tiny model, both hosts, a kill in the middle."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

pytest.importorskip("trl")

import trl

from axolotl_cvloss import Objective
from axolotl_cvloss.command.cli import cli
from axolotl_cvloss.command.compare import predict, rows

COMMAND = Path(sys.executable).with_name("cvloss")
EPS = torch.finfo(torch.float32).eps
# Of one forward: about a hundred roundings of numbers of size 10.
CLOSE = 1e3 * EPS
SCORER = """
def shares(prediction, reference):
    given, wanted = set(prediction.split()), set(reference.split())
    return {"shared": len(given & wanted) / len(given | wanted), "words": len(given)}
"""


@pytest.fixture
def trained(tmp_path, tokenizer, make_model):
    """The folder of a model as a host saves it; its weights are large, so that it does not always write the same."""
    make_model(initializer_range=0.5).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rows_of(tokenizer, problems):
    made = []
    for row in problems:
        asked = tokenizer(row["prompt"]).input_ids
        told = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        made.append({"input_ids": asked + told, "labels": [-100] * len(asked) + told})
    return made


@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        ([-100, -100, 3, 4], ([1, 2], [3, 4])),
        ([-100, 2, -100, 4], ([1, 2, 3], [4])),  # a conversation: its last answer
        ([-100, 2, 3, -100], ([1], [2, 3])),  # what stands behind is padding, or not asked
        ([1, 2, 3, 4], ([], [])),  # plain text has no prompt
        ([-100] * 4, ([], [])),
    ],
)
def test_prompt_and_reference(labels, parts):
    assert rows.split({"input_ids": [1, 2, 3, 4], "labels": labels}) == parts


def test_answers_do_not_depend_on_the_batch_and_nll_is_the_objectives(trained, tokenizer, problems):
    found = rows_of(tokenizer, problems["test"])
    one, many = (predict.predict(*predict.load(str(trained)), found, batch, 8) for batch in (1, 5))
    assert [record["prediction"] for record in one] == [record["prediction"] for record in many]
    assert len({record["prediction"] for record in one}) > 1
    assert [record["reference"] for record in one] == [row["completion"] for row in problems["test"]]
    model, _ = predict.load(str(trained))
    for record, other, row in zip(one, many, found, strict=True):
        assert other["nll"] == pytest.approx(record["nll"], rel=CLOSE)
        input_ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            result = Objective.from_config("cross_entropy").from_logits(model(input_ids).logits, labels)
        assert record["tokens"] == int(result.n_tokens)
        assert record["nll"] == pytest.approx(float(result.nll) * record["tokens"], rel=CLOSE)


def test_an_adapter_is_loaded_with_its_base(trained, tokenizer, make_model, problems, tmp_path):
    model = get_peft_model(
        make_model(initializer_range=0.5), LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)
    )
    model.peft_config["default"].base_model_name_or_path = str(trained)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    found = rows_of(tokenizer, problems["test"])
    adapted, plain = (predict.nll_of(predict.load(str(tmp_path / name))[0], found) for name in ("adapter", "model"))
    own = predict.nll_of(model.eval(), found)
    assert [nll for nll, _ in adapted] == pytest.approx([nll for nll, _ in own], rel=CLOSE)
    assert all(abs(a - p) > 1e-3 for (a, _), (p, _) in zip(adapted, plain, strict=True))


@pytest.fixture
def sft(files, tmp_path, problems):
    """A config of TRL that trains in a second, and the folder of its data."""
    data = tmp_path / "data"
    data.mkdir()
    for name, found in problems.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    config = {
        "model_name_or_path": str(files / "model"),
        "dataset_name": str(data),
        "output_dir": str(tmp_path / "not used"),
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "sft.yaml"


def start(config, out, *options, cwd):
    command = [COMMAND, "compare", config, "--out", out, *map(str, options)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def lines_of(out):
    file = out / "runs.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def test_the_seed_of_a_run_is_that_of_its_adapter_too(sft, tmp_path, monkeypatch):
    """Whatever was drawn before: objectives are compared from one start."""
    for name in ("SFTConfig", "SFTTrainer"):
        monkeypatch.setattr(trl, name, getattr(trl, name))  # the command replaces them
    adapters = []
    for drawn, seed in [(1, 0), (2, 0), (1, 1)]:
        more = {"use_peft": True, "lora_target_modules": "all-linear", "learning_rate": 0.0, "seed": seed}
        more |= {"output_dir": str(tmp_path / f"{drawn} {seed}"), "max_steps": 1, "eval_strategy": "no"}
        config = {key: value for key, value in yaml.safe_load(sft.read_text()).items() if key != "eval_steps"}
        sft.write_text(yaml.safe_dump(config | more | {"cv_loss": "lovasz"}))
        torch.manual_seed(drawn)
        monkeypatch.setattr(sys, "argv", ["cvloss-sft", "--config", str(sft)])
        runpy.run_module("axolotl_cvloss.hosts.trl_cli", run_name="__main__")
        adapters.append(load_file(tmp_path / f"{drawn} {seed}" / "adapter_model.safetensors"))
    first, again, other = adapters
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.hosts
def test_killed_in_the_middle_it_goes_on(sft, tmp_path):
    """One run, a kill, and the other two at once; the scorer is a function in the current folder."""
    (tmp_path / "own_scorer.py").write_text(SCORER)
    out = tmp_path / "out"
    options = ["--objective", "mix={cross_entropy: 0.6, lovasz: 0.4}", "--losses", "dice", "--seeds", 7]
    options += ["--score", "own_scorer:shares", "--validation", 4]
    process = start(sft, out, *options, cwd=tmp_path)
    deadline = time.monotonic() + 400
    while not lines_of(out):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    (first,) = lines_of(out)
    other = json.loads(first) | {"objective": "mix", "cv_loss": {"cross_entropy": 0.6, "lovasz": 0.4}, "rate": 2e-2}
    with (out / "runs.jsonl").open("a") as file:
        file.write(json.dumps(other) + "\n")  # a final run at a rate that is not the one now
        file.write('{"stage": "final", "objec')  # as a kill leaves it

    process = start(sft, out, *options, "--jobs", 2, cwd=tmp_path)
    printed = process.communicate(timeout=400)[0]
    assert process.returncode == 0, printed
    assert "4 of 4, about 0 s left" in printed
    assert lines_of(out)[0] == first
    found = [json.loads(text) for text in lines_of(out) if text.endswith("}")]
    found.remove(other)
    assert sorted(line["objective"] for line in found) == ["cross_entropy", "dice", "mix"]
    for line in found:
        assert (line["seed"], line["rate"], line["steps"], line["rows"]) == (7, 1e-2, 5, 8)
        assert list(line["scores"]) == ["shared", "words"]
        assert len(line["examples"]) == 8
    assert len({line["nll"] for line in found}) == 3
    # What differs between the configs of two runs.
    configs = [yaml.safe_load(file.read_text()) for file in (out / "work" / "runs").glob("*/config.yaml")]
    differ = {key for key in configs[0] if len({json.dumps(config[key]) for config in configs}) > 1}
    assert differ == {"cv_loss", "output_dir"}
    assert "not decided" in (out / "table.md").read_text()
    assert not list((out / "work" / "runs").glob("*/model"))  # big, and done with

    again = CliRunner().invoke(cli, ["compare", str(sft), "--out", str(out), "--losses", "dice", "--score", "text"])
    assert again.exit_code == 1
    assert "another config" in again.output


@pytest.mark.hosts
@pytest.mark.slow
def test_axolotl_with_a_choice_of_rates_and_an_adapter(make_config, files, tmp_path):
    """Two runs of the choice, one final one more; a seed gives the same adapter whatever the objective."""
    config = make_config(adapter="lora", lora_r=4, lora_alpha=8, lora_target_linear=True, max_steps=4, save_steps=None)
    for kernel in ("mlp", "qkv", "o", "embedding"):
        config[f"lora_{kernel}_kernel"] = False  # Axolotl turns them on by itself, on a CPU too
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "out"
    options = ["--losses", "lovasz", "--rates", "1e-3,1e-2", "--choice-seeds", 0, "--seeds", "1", "--keep-models"]
    process = start(tmp_path / "config.yaml", out, *options, cwd=tmp_path)
    printed = process.communicate(timeout=1200)[0]
    assert process.returncode == 0, printed
    found = [json.loads(text) for text in lines_of(out)]
    assert [line["stage"] for line in found] == ["choice"] * 4 + ["final"] * 2
    assert all(line["steps"] == 4 and line["rows"] == 6 for line in found)
    assert len({line["nll"] for line in found}) == 6
    model = next((out / "work" / "runs").glob("lovasz*seed1")) / "model"
    predicted = tmp_path / "predictions.jsonl"
    ran = subprocess.run(
        [COMMAND, "predict", model, tmp_path / "config.yaml", "--out", predicted], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    records = rows.read(predicted)
    assert len(records) == 12
    nll = {record["prompt"]: record["nll"] for record in records}
    for record in rows.read(model.parent / "test.jsonl"):
        assert record["nll"] == pytest.approx(nll[record["prompt"]], rel=CLOSE)


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        ({}, ["--objective", "mix"], "must be NAME=YAML"),
        ({}, ["--objective", "mix={lovas: 1}"], "objective mix: cv_loss.lovas: unknown loss"),
        ({}, [], "nothing to compare"),
        ({}, ["--losses", "dice", "--score", "words"], "unknown score 'words'; allowed: text, number"),
        ({}, ["--losses", "dice", "--seeds", ""], "--choice-seeds must have some"),
        ({}, ["--losses", "dice", "--rates", "fast"], "give numbers with commas"),
        ({"learning_rate": None}, ["--losses", "dice"], "no learning_rate; give --rates"),
        ({"base_model": "x", "model_name_or_path": None}, ["--losses", "dice"], "no test_datasets"),
    ],
)
def test_mistakes_are_said_at_once(sft, tmp_path, change, options, says):
    config = {key: value for key, value in (yaml.safe_load(sft.read_text()) | change).items() if value is not None}
    sft.write_text(yaml.safe_dump(config))
    ran = CliRunner().invoke(cli, ["compare", str(sft), "--out", str(tmp_path / "out"), *options])
    assert ran.exit_code != 0
    assert says in ran.output
    assert not (tmp_path / "out").exists()
