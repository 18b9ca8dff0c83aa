"""The plugin under the real `axolotl train`, and its refusals under Axolotl's real validation."""

import csv
import json
import math
import re
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import NEEDS_MORE, nll_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytest.importorskip("axolotl")

from axolotl.cli.config import prepare_plugins
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

from axolotl_cvloss.hosts.axolotl_guard import Watch, checked, watch

OURS = "axolotl_cvloss.CVLossPlugin"


# Real runs


def logged(history, *names, prefix="cv_loss/"):
    """The values of some keys in each entry that has a training loss, or an evaluation loss."""
    entries = [entry for entry in history if ("eval_loss" if prefix.startswith("eval_") else "loss") in entry]
    assert entries
    return [[entry[f"{prefix}{name}"] for entry in entries] for name in names]


def check_log(history, weights, evaluations, learns):
    """Every term and the NLL in every entry; loss is their weighted sum; perplexity comes from the NLL."""
    training = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in training] == list(range(1, evaluations[-1] + 1))
    for entry in training:
        total = sum(weight * entry[f"cv_loss/{name}"] for name, weight in weights.items())
        assert entry["loss"] == pytest.approx(total, abs=1e-5)
        assert entry["ppl"] == pytest.approx(math.exp(entry["cv_loss/nll"]))
    evaluated = [entry for entry in history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluated] == evaluations
    for entry in evaluated:
        assert {f"eval_cv_loss/{name}" for name in (*weights, "nll")} <= entry.keys()
        assert entry["eval_ppl"] == pytest.approx(math.exp(entry["eval_cv_loss/nll"]))
    assert evaluated[-1]["eval_cv_loss/nll"] < evaluated[0]["eval_cv_loss/nll"] - learns


@pytest.mark.hosts
def test_padded(make_config, train, tokenizer, problems):
    terms = [
        {"loss": "cross_entropy", "weight": 0.6, "scope": "sequence"},
        {"loss": "lovasz", "weight": 0.4},
    ]
    history, output, printed = train(make_config(cv_loss={"terms": terms}), by_command=True)
    check_log(history, {"cross_entropy": 0.6, "lovasz": 0.4}, evaluations=[0, 6, 12], learns=0.5)
    assert "cv_loss: training with 0.6 cross_entropy + 0.4 lovasz" in printed

    model = AutoModelForCausalLM.from_pretrained(output)  # without the plugin
    assert "forward" not in vars(model)
    (nll,) = logged(history, "nll", prefix="eval_cv_loss/")
    assert nll_of(model, tokenizer, problems["test"]) == pytest.approx(nll[-1], abs=1e-5)


@pytest.mark.hosts
def test_packed(make_config, train):
    config = make_config(
        sample_packing=True,
        pad_to_sequence_len=True,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        micro_batch_size=1,
        eval_steps=12,
    )
    history, output, _ = train(config)
    check_log(history, {"cross_entropy": 0.6, "lovasz": 0.4}, evaluations=[0, 12], learns=0.5)
    assert AutoModelForCausalLM.from_pretrained(output).config.model_type == "llama"


@pytest.mark.hosts
def test_streamed_texts(make_config, train, tmp_path):
    """Every token of a text has a label, so both scopes have the same rows. Axolotl masks none of the padding."""
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": " ".join(["sort"] * (3 + i % 17))}) + "\n" for i in range(100)))
    terms = [{"loss": "cross_entropy", "scope": "sequence", "weight": 0.5}, {"loss": "focal", "weight": 0.5}]
    config = make_config(
        cv_loss={"terms": terms},
        **dict.fromkeys(("datasets", "test_datasets", "eval_steps")),
        pretraining_dataset=[{"path": "json", "data_files": str(texts), "split": "train", "type": "pretrain"}],
        streaming=True,
        streaming_multipack_buffer_size=100,
        sample_packing=True,
        pretrain_multipack_attn=True,
        micro_batch_size=1,
        max_steps=6,
        save_steps=6,
    )
    history, _, _ = train(config)
    whole, labelled = logged(history, "cross_entropy/tokens", "focal/tokens")
    assert whole == labelled


@pytest.mark.hosts
def test_losses_that_need_a_tokenizer_or_counts(make_config, train, numbers, tmp_path):
    config = make_config(cv_loss=NEEDS_MORE, sample_packing=True, eval_sample_packing=False, attn_implementation="sdpa")
    for key, part in ("datasets", "train"), ("test_datasets", "test"):
        path = tmp_path / f"{part}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in numbers[part]))
        config[key][0]["path"] = str(path)
    history, _, _ = train(config)
    weights = {name: fields["weight"] for name, fields in NEEDS_MORE.items()}
    check_log(history, weights, evaluations=[0, 6, 12], learns=0.1)
    for entry in history:
        if "loss" in entry:
            tokens = {name: entry[f"cv_loss/{name}/tokens"] for name in NEEDS_MORE}
            assert 0 < tokens["number_token_mse"] < tokens["ldam"] > tokens["cross_entropy"] > 0


# The Triton kernels that Axolotl turns on for LoRA need a GPU.
LORA = {
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_target_linear": True,
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
    "learning_rate": 5e-3,  # at 2e-2 gradients leap, and take back what was learned
}


@pytest.mark.hosts
@pytest.mark.parametrize("quantised", [False, True], ids=["lora", "qlora"])
def test_adapter(quantised, make_config, make_model, train, tokenizer, problems, tmp_path):
    adapter = {"adapter": "qlora", "load_in_4bit": True} if quantised else {"adapter": "lora"}
    weights = {"cross_entropy": 0.5, "focal": 0.3, "generalized_dice": 0.2}
    config = make_config(cv_loss=weights, gradient_accumulation_steps=2, micro_batch_size=2, **adapter, **LORA)
    if quantised:
        # Blocks of 64 weights within each row: bitsandbytes needs them on processors that compute with bfloat16.
        config["base_model"] = str(tmp_path / "model")
        make_model(hidden_size=64, intermediate_size=128).save_pretrained(config["base_model"])
        tokenizer.save_pretrained(config["base_model"])
    history, output, _ = train(config)
    check_log(history, weights, evaluations=[0, 6, 12], learns=0.1)  # Axolotl does not seed it

    saved = load_file(output / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved)
    if not quantised:
        model = AutoModelForCausalLM.from_pretrained(config["base_model"])
        model.load_adapter(output)
        (nll,) = logged(history, "nll", prefix="eval_cv_loss/")
        assert nll_of(model, tokenizer, problems["test"]) == pytest.approx(nll[-1], abs=1e-4)


def curve(history):
    return [entry.get("loss", entry.get("eval_loss")) for entry in history if "loss" in entry or "eval_loss" in entry]


@pytest.mark.hosts
def test_cross_entropy_is_the_loss_of_the_host(make_config, train, tmp_path):
    """The same loss curve, to rounding, padded and packed; and with the plugin but no key, the same bits."""
    host = {"plugins": None, "cv_loss": None, "dataset_prepared_path": str(tmp_path / "prepared by the host")}
    padded = {"max_steps": 6, "eval_steps": 3, "save_steps": 6}
    packed = {
        **padded,
        "sample_packing": True,
        "pad_to_sequence_len": True,
        "micro_batch_size": 1,
        "test_datasets": None,
        "eval_steps": None,
    }
    ours = {"cv_loss": {"cross_entropy": 1.0}}
    alone, _, _ = train(make_config("alone", **host, **padded))
    idle, _, printed = train(make_config("idle", **padded, cv_loss=None))
    with_ours, _, _ = train(make_config("ours", **padded, **ours))
    packed_alone, _, _ = train(make_config("packed-alone", **host, **packed))
    packed_ours, _, _ = train(make_config("packed-ours", **packed, **ours))
    assert len(curve(alone)) == 6 + 3
    assert curve(idle) == curve(alone)
    assert not any("cv_loss" in key for entry in idle for key in entry)
    assert "cv_loss: the key is not in the config" in printed
    assert curve(with_ours) == pytest.approx(curve(alone), abs=1e-5)
    # Prompts are masked here, and so is the first token of every document: no row reaches over to the next one.
    assert curve(packed_ours) == pytest.approx(curve(packed_alone), abs=1e-5)


# A run with the key but without the objective must not happen


@pytest.mark.hosts
def test_broken_installation_stops_the_run(make_config, stopped, tmp_path):
    """Axolotl prints the ImportError of a plugin and goes on without it."""
    (tmp_path / "pluggy.py").write_text("raise ImportError('this pluggy is broken')\n")
    printed = stopped(make_config(), PYTHONPATH=str(tmp_path))
    assert "axolotl_cvloss.CVLossPlugin cannot be loaded, so the run stops here: this pluggy is broken" in printed
    assert "Loading model" not in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [OURS, "axolotl_cvloss.hosts.axolotl.CVLossPlugin"])
def test_broken_installation_stops_the_plugin_manager(name, manager, monkeypatch):
    import axolotl_cvloss

    monkeypatch.delitem(vars(axolotl_cvloss), "CVLossPlugin", raising=False)
    monkeypatch.delitem(sys.modules, "axolotl_cvloss.hosts.axolotl", raising=False)
    monkeypatch.setitem(sys.modules, "axolotl_cvloss.objective.objective", None)  # what a missing dependency does
    monkeypatch.delitem(sys.modules, "axolotl_cvloss.model.installation", raising=False)
    with pytest.raises(RuntimeError, match="CVLossPlugin cannot be loaded, so the run stops here"):
        manager.register(name)


def test_misspelt_class_stops_the_plugin_manager(manager):
    with pytest.raises(AttributeError, match="CVLosPlugin"):
        manager.register("axolotl_cvloss.CVLosPlugin")


@pytest.mark.hosts
@pytest.mark.parametrize("plugins", [["axolotl_cvlos.CVLossPlugin"], pytest.param(None, marks=pytest.mark.slow)])
def test_guard_stops_the_command(plugins, make_config, axolotl, tmp_path):
    """A misspelt module, and no plugin at all: nothing of ours runs but what torch starts."""
    result = axolotl(make_config(plugins=plugins))
    assert result.returncode != 0
    assert "cv_loss: the config has this key, but its plugin is not loaded" in result.stdout
    assert not (tmp_path / "run").exists()


def test_guard_lets_everything_else_pass(make_config, manager):
    guarded = checked(validate_config)
    with pytest.raises(ValueError, match=r"Put axolotl_cvloss\.CVLossPlugin under plugins"):
        guarded(DictDefault(make_config(plugins=None)))
    without = DictDefault(make_config(plugins=None, cv_loss=None))
    assert guarded(without) == validate_config(without)
    cfg = DictDefault(make_config())
    prepare_plugins(cfg)
    assert guarded(cfg).cv_loss["terms"]


def test_guard_looks_once(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = len(sys.meta_path)
    watch()
    watch()
    assert len(sys.meta_path) <= before + 1  # torch has called it in this process already
    assert find_spec("json") is not None
    assert sum(isinstance(finder, Watch) for finder in sys.meta_path) == 1


@pytest.mark.hosts
def test_error_in_the_key_stops_the_run(make_config, stopped, tmp_path):
    """Before any model or data is looked at: neither is there."""
    config = make_config(cv_loss={"lovas": 0.4}, base_model=str(tmp_path / "no-model"))
    config["datasets"][0]["path"] = str(tmp_path / "no-data.jsonl")
    assert re.search(r"cv_loss\.lovas: unknown loss 'lovas'; did you mean lovasz\?", stopped(config))


@pytest.mark.hosts
def test_what_only_saves_memory_is_taken_over(make_config, train):
    """The same bits as without it. The package cut_cross_entropy is not there: its plugin must not look for it."""
    keys = {"max_steps": 4, "eval_steps": 4, "save_steps": 4}
    savers = {
        "plugins": [
            "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",
            "axolotl.integrations.liger.LigerPlugin",
            OURS,
        ],
        "cut_cross_entropy": True,
        "chunked_cross_entropy": True,
        "liger_fused_linear_cross_entropy": True,
    }
    without, _, _ = train(make_config("without", **keys))
    ours, _, printed = train(make_config("ours", **keys, **savers))
    assert curve(ours) == curve(without)
    assert len(curve(ours)) == 4 + 2
    for key in "cut_cross_entropy", "chunked_cross_entropy", "liger_fused_linear_cross_entropy":
        assert printed.count(f"so {key} is switched off") == 1
    assert "Applying Cut Cross Entropy" not in printed
    assert "'fused_linear_cross_entropy': False" in printed  # what Liger says that it applies


@pytest.mark.hosts
def test_sweep_and_options_of_the_command_line(make_config, axolotl, tmp_path):
    """Both would change nothing: Axolotl writes dotted keys as they stand, and ignores options it does not know."""
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("cv_loss.lovasz: [0.1, 0.2]\n")
    config = make_config(max_steps=1, eval_steps=None, test_datasets=None, save_strategy="no", save_steps=None)
    result = axolotl(config, "train", "--sweep", sweep, "--cv-loss.cross_entropy", "0.5")
    assert result.returncode == 0, result.stdout[-5000:]
    trained = re.findall(r"cv_loss: training with (.*?);", result.stdout)
    assert sorted(trained) == [f"0.5 cross_entropy + {weight} lovasz" for weight in (0.1, 0.2)]


@pytest.mark.hosts
@pytest.mark.slow
def test_evaluate_command(make_config, axolotl):
    """`axolotl evaluate` makes its trainer in another way."""
    config = make_config(cv_loss="lovasz")
    result = axolotl(config, "evaluate")
    assert result.returncode == 0, result.stdout[-5000:]
    with (Path(config["output_dir"]) / "eval_summary.csv").open() as lines:
        metrics = {row["metric"]: row["validation"] for row in csv.DictReader(lines)}
    assert float(metrics["ppl"]) == pytest.approx(math.exp(float(metrics["cv_loss/nll"])))
    assert float(metrics["cv_loss/lovasz"]) < 1


def test_a_trainer_without_the_objective_is_not_trained():
    """Should a later Axolotl no longer call the hook that attaches it."""
    plugin = import_module("axolotl_cvloss.hosts.axolotl").CVLossPlugin()
    with pytest.raises(RuntimeError, match="not attached"):
        plugin.post_trainer_create(DictDefault({"cv_loss": {"terms": []}}), object())
    plugin.post_trainer_create(DictDefault({}), object())
