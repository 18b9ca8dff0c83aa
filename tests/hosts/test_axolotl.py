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
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

from axolotl_cvloss.hosts.axolotl_guard import checked, watch

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
    history, output, printed = train(make_config(cv_loss={"terms": terms}))
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
    "learning_rate": 2e-2,
}


@pytest.mark.hosts
@pytest.mark.parametrize("quantised", [False, True], ids=["lora", "qlora"])
def test_adapter(quantised, make_config, train, tokenizer, problems):
    adapter = {"adapter": "qlora", "load_in_4bit": True} if quantised else {"adapter": "lora"}
    weights = {"cross_entropy": 0.5, "focal": 0.3, "generalized_dice": 0.2}
    config = make_config(cv_loss=weights, gradient_accumulation_steps=2, micro_batch_size=2, **adapter, **LORA)
    history, output, _ = train(config)
    check_log(history, weights, evaluations=[0, 6, 12], learns=0.03)  # Axolotl does not seed it

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
def test_cross_entropy_is_the_loss_of_the_host(make_config, train_several):
    """The same loss curve, to rounding, padded and packed; and with the plugin but no key, the same bits."""
    host = {"plugins": None, "cv_loss": None}
    padded = {"max_steps": 6, "eval_steps": 3, "save_steps": 6}
    packed = {
        **padded,
        "sample_packing": True,
        "pad_to_sequence_len": True,
        "micro_batch_size": 1,
        "test_datasets": None,
        "eval_steps": None,
    }
    (alone, idle, ours, packed_alone, packed_ours), printed = train_several(
        make_config("alone", **host, **padded),
        make_config("idle", **padded, cv_loss=None),
        make_config("ours", **padded, cv_loss={"cross_entropy": 1.0}),
        make_config("packed-alone", **host, **packed),
        make_config("packed-ours", **packed, cv_loss={"cross_entropy": 1.0}),
    )
    assert len(curve(alone)) == 6 + 3
    assert curve(idle) == curve(alone)
    assert not any("cv_loss" in key for entry in idle for key in entry)
    assert "cv_loss: the key is not in the config" in printed
    assert curve(ours) == pytest.approx(curve(alone), abs=1e-5)
    # Prompts are masked here, and so is the first token of every document: no row reaches over to the next one.
    assert curve(packed_ours) == pytest.approx(curve(packed_alone), abs=1e-5)


# A run with the key but without the objective must not happen


@pytest.mark.hosts
def test_broken_installation_stops_the_command(make_config, axolotl, tmp_path):
    """Axolotl prints the ImportError of a plugin and goes on without it."""
    (tmp_path / "pluggy.py").write_text("raise ImportError('this pluggy is broken')\n")
    result = axolotl(make_config(), PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "axolotl_cvloss.CVLossPlugin cannot be loaded, so the run stops here: this pluggy is broken" in result.stdout
    assert "Loading model" not in result.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [OURS, "axolotl_cvloss.hosts.axolotl.CVLossPlugin"])
def test_broken_installation_stops_the_plugin_manager(name, manager, monkeypatch):
    import axolotl_cvloss

    monkeypatch.delitem(vars(axolotl_cvloss), "CVLossPlugin", raising=False)
    monkeypatch.delitem(sys.modules, "axolotl_cvloss.hosts.axolotl", raising=False)
    monkeypatch.setitem(sys.modules, "axolotl_cvloss.objective", None)  # what a missing dependency does
    monkeypatch.delitem(sys.modules, "axolotl_cvloss.installation", raising=False)
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
    assert len(sys.meta_path) == before + 1
    assert find_spec("json") is not None
    assert len(sys.meta_path) == before + 1


@pytest.mark.hosts
def test_error_in_the_key_stops_the_command(make_config, axolotl, tmp_path):
    """Before any model or data is looked at: neither is there."""
    config = make_config(cv_loss={"lovas": 0.4}, base_model=str(tmp_path / "no-model"))
    config["datasets"][0]["path"] = str(tmp_path / "no-data.jsonl")
    result = axolotl(config)
    assert result.returncode != 0
    assert re.search(r"cv_loss\.lovas: unknown loss 'lovas'; did you mean lovasz\?", result.stdout)


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


# Refusals, by Axolotl's validation


@pytest.fixture
def manager(monkeypatch):
    """Axolotl's plugin manager is one for the process; each test gets a new one, and the old one comes back."""
    monkeypatch.setattr(PluginManager, "_instance", None)
    return PluginManager.get_instance()


MACHINE = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 8, "compute_capability": "sm_90"}


def validated(config, before=(), after=()):
    cfg = DictDefault({**config, "plugins": [*before, OURS, *after]})
    prepare_plugins(cfg)
    return validate_config(cfg, capabilities=MACHINE, env_capabilities={"torch_version": "2.13.0"})


PLUGINS = {
    "liger": "axolotl.integrations.liger.LigerPlugin",
    "cut": "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",
    "kd": "axolotl.integrations.kd.KDPlugin",
    "diffusion": "axolotl.integrations.diffusion.DiffusionPlugin",
    "hatchery": "axolotl.integrations.hatchery.HatcheryPlugin",
}

# What is refused: the plugin it belongs to, the keys of the config, and the key that the message must name.
REFUSED = [
    ("cut", {"bf16": True}, "cut_cross_entropy"),  # its key defaults to true
    ("cut", {"bf16": True, "cut_cross_entropy": True}, "cut_cross_entropy"),
    ("liger", {"liger_cross_entropy": True}, "liger_cross_entropy"),
    ("liger", {"liger_fused_linear_cross_entropy": True}, "liger_fused_linear_cross_entropy"),
    ("liger", {"liger_fused_linear_cross_entropy": True, "liger_use_token_scaling": True}, "liger_fused_linear"),
    ("kd", {"kd_trainer": True, "kd_alpha": 0.9}, "kd_trainer"),
    ("diffusion", {}, "diffusion"),  # listing it is enough
    ("diffusion", {"diffusion": {"eps": 0.01}}, "diffusion"),
    ("hatchery", {"hatchery": {"backend": "tinker"}}, "hatchery"),
    (None, {"chunked_cross_entropy": True}, "chunked_cross_entropy"),
    (None, {"flash_attn_cross_entropy": True}, "flash_attn_cross_entropy"),
    (None, {"use_eaft": True}, "use_eaft"),
    (None, {"reward_model": True}, "reward_model"),
    (None, {"process_reward_model": True}, "process_reward_model"),
    (None, {"orpo_alpha": 0.1}, "orpo_alpha"),
    (None, {"context_parallel_size": 2, "flash_attention": True}, "context_parallel_size"),
    (None, {"sequence_parallel_degree": 2, "flash_attention": True}, "sequence_parallel_degree"),
    (None, {"tensor_parallel_size": 2}, "tensor_parallel_size"),
    *((None, {"rl": rl}, "rl") for rl in ("dpo", "ipo", "gdpo", "grpo", "orpo", "kto", "simpo", "ebft")),
]


@pytest.mark.parametrize(
    ("plugin", "keys", "named", "order"),
    [(*row, order) for row in REFUSED for order in ("before", "after") if row[0] or order == "after"],
)
def test_refused(plugin, keys, named, order, make_config, manager):
    others = {order: [PLUGINS[plugin]]} if plugin else {}
    with pytest.raises(ValueError, match=rf"cv_loss cannot be used with {named}\w*( above 1)?: .{{20}}"):
        validated(make_config(**keys), **others)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    ("plugin", "keys"),
    [
        ("liger", {"liger_rms_norm": True, "liger_rope": True, "liger_glu_activation": True, "liger_layer_norm": True}),
        ("liger", {"liger_cross_entropy": False, "liger_fused_linear_cross_entropy": False}),
        ("cut", {"cut_cross_entropy": False}),
        ("kd", {}),
    ],
)
def test_accepted(plugin, keys, order, make_config, manager):
    cfg = validated(make_config(**keys), **{order: [PLUGINS[plugin]]})
    assert [term["loss"] for term in cfg.cv_loss["terms"]] == ["cross_entropy", "lovasz"]
    assert {key: cfg[key] for key in keys} == keys


@pytest.mark.parametrize("key", ["context_parallel_size", "tensor_parallel_size"])
def test_a_degree_of_one_is_accepted(key, make_config, manager):
    assert validated(make_config(**{key: 1})).cv_loss


def test_nothing_is_refused_without_the_key(make_config, manager):
    assert validated(make_config(cv_loss=None, chunked_cross_entropy=True)).chunked_cross_entropy


def test_every_problem_is_named_at_once(make_config, manager):
    with pytest.raises(ValueError, match="use_eaft") as error:
        validated(make_config(cv_loss={"lovas": 1, "focal": {"gamma": -1}}, use_eaft=True, rl="dpo"))
    for part in ("with rl:", "did you mean lovasz", "cv_loss.focal.gamma: must be"):
        assert part in str(error.value)


@pytest.mark.parametrize("key", ["cvloss", "cv-loss", "cv_losses", "CV_LOSS", "cv_los"])
def test_misspelt_key(key, make_config, manager):
    with pytest.raises(ValueError, match=f"unknown key {key}: did you mean cv_loss?"):
        validated(make_config(cv_loss=None, **{key: "lovasz"}))


@pytest.mark.parametrize("value", [{}, [], "", {"terms": []}, {"cross_entropy": 0}])
def test_empty_key(value, make_config, manager):
    with pytest.raises(ValueError, match="cv_loss"):
        validated(make_config(cv_loss=value))


def test_key_without_value(make_config, manager):
    with pytest.raises(ValueError, match="cv_loss: None is not a loss"):
        validated({**make_config(), "cv_loss": None})


@pytest.mark.parametrize("value", ["lovasz", {"lovasz": 1}, {"terms": [{"loss": "lovasz"}]}])
def test_spellings(value, make_config, manager):
    """What Axolotl hands on is the long form, and reading it again, as Ray's workers do, changes nothing."""
    cfg = validated(make_config(cv_loss=value))
    assert [(term["loss"], term["weight"], term["tolerance"]) for term in cfg.cv_loss["terms"]] == [("lovasz", 1, 0)]
    assert validate_config(cfg).cv_loss == cfg.cv_loss
