"""The command line, called as click calls it, and twice as people do."""

import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from helpers import temporary_losses
from naive import NAIVE

from axolotl_cvloss import Objective, available_losses, register_loss
from axolotl_cvloss.command import answer
from axolotl_cvloss.command.checking import HOSTS
from axolotl_cvloss.command.cli import cli
from axolotl_cvloss.engine.families import FAMILIES
from axolotl_cvloss.hosts.axolotl_keys import CONFLICTS, LISTED, PARALLEL, SAVERS
from axolotl_cvloss.hosts.axolotl_prompts import LETTERS
from axolotl_cvloss.objective.config import CVLossConfig

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = sorted(path for path in (REPOSITORY / "example_configs").glob("*.yaml") if ".sweep" not in path.name)
BIN = Path(sys.executable).parent
AXOLOTL = {"base_model": "some/model", "plugins": ["axolotl_cvloss.CVLossPlugin"]}
TRL = {"model_name_or_path": "some/model"}
MIX = {"cross_entropy": 0.6, "lovasz": 0.4}


def run(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def checked(tmp_path):
    """What check says of a config, as JSON; its exit code follows from the errors."""

    def check(config, *options):
        path = tmp_path / "config.yaml"
        path.write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        result = CliRunner().invoke(cli, ["check", "--json", *options, str(path)])
        report = json.loads(result.stdout)
        assert result.exit_code == (1 if report["errors"] else 0)
        return report

    return check


def columns(line):
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_list():
    head, *lines = run("list").stdout.splitlines()
    assert columns(head) == ["loss", "family", "formula", "needs", "cost", "source"]
    assert [columns(line)[0] for line in lines] == list(available_losses())
    for line, loss in zip(lines, available_losses().values(), strict=True):
        assert f" {loss.formula} " in line
        assert loss.kind.cost in line


def test_every_family_has_its_words():
    for name, family in FAMILIES.items():
        assert family.name == name
        assert family.words.endswith(".")
        assert family.cost


def test_list_as_json():
    losses = {said["name"]: said for said in json.loads(run("list", "--json").stdout)}
    assert set(losses) == set(available_losses())
    assert losses["focal"]["parameters"][0] == {"name": "gamma", "default": 2.0, "allowed": "a finite number >= 0"}


@pytest.mark.parametrize("name", available_losses())
def test_show(name):
    loss = available_losses()[name]
    shown = run("show", name).stdout
    assert loss.formula in shown
    assert loss.source in shown
    assert json.loads(run("show", name, "--json").stdout)["formula"] == loss.formula
    if loss.requires and find_spec(loss.requires) is None:
        pytest.skip(f"{loss.requires} is not installed, so no config may name {name}")
    # the YAML at the end means the loss with its defaults
    example = yaml.safe_load(shown[shown.index("\ncv_loss:") :])
    assert CVLossConfig.parse(example["cv_loss"]) == CVLossConfig.parse(name)
    assert set(example["cv_loss"][name]) == {"weight", *loss.parameters.model_fields}


def test_show_of_a_misspelt_name():
    assert "unknown loss 'focl'; did you mean focal? allowed: " in run("show", "focl", code=1).stderr


def test_losses_of_other_people(tmp_path):
    def nothing_said(logp, power: float = 2.0):
        return (1 - logp.exp()) ** power

    def of_the_sum(lse):
        return lse**2

    def of_all_tokens(logp):
        return -logp.clamp(max=logp.mean())

    with temporary_losses():
        for function in (nothing_said, of_the_sum, of_all_tokens):
            register_loss(function.__name__, family="token")(function)
        assert "nothing_said: no description" in run("show", "nothing_said").stdout
        assert {"nothing_said", "of_the_sum"} <= {said["name"] for said in json.loads(run("list", "--json").stdout)}
        (points,) = json.loads(run("plot", "nothing_said", "-p", "power=1", "--json").stdout).values()
        assert points["value"] == pytest.approx([1 - p for p in points["p"]])
        out = ["--out", tmp_path / "answer.png"]
        printed = run("plot", "of_the_sum", *out).stdout
        assert "on a made answer, as of_the_sum is not a function of p alone: it needs lse" in printed
        printed = run("plot", "of_all_tokens", *out).stdout
        assert "of_all_tokens is not a function of p alone: the value of a token depends on other tokens" in printed


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_check_has_nothing_against_the_examples(path):
    report = json.loads(run("check", path, "--json").stdout)
    key = yaml.safe_load(path.read_text())["cv_loss"]
    assert report["host"] == ("trl" if path.stem.startswith("trl") else "axolotl")
    letters = path.stem in LETTERS  # as in the paper, and said in the file
    assert report["errors"] == []
    assert ["hardly depends on more than p" in warning for warning in report["warnings"]] == [True] * letters
    assert report["objective"] == str(Objective.from_config(key))
    assert report["cv_loss"] == CVLossConfig.parse(key).dump()
    printed = run("check", path).stdout
    assert f"objective: {report['objective']}\n" in printed
    assert f"{path}: fine for {'TRL' if report['host'] == 'trl' else 'Axolotl'}" in printed


def test_check_says_what_each_term_means(tmp_path):
    terms = [
        {"loss": "cross_entropy", "weight": 0.6, "scope": "sequence"},
        {"loss": "tversky", "weight": {"from": 0, "to": 0.4, "over": 0.3}, "alpha": 0.2, "per": "batch"},
    ]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"cv_loss": {"terms": terms}}))
    printed = run("check", path).stdout.splitlines()
    assert columns(printed[3])[:4] == [
        "0.6",
        "cross_entropy",
        "label_smoothing 0",
        "every token but padding, the prompt too",
    ]
    assert columns(printed[4])[:5] == [
        "0 to 0.4 over 30% of training (linear)",
        "tversky",
        "alpha 0.2, beta 0.7, smooth 1",
        "labelled tokens",
        "a micro-batch of one process",
    ]
    assert printed[-1] == f"{path}: fine as far as the key cv_loss goes"


def test_show_knows_examples():
    fields = [said["field"] for said in json.loads(run("show", "examples", "--json").stdout)]
    assert fields == [
        *("normalize", "reweight", "cvar", "look"),
        *("reweight.by", "reweight.r", "reweight.warmup", "cvar.share", "cvar.reg"),
    ]
    printed = run("show", "examples").stdout
    assert "one of tokens, examples, square_root" in printed
    assert "one of step, batch" in printed


def test_check_says_which_documents_are_compared(checked, tmp_path):
    path = tmp_path / "config.yaml"
    key = {"cross_entropy": 1, "examples": {"cvar": 0.25, "look": "batch"}}
    path.write_text(yaml.safe_dump({"cv_loss": key}))
    said = "a document counts by 1, times its weight by cvar (the worst 0.25) among the documents of its micro-batch"
    assert f"examples: {said}\n" in run("check", path).stdout
    config = {"cv_loss": key, "plugins": ["axolotl_cvloss.CVLossPlugin"], "base_model": "x", "micro_batch_size": 1}
    warning = "cv_loss.examples.look: batch is the micro-batch, and that is of one example, so it weighs 1"
    assert [warning in checked(given)["warnings"] for given in (config, {**config, "sample_packing": True})] == [
        True,
        False,
    ]


def test_check_says_what_documents_count_by(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"cv_loss": {"focal": 1, "examples": {"normalize": "square_root"}}}))
    printed = run("check", path).stdout
    assert "objective: 1 focal (normalize: square_root)\n" in printed
    assert "\nexamples: a document counts by the square root of the number of its rows\n" in printed


def test_check_finds_what_is_wrong_with_the_key(checked):
    report = checked({**AXOLOTL, "cv_loss": {"focal": {"gama": 3}, "lovas": 1}})
    assert report["errors"] == [
        "cv_loss.focal.gama: unknown parameter of focal; did you mean gamma? "
        "allowed: gamma, alpha, weight, scope, goldfish, where",
        f"cv_loss.lovas: unknown loss 'lovas'; did you mean lovasz? allowed: {', '.join(available_losses())}",
    ]
    assert report["objective"] is report["cv_loss"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cv_loss: [a", "cannot be read: while parsing"),
        ("- cv_loss", "is not a mapping"),
        ("", "is not a mapping"),
        ("base_model: x", "cv_loss: the key is not in the config"),
        ("base_model: x\ncvloss: lovasz", "unknown key cvloss: did you mean cv_loss?"),
    ],
)
def test_check_of_what_has_no_key(text, message, checked):
    (error,) = checked(text)["errors"]
    assert message in error


@pytest.mark.parametrize(("key", "value"), [*((key, True) for key in CONFLICTS), *((key, 2) for key in PARALLEL)])
def test_check_finds_keys_of_axolotl_that_conflict(key, value, checked):
    (error,) = checked({**AXOLOTL, "cv_loss": MIX, key: value})["errors"]
    assert error.startswith(f"cv_loss cannot be used with {key}")
    assert not checked({**AXOLOTL, "cv_loss": MIX, key: 1 if value == 2 else False})["errors"]


@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        (None, "put axolotl_cvloss.CVLossPlugin there"),
        (["axolotl.integrations.liger.LigerPlugin"], "put axolotl_cvloss.CVLossPlugin there"),
        (["axolotl_cvloss.CVLosPlugin"], "put axolotl_cvloss.CVLossPlugin instead of axolotl_cvloss.CVLosPlugin"),
        ([*AXOLOTL["plugins"], "axolotl.integrations.diffusion.DiffusionPlugin"], "cannot be used with diffusion"),
        ([*AXOLOTL["plugins"], "axolotl.integrations.hatchery.HatcheryPlugin"], "cannot be used with hatchery"),
    ],
)
def test_check_looks_at_the_plugins_of_axolotl(plugins, message, checked):
    (error,) = checked({**AXOLOTL, "plugins": plugins, "cv_loss": MIX})["errors"]
    assert message in error


@pytest.mark.parametrize("key", SAVERS)
def test_check_notes_what_is_switched_off(key, checked):
    report = checked({**AXOLOTL, "cv_loss": MIX, key: True})
    assert (report["errors"], report["warnings"]) == ([], [])
    (note,) = report["notes"]
    assert note.endswith(f"so {key} is switched off")
    assert checked({**AXOLOTL, "cv_loss": MIX, key: False})["notes"] == []


def test_notes_are_printed(tmp_path):
    path = tmp_path / "config.yaml"
    listed = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"
    path.write_text(yaml.safe_dump({**AXOLOTL, "plugins": [*AXOLOTL["plugins"], listed], "cv_loss": MIX}))
    printed = run("check", path).stdout.splitlines()
    assert printed[-2].startswith("note: cv_loss computes its loss itself")
    assert printed[-1].endswith("fine for Axolotl")


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"use_eaft": True}, "write cv_loss: {entropy_adaptive: {weight: 2.996, alpha: 1, k: 20}}"),
        ({"model_type": "AutoModelForSequenceClassification"}, "it has no tokens to predict"),
        ({"model_type": "MambaLMHeadModel"}, "trainer for Mamba computes a loss of its own"),
        ({"trainer_cls": "axolotl.core.trainers.AxolotlMambaTrainer"}, "it computes a loss of its own"),
        ({"cv_los": {"dice": 1}}, "unknown key cv_los: did you mean cv_loss?"),
        ({"cv_loss.lovas": 1}, "cv_loss.lovas: unknown loss"),
        ({"cv_loss.lovasz.weight.more": {}}, "cv_loss.lovasz.weight"),
    ],
)
def test_check_says_what_stops_a_run_of_axolotl(keys, problem, checked):
    (error,) = checked({**AXOLOTL, "cv_loss": MIX, **keys})["errors"]
    assert problem in error


def test_check_reads_the_config_of_a_model_that_is_there(checked, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "mamba"}')
    (error,) = checked({**AXOLOTL, "base_model": str(model), "cv_loss": MIX})["errors"]
    assert "trainer for Mamba computes a loss of its own" in error
    (model / "config.json").write_text('{"model_type": "llama"}')
    assert not checked({**AXOLOTL, "base_model": str(model), "cv_loss": MIX})["errors"]


def test_check_knows_dotted_keys(checked):
    assert checked({**AXOLOTL, "cv_loss": MIX, "cv_loss.lovasz": 0.1})["objective"] == "0.6 cross_entropy + 0.1 lovasz"


def test_check_explains_a_sweep():
    path = REPOSITORY / "example_configs" / "losses.sweep.yaml"
    keys = yaml.safe_load(path.read_text())["cv_loss"]
    report = json.loads(run("check", path, "--json").stdout)
    assert [value["objective"] for value in report["values"]] == [str(Objective.from_config(key)) for key in keys]
    assert report["runs"] == len(keys)
    assert report["errors"] == []
    printed = run("check", path).stdout
    assert printed.count("objective: ") == len(keys)
    assert f"{path}: a sweep of {len(keys)} runs\n" in printed


def test_check_tries_each_value_of_a_sweep(checked):
    swept = {
        "_": [{"cv_loss": MIX, "micro_batch_size": 2}, {"cv_loss__dice": 1, "micro_batch_size": 4}],
        "cv_loss.focal.gamma": [1, 2, 3],
        "cv_loss.lovasz": [0.1, 0.2],
        "cv_loss.terms.1.weight": [0.2],
        "learning_rate": [1e-4, 2e-4],
    }
    report = checked(swept)
    assert report["runs"] == 2 * 3 * 2 * 2
    assert [value["objective"] for value in report["values"]] == [
        "0.6 cross_entropy + 0.4 lovasz",
        "1 dice",
        *("1 focal",) * 3,
        "0.1 lovasz",
        "0.2 lovasz",
        None,
    ]
    assert report["errors"] == report["warnings"] == []  # of a part of a mix nothing is said
    (note,) = report["notes"]
    assert note.startswith("cv_loss.terms.1.weight: what it means depends on cv_loss of the config")


@pytest.mark.parametrize(
    ("swept", "message"),
    [
        ({"cv_loss": [{"lovas": 1}, "focal"]}, "unknown loss"),
        ({"cv_loss.focal.gama": [1, 2]}, "gama"),
        ({"cv_loss": ["focal"], "learning_rate": 1e-4}, "learning_rate: must be a list of values"),
        ({"cv_loss": ["focal"], "_": ["dice"]}, "_: must be a list of mappings, not 'dice'"),
        ({"cv_loss": ["focal"], "cv_los.dice": [1]}, "did you mean cv_loss"),
        ({"cv_loss": ["focal"], "learning_rate": []}, "a list without values makes no run"),
    ],
)
def test_check_finds_what_is_wrong_with_a_sweep(swept, message, checked):
    (error,) = checked(swept)["errors"]
    assert message in error


def test_a_config_with_a_list_under_the_key_is_no_sweep(checked):
    report = checked({**AXOLOTL, "cv_loss": ["focal", "dice"]})
    assert report["errors"]
    assert "runs" not in report


def test_check_warns_where_answers_are_one_letter(checked):
    def warnings(key, types=("openbookqa", "hellaswag"), **more):
        datasets = [{"path": "x", "type": f"axolotl_cvloss.hosts.axolotl_prompts.{name}"} for name in types]
        return checked({**AXOLOTL, "cv_loss": key, "datasets": datasets, **more})["warnings"]

    (warning,) = warnings({**MIX, "dice": 0.1})
    assert warning.startswith("cv_loss: the answers of this dataset are one labelled token, or two")
    assert "the value of dice and lovasz hardly depends" in warning
    assert not warnings("cross_entropy")
    assert not warnings({"cross_entropy": 0.6, "lovasz": {"weight": 0.4, "per": "batch"}})
    assert not warnings({"cross_entropy": 0.6, "lovasz": {"weight": 0.4, "scope": "sequence"}})
    assert not warnings(MIX, types=("openbookqa", "gsm8k"))
    assert not warnings(MIX, train_on_inputs=True)


def test_check_warns_of_a_trainer_that_it_does_not_know(checked):
    (warning,) = checked({**AXOLOTL, "cv_loss": MIX, "trainer_cls": "mine.Trainer"})["warnings"]
    assert warning.startswith("trainer_cls: mine.Trainer is not known here")


def test_axolotl_turns_these_plugins_on_where_they_are_listed():
    pytest.importorskip("axolotl")
    from axolotl.integrations.cut_cross_entropy import CutCrossEntropyPlugin
    from axolotl.integrations.cut_cross_entropy.args import CutCrossEntropyArgs
    from axolotl.integrations.diffusion import DiffusionArgs, DiffusionPlugin

    plugins = {CutCrossEntropyPlugin: CutCrossEntropyArgs, DiffusionPlugin: DiffusionArgs}
    # HatcheryPlugin brings its trainer as soon as it is listed, and its key has no default.
    assert {plugin.__name__ for plugin in plugins} | {"HatcheryPlugin"} == set(LISTED)
    for plugin, args in plugins.items():
        assert getattr(args(), LISTED[plugin.__name__])


def test_keys_that_tell_of_axolotl_are_its_own():
    pytest.importorskip("axolotl")
    from axolotl.utils.schemas.config import AxolotlInputConfig

    assert set(HOSTS["axolotl"]) <= set(AxolotlInputConfig.model_fields)
    assert not set(HOSTS["trl"]) & set(AxolotlInputConfig.model_fields)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"loss_type": "dft"}, "loss_type: dft: it brings another loss"),
        ({"label_smoothing_factor": 0.1}, "write cross_entropy: {label_smoothing: 0.1} in cv_loss"),
        ({"parallelism_config": {"tp_size": 2}}, "tp_size above 1 (tensor parallelism)"),
    ],
)
def test_check_finds_options_of_trl_that_conflict(option, message, checked):
    (error,) = checked({**TRL, "cv_loss": MIX, **option})["errors"]
    assert message in error
    assert not checked({**option, "cv_loss": MIX}, "--host", "axolotl")["errors"][1:]


def test_check_notes_what_is_switched_off_under_trl(checked):
    report = checked({**TRL, "cv_loss": MIX, "use_liger_kernel": True})
    assert (report["errors"], report["warnings"]) == ([], [])
    assert report["notes"][0].endswith("Liger's fused_linear_cross_entropy is switched off")
    kernels = {"fused_linear_cross_entropy": False}
    assert not checked({**TRL, "cv_loss": MIX, "use_liger_kernel": True, "liger_kernel_config": kernels})["notes"]


def test_the_host_may_be_named(checked):
    assert checked({"cv_loss": MIX})["host"] is None
    assert checked({"cv_loss": MIX}, "--host", "trl")["host"] == "trl"
    (error,) = checked({"cv_loss": MIX}, "--host", "axolotl")["errors"]
    assert error.startswith("plugins: ")


SELF = "self_adjusting_dice"
TURNS = "the losses of single tokens together lower the probability of a token that has more than"


@pytest.mark.parametrize(
    ("key", "warning"),
    [
        ("lovasz", "lovasz without a loss of single tokens learns slowly"),
        ({"dice": 0.5, "lovasz": 0.5, "cross_entropy": 0}, "dice and lovasz without a loss of single tokens"),
        ("number_token_mse", "number_token_mse says nothing of tokens that are no numbers"),
        ({"dice": 0.5, "number_token_mse": 0.1}, "dice and number_token_mse without a loss of single tokens"),
        (SELF, f"{TURNS} 0.5, so they punish confidence; detach_weight: true in self_adjusting_dice removes that"),
        ({SELF: {"alpha": 3.0}}, f"{TURNS} 0.25,"),
        ({SELF: 0.95, "cross_entropy": 0.05}, TURNS),
        ({SELF: {"alpha": {"from": 0, "to": 1}}}, f"{TURNS} 0.5,"),
        ({"cross_entropy": 3}, "the weights sum to 3; far from 1"),
        (
            {"cross_entropy": 1, "lovasz": {"weight": {"from": 0, "to": 4}}},
            "the weights sum to 1 at first and to 5 at last; far from 1",
        ),
        ({"cross_entropy": 1, "focal": 0}, "cv_loss.focal: its weight is 0"),
        ({"cross_entropy": 1, "unlikelihood": 0.1}, "cv_loss.unlikelihood: it acts on the same tokens as the other"),
        ({"cross_entropy": 0.6, "lovasz": 0.4, "reference": True}, "needs all logits of a batch at once"),
    ],
)
def test_check_warns_of_traps(key, warning, checked):
    report = checked({**AXOLOTL, "cv_loss": key})
    assert any(warning in line for line in report["warnings"]), report["warnings"]
    assert report["errors"] == []


@pytest.mark.parametrize("key", [SELF, {SELF: {"alpha": 3.0}}, {SELF: 0.95, "cross_entropy": 0.05}])
def test_the_probability_of_the_warning_is_where_the_gradient_turns(key, checked):
    (warning,) = [line for line in checked({"cv_loss": key})["warnings"] if TURNS in line]
    said = float(re.search(r"more than ([\d.]+\d)", warning)[1])
    for p, turned in ((said - 0.01, False), (said + 0.01, True)):
        logits = torch.tensor([[math.log(p / (1 - p)), 0.0]], requires_grad=True)
        Objective.from_config(key).from_logits(logits, torch.tensor([0]), shift=False).loss.backward()
        assert (logits.grad[0, 0] > 0) == turned


@pytest.mark.parametrize(
    "key",
    [
        "cross_entropy",
        {SELF: {"detach_weight": True}},
        {"cross_entropy": 0.6, SELF: 0.4},
        {"cross_entropy": 0.6, "lovasz": {"weight": {"from": 0, "to": 0.4, "over": 0.3}}},
        {"cross_entropy": {"weight": 0.5, "label_smoothing": 0.1}, "focal": 0.5},
        {"cross_entropy": 1, "unlikelihood": {"weight": 0.1, "where": "bad"}},
    ],
)
def test_check_does_not_cry_wolf(key, checked):
    assert checked({**AXOLOTL, "cv_loss": key})["warnings"] == []


def test_check_says_which_columns_the_dataset_must_have(checked):
    key = {"cross_entropy": 1, "unlikelihood": {"weight": 0.1, "where": "bad"}, "example_weights": "weight"}
    report = checked({**AXOLOTL, "cv_loss": key})
    for said in (
        "cv_loss.unlikelihood.where: the dataset must have the column bad",
        "cv_loss.example_weights: the data",
    ):
        assert any(said in note for note in report["notes"]), report["notes"]
    streamed = checked({**AXOLOTL, "cv_loss": key, "streaming": True, "sample_packing": True})
    assert any("where cannot be used with streaming with sample_packing" in error for error in streamed["errors"])


def test_plot_has_the_values_and_the_slope_of_the_loss():
    curves = json.loads(run("plot", "focal", SELF, "-p", "gamma=1", "-p", "gamma=3", "--json").stdout)
    assert list(curves) == ["focal gamma=1", "focal gamma=3", SELF]

    def focal(z, gamma):
        p = 1 / (1 + math.exp(-z))
        return -((1 - p) ** gamma) * math.log(p)

    for gamma in (1, 3):
        points = zip(*curves[f"focal gamma={gamma}"].values(), strict=True)
        for p, value, pull in list(points)[9::98]:
            z = math.log(p / (1 - p))  # the logit of the target beside one other of 0
            assert value == pytest.approx(focal(z, gamma), rel=1e-9)
            assert pull == pytest.approx((focal(z - 1e-5, gamma) - focal(z + 1e-5, gamma)) / 2e-5, rel=1e-5, abs=1e-9)


def test_plot_makes_a_picture(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    out = tmp_path / "curves.png"
    printed = run("plot", "cross_entropy", "focal", "-p", "gamma=3", "--out", out).stdout
    assert printed == f"{out}: cross_entropy, focal gamma=3\n"
    pixels = image.imread(out)
    assert pixels.shape[0] > 300
    assert len({tuple(pixel) for row in pixels[::3, ::3] for pixel in row.tolist()}) > 20


def test_every_loss_can_be_looked_at_on_the_made_answer(monkeypatch):
    """Losses that are functions of p alone are drawn so too, where another one in the picture is not."""
    monkeypatch.setattr(answer, "GRID", answer.GRID[9::40])  # all 99 points of all losses take half a minute
    looks = json.loads(run("plot", *available_losses(), "--json").stdout)
    assert list(looks) == list(available_losses())
    rows, vocab = len(answer.ANSWER), len(answer.VOCABULARY)
    for name, seen in looks.items():
        value, pull, shown = (torch.tensor(seen[key], dtype=torch.float64) for key in ("value", "pull", "map"))
        assert value.shape == pull.shape == answer.GRID.shape, name
        assert value.isfinite().all(), name
        assert shown.shape == (rows, vocab), name
        assert shown.abs().sum() > 0, name


def test_the_made_answer_has_the_values_and_the_gradient_of_the_loss():
    looks = json.loads(run("plot", "dice", "lovasz", "-p", "smooth=2", "--json").stdout)
    forms = {"dice smooth=2": partial(NAIVE["dice"], smooth=2.0), "lovasz": NAIVE["lovasz"]}
    assert list(looks) == list(forms)
    (at,) = torch.where(answer.P[-1] == answer.GRID)[0].tolist()
    for name, form in forms.items():
        z = answer.logits(answer.P[-1]).requires_grad_()
        assert torch.allclose(z.detach().softmax(1)[range(len(z)), answer.LABELS], answer.P, rtol=1e-12)
        value = form(z, answer.LABELS)
        (gradient,) = torch.autograd.grad(value, z)
        assert looks[name]["value"][at] == pytest.approx(value.item(), rel=1e-12)
        assert torch.allclose(torch.tensor(looks[name]["map"], dtype=z.dtype), -gradient, atol=1e-14)
        assert looks[name]["pull"][at] == looks[name]["map"][-1][answer.LABELS[-1]]


def test_plot_makes_a_picture_of_the_answer(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    out = tmp_path / "answer.png"
    printed = run("plot", "lovasz", "--out", out).stdout
    assert printed.startswith(f"{out}: lovasz; on a made answer, as lovasz is not a function of p alone. Its family is")
    pixels = image.imread(out)
    assert pixels.shape[0] > 300
    assert len({tuple(pixel) for row in pixels[::3, ::3] for pixel in row.tolist()}) > 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["focl"], "did you mean focal?"),
        (["focal", "-p", "gama=1"], "-p gama: none of these losses has it; they have: alpha, gamma"),
        (["focal", "-p", "gamma=-1"], "cv_loss.focal.gamma: must be a finite number >= 0, not '-1'"),
        (["focal", "-p", "gamma"], "must be NAME=VALUE, such as gamma=3"),
        (["focal", "--out", "curves.docx"], "curves.docx: Format 'docx' is not supported"),
    ],
)
def test_plot_refuses(arguments, message):
    assert message in run("plot", *arguments, code=1).stderr


def test_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    error = run("plot", "focal", "--out", tmp_path / "c.png", code=1).stderr
    assert 'plot needs matplotlib: pip install "axolotl-cvloss[plot]"' in error
    assert "focal" in json.loads(run("plot", "focal", "--json").stdout)


def test_score(tmp_path):
    path = tmp_path / "predictions.jsonl"
    lines = [
        {"task": "gsm8k", "prediction": "<<4*3=12>> #### 12", "reference": "<<4*3=12>> <<12+1=13>> #### 13"},
        {"task": "gsm8k", "prediction": "#### 7", "reference": "7"},
        {"task": "openbookqa", "prediction": "B", "reference": "B"},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    scores = json.loads(run("score", path, "--json").stdout)
    assert scores["gsm8k"]["exact_match"] == 0.5
    assert scores["gsm8k"]["iou"] == 0.5
    assert scores["openbookqa"]["exact_match"] == 1
    table = [columns(line) for line in run("score", path).stdout.splitlines()]
    assert table[0] == ["metric", "gsm8k", "openbookqa"]
    assert ["exact_match", "0.5", "1"] in table


def test_score_of_a_broken_file(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"task": "gsm8k", "prediction": "1"}')
    assert f"{path}, line 1: reference is missing" in run("score", path, code=1).stderr


def test_help_is_quick():
    script = "import sys; from axolotl_cvloss.command.cli import cli; cli(['check', '--help'], standalone_mode=False); "
    command = [sys.executable, "-c", script + "print(*sys.modules)"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert not {"torch", "pydantic", "rich", "axolotl"} & set(printed.splitlines()[-1].split())


@pytest.mark.hosts
def test_the_two_commands():
    pytest.importorskip("axolotl")
    ours, theirs = (
        subprocess.run([BIN / name[0], *name[1:], "list"], check=True, capture_output=True, text=True, timeout=120)
        for name in (["cvloss"], ["axolotl", "cvloss"])
    )
    lines = ours.stdout.splitlines()
    assert [columns(line)[0] for line in lines] == ["loss", *available_losses()]
    assert theirs.stdout.splitlines()[-len(lines) :] == lines  # after the logo


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals on Windows")
@pytest.mark.parametrize("width", [60, 120])
def test_a_terminal_gets_a_table_that_fits(width):
    """Or, where it is narrow, a block for each loss. Nothing is cut."""
    ours, theirs = os.openpty()
    environment = {**os.environ, "COLUMNS": str(width), "TERM": "xterm"}
    process = subprocess.Popen([BIN / "cvloss", "list"], stdout=theirs, env=environment)
    os.close(theirs)
    printed = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # how Linux tells that the other end is closed
            break
        if not part:
            break
        printed += part
    os.close(ours)
    assert process.wait(timeout=120) == 0
    lines = re.sub(r"\x1b\[[\d;]*m", "", printed.decode()).splitlines()  # without the codes of bold letters
    assert any("───" in line for line in lines) == (width == 120)
    assert max(len(line) for line in lines if "A visit is" not in line) <= width
    assert set(available_losses()) <= {word for line in lines for word in line.split()}
