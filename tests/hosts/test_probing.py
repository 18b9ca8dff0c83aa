"""`cvloss probe`: what it says of the terms, beside gradients taken apart on full logits, in both hosts."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers import naive_weights
from naive import NAIVE
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("trl")

import trl

from axolotl_cvloss import Objective
from axolotl_cvloss.command.cli import _print_probe, cli
from axolotl_cvloss.command.probing import Probe, of_trl, probe, summary, weight_for

EPS = torch.finfo(torch.float32).eps
# Sums over a few hundred rows and a vocabulary of a hundred, in float32 on one side, behind a model of two layers.
CLOSE = 1e3 * EPS
MIX = {"cross_entropy": 0.6, "lovasz": 0.4}


@pytest.fixture
def sft(files, tmp_path, problems, monkeypatch):
    """Writes a config of TRL whose training set is 16 problems in micro-batches of 4."""
    for name in ("SFTConfig", "SFTTrainer"):
        monkeypatch.setattr(trl, name, getattr(trl, name))  # the command replaces them
    data = tmp_path / "data"
    data.mkdir()
    for name, found in problems.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found[:16]))

    def write(cv_loss=MIX, **keys):
        config = {
            "model_name_or_path": str(files / "model"),
            "dataset_name": str(data),
            "output_dir": str(tmp_path / "not used"),
            "max_steps": 5,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "bf16": False,
            "cv_loss": cv_loss,
            **keys,
        }
        path = tmp_path / "sft.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return write


def apart(model, examples, losses, parameters=(), parts=None):
    """For each loss its value, its gradient in the hidden states of all documents, and in the parameters of the head.

    Every document is run alone, and its logits are kept in full. It has its part of the sum: that of its tokens.
    """
    parts = parts or [len(labels) / sum(len(labels) for _, labels in examples) for _, labels in examples]
    found = {}
    for name in losses:
        value, hidden, head = 0.0, [], [torch.zeros(p.shape, dtype=torch.float64) for p in parameters]
        for (input_ids, labels), of_all in zip(examples, parts, strict=True):
            with torch.no_grad():
                states = model(input_ids[None], output_hidden_states=True).hidden_states[-1][0]
            states = states.requires_grad_()
            logits = model.get_output_embeddings()(states)[-len(labels) - 1 : -1]
            part = NAIVE[name](logits.double(), labels) * of_all
            gradients = torch.autograd.grad(part, [states, *parameters])
            value += float(part.detach())
            hidden.append(gradients[0].double().flatten())
            head = [total + g.double() for total, g in zip(head, gradients[1:], strict=True)]
        found[name] = value, torch.cat(hidden), math.sqrt(sum(float(g.square().sum()) for g in head))
    return found


def examples_of(tokenizer, rows):
    """Tokens and labels of prompts and completions as TRL makes them."""
    found = []
    for row in rows:
        asked = tokenizer(row["prompt"]).input_ids
        told = [*tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        found.append((torch.tensor(asked + told), torch.tensor(told)))
    return found


def agree(said, found, weights, head=True):
    names = list(weights)
    assert [term["name"] for term in said["terms"]] == names
    norms = {name: float(found[name][1].norm()) for name in names}
    parts = {name: weight * norms[name] for name, weight in weights.items()}
    entropy = found["cross_entropy"][1]
    for term in said["terms"]:
        name = term["name"]
        value, hidden, in_head = found[name]
        assert term["weight"] == weights[name]
        assert term["value"] == pytest.approx(value, rel=CLOSE)
        assert term["gradient_norm"] == pytest.approx(norms[name], rel=CLOSE)
        assert term["share"] == pytest.approx(parts[name] / sum(parts.values()), rel=CLOSE)
        assert term["cosine"] == pytest.approx(float(hidden @ entropy) / norms[name] / float(entropy.norm()), rel=CLOSE)
        assert term["head_gradient_norm"] == (pytest.approx(in_head, rel=CLOSE) if head else None)


@pytest.mark.parametrize("keys", [{}, {"cv_loss": {**MIX, "head": "logits"}}], ids=["fused", "logits"])
def test_against_gradients_taken_apart(sft, files, problems, tmp_path, keys):
    """The whole training set, so that the order of its rows does not matter."""
    config = sft(**keys)
    folder = tmp_path / "folder"
    folder.mkdir()
    before = sorted(tmp_path.iterdir())
    said = probe(of_trl(config, str(folder)), 9)
    assert sorted(tmp_path.iterdir()) == before
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    model = AutoModelForCausalLM.from_pretrained(files / "model")
    examples = examples_of(AutoTokenizer.from_pretrained(files / "model"), problems["train"][:16])
    agree(said, apart(model, examples, MIX, [model.lm_head.weight]), MIX)
    tokens = sum(len(labels) for _, labels in examples)
    classes = sum(len(labels.unique()) for _, labels in examples)
    assert (said["batches"], said["rows"]) == (4, tokens)
    entropy, lovasz = said["terms"]
    assert (entropy["rows"], entropy["sets"], entropy["classes"]) == (tokens, None, None)
    assert (lovasz["rows"], lovasz["sets"], lovasz["classes"]) == (tokens, 16, pytest.approx(classes / 16))
    assert said["memory"]["with_objective"] > 0
    assert said["memory"]["without_objective"] > 0


@pytest.mark.parametrize(
    "examples", [{"normalize": "examples"}, {"reweight": {"by": "extremes", "warmup": 0.9}}, {"cvar": 0.3}], ids=str
)
def test_documents_that_are_weighed(examples, sft, files, problems, tmp_path):
    """As at the end of training, among all of the micro-batches; each document counts by 1 beside its weight."""
    said = probe(of_trl(sft({**MIX, "examples": examples}), str(tmp_path)), 4)
    model = AutoModelForCausalLM.from_pretrained(files / "model")
    documents = examples_of(AutoTokenizer.from_pretrained(files / "model"), problems["train"][:16])
    weights = torch.ones(16)
    if "normalize" not in examples:
        losses = [apart(model, [document], ["cross_entropy"])["cross_entropy"][0] for document in documents]
        kinds = {"reweight": {"by": "extremes", "r": 0.4}} if "reweight" in examples else {"cvar": {"share": 0.3}}
        weights = naive_weights(losses, torch.ones(16), kinds)
    agree(said, apart(model, documents, MIX, [model.lm_head.weight], (weights / 16).tolist()), MIX)


def test_an_adapted_head(sft, files, problems, tmp_path):
    """The gradient in the head is that of its adapter."""
    keys = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": ["lm_head", "q_proj"]}
    trainer = of_trl(sft(**keys), str(tmp_path))
    model = trainer.model
    for name, parameter in model.named_parameters():  # an adapter begins as nothing
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    said = probe(trainer, 4)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    alpha = trainer.model.peft_config["default"].lora_alpha
    other = get_peft_model(
        AutoModelForCausalLM.from_pretrained(files / "model"),
        LoraConfig(r=4, lora_alpha=alpha, target_modules=["lm_head", "q_proj"]),
    ).eval()
    other.load_state_dict(state)
    examples = examples_of(AutoTokenizer.from_pretrained(files / "model"), problems["train"][:16])
    head = [p for p in other.get_output_embeddings().parameters() if p.requires_grad]
    assert len(head) == 2
    agree(said, apart(other, examples, MIX, head), MIX)


@pytest.fixture
def evaluated():
    """A probe of an objective on random hidden states and labels."""

    def evaluate(cv_loss, labels, hidden=None, frozen=False):
        torch.manual_seed(0)
        head = torch.nn.Linear(8, 12, bias=False).requires_grad_(not frozen)
        found = Probe(Objective.from_config(cv_loss), head)
        hidden = torch.randn(*labels.shape, 8) if hidden is None else hidden
        head(hidden)
        found.from_hidden(found._hidden, head, labels, shift=False)
        return summary(found, 0.3)

    return evaluate


LABELS = torch.tensor([[1, 2, 3, 4], [5, 5, 6, 7]])


def test_the_weight_for_a_share_gives_it(evaluated):
    first = evaluated(MIX, LABELS)
    assert {"name", "weight", "value", "rows", "sets", "gradient_norm", "share", "cosine"} <= first["terms"][1].keys()
    assert first["warnings"] == []
    assert sum(term["share"] for term in first["terms"]) == pytest.approx(1)
    again = evaluated({**MIX, "lovasz": first["terms"][1]["weight_for_share"]}, LABELS)
    assert again["terms"][1]["share"] == pytest.approx(0.3)
    assert weight_for(0.3, evaluated("lovasz", LABELS)["terms"], 0) is None  # alone, its share is the whole


def test_a_frozen_head_has_no_gradient(evaluated):
    assert [term["head_gradient_norm"] for term in evaluated(MIX, LABELS, frozen=True)["terms"]] == [None, None]


def test_a_schedule_counts_as_it_ends(evaluated):
    cv_loss = {"cross_entropy": 0.6, "lovasz": {"weight": {"from": 0.0, "to": 0.4, "over": 0.3}}}
    assert evaluated(cv_loss, LABELS)["terms"] == evaluated(MIX, LABELS)["terms"]


@pytest.mark.parametrize(
    ("cv_loss", "labels", "hidden", "says"),
    [
        (MIX, torch.full((2, 4), -100), None, "cross_entropy: it has no rows"),
        (MIX, LABELS, torch.full((2, 4, 8), math.nan), "lovasz: its value or its gradient is NaN"),
        ({"cross_entropy": 1.0, "lovasz": 1e-4}, LABELS, None, "lovasz: its share of the gradient is 0."),
        (MIX, LABELS[:, :1], None, "lovasz: each of its sets is one token"),
        ({"cross_entropy": 1.0, "lovasz": 0.0}, LABELS, None, "lovasz: its share of the gradient is 0.00%"),
    ],
)
def test_warnings(evaluated, cv_loss, labels, hidden, says):
    said = evaluated(cv_loss, labels, hidden)
    assert any(line.startswith(says) for line in said["warnings"]), said["warnings"]
    json.dumps(said, allow_nan=False)


def test_no_gradient(evaluated):
    """Where the target has all of p, in float32."""
    torch.manual_seed(0)
    weight = torch.nn.Linear(8, 12, bias=False).weight.detach()
    said = evaluated(MIX, LABELS, 1e6 * weight[LABELS])
    assert torch.equal((weight @ weight.T).argmax(1)[LABELS], LABELS)
    assert "lovasz: it has no gradient, so it trains nothing" in said["warnings"]


def test_two_terms_that_cancel(evaluated):
    """One that pulls the target up, one that pushes it down."""
    from helpers import temporary_losses

    from axolotl_cvloss import register_loss

    with temporary_losses():

        @register_loss("against", family="token")
        def against(logp):
            return logp

        said = evaluated({"cross_entropy": 1.0, "against": 0.9}, LABELS)
    assert said["terms"][1]["cosine"] == pytest.approx(-1)
    assert "cross_entropy and against cancel: together their gradient is 10% of the larger one" in said["warnings"]


def test_the_table(evaluated, capsys):
    said = evaluated({"cross_entropy": 1.0, "lovasz": 1e-4}, LABELS)
    memory = {"with_objective": 3 << 20, "without_objective": None}
    _print_probe({**said, "batches": 2, "rows": 8, "device": "cpu", "memory": memory})
    first, head, *rows, last, warning = filter(None, capsys.readouterr().out.splitlines())
    assert first == "2 micro-batches, 8 labelled tokens, on cpu"
    cells = [re.split(r"\s{2,}", row) for row in (head, *rows)]
    entropy = ["cross_entropy", "1", f"{said['terms'][0]['value']:.4g}", "8"]  # no sets
    assert cells[0][:4] == ["term", "weight", "value", "rows"]
    assert cells[1][:4] == entropy
    assert cells[2][:6] == ["lovasz", "0.0001", f"{said['terms'][1]['value']:.4g}", "8", "2", "3.5"]
    assert cells[2][-1] == f"{said['terms'][1]['weight_for_share']:.4g}"
    assert "3 MiB with the objective, unknown with the model's own loss" in last
    assert warning.startswith("warning: lovasz: its share of the gradient is 0.")


@pytest.mark.hosts
@pytest.mark.slow
def test_the_command(sft, capfd):
    """A table with a share; what the host prints does not come to stdout."""
    ran = CliRunner().invoke(cli, ["probe", str(sft()), "--batches", "2", "--share", "0.3"])
    assert ran.exit_code == 0, capfd.readouterr().err
    assert capfd.readouterr().out == ""
    first, _, head, *rows = ran.stdout.splitlines()
    assert first.startswith("2 micro-batches, ")
    assert head.split()[:3] == ["term", "weight", "value"]
    assert head.endswith("weight for the share")
    assert [row.split()[:2] for row in rows[:2]] == [["cross_entropy", "0.6"], ["lovasz", "0.4"]]
    assert "MiB with the objective" in ran.stdout


def test_a_mistake_is_said_before_a_model_is_loaded(sft):
    ran = CliRunner().invoke(cli, ["probe", str(sft({"lovas": 1}))])
    assert ran.exit_code == 1
    assert "did you mean lovasz?" in ran.output


@pytest.mark.hosts
@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
def test_axolotl(make_config, files, tmp_path, adapter):
    """Its table, and the same figures as gradients taken apart on the rows that it has prepared."""
    keys = {"max_steps": None, "num_epochs": 1, "eval_steps": None, "save_steps": None, "test_datasets": None}
    if adapter:
        keys |= {
            "adapter": "lora",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_dropout": 0.0,
            "lora_target_modules": ["q_proj", "lm_head"],
        }
        keys |= {f"lora_{kernel}_kernel": False for kernel in ("mlp", "qkv", "o", "embedding")}
    config = make_config(**keys)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [Path(sys.executable).with_name("cvloss"), "probe", path, "--batches", "64"]
    ran = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)  # nothing else is printed there
    assert {"config", "host", "batches", "rows", "device", "terms", "memory", "warnings"} == said.keys()
    assert said["host"] == "axolotl"
    assert not Path(config["output_dir"]).exists()

    from datasets import load_from_disk

    (prepared,) = {file.parent for file in Path(config["dataset_prepared_path"]).rglob("dataset_info.json")}
    examples = []
    for row in load_from_disk(str(prepared)):
        labels = torch.tensor(row["labels"])
        examples.append((torch.tensor(row["input_ids"]), labels[labels != -100]))
    assert said["rows"] == sum(len(labels) for _, labels in examples)
    model = AutoModelForCausalLM.from_pretrained(files / "model")
    found = apart(model, examples, MIX, [model.lm_head.weight])
    if adapter:  # it begins as nothing, so that the hidden states and their gradient are those of the model
        assert all(term.pop("head_gradient_norm") > 0 for term in said["terms"])
        for term in said["terms"]:
            term["head_gradient_norm"] = None
    agree(said, found, MIX, head=not adapter)
