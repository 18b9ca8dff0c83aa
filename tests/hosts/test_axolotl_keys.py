"""What Axolotl's real validation makes of a config with the plugin: taken over, refused, put in place."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import MambaConfig

pytest.importorskip("axolotl")

from axolotl.cli.config import load_cfg, prepare_plugins
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

from axolotl_cvloss import Objective
from axolotl_cvloss.hosts.axolotl_guard import checked

OURS = "axolotl_cvloss.CVLossPlugin"
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
    # This one multiplies by the probability: another objective.
    ("liger", {"liger_fused_linear_cross_entropy": True, "liger_use_token_scaling": True}, "liger_use_token_scaling"),
    ("kd", {"kd_trainer": True, "kd_alpha": 0.9}, "kd_trainer"),
    ("diffusion", {}, "diffusion"),  # listing it is enough
    ("diffusion", {"diffusion": {"eps": 0.01}}, "diffusion"),
    ("hatchery", {"hatchery": {"backend": "tinker"}}, "hatchery"),
    ("hatchery", {}, "hatchery"),  # and this one
    (None, {"use_eaft": True}, "use_eaft"),
    (None, {"reward_model": True}, "reward_model"),
    (None, {"process_reward_model": True}, "process_reward_model"),
    (None, {"orpo_alpha": 0.1}, "orpo_alpha"),
    (None, {"context_parallel_size": 2, "flash_attention": True}, "context_parallel_size"),
    (None, {"sequence_parallel_degree": 2, "flash_attention": True}, "sequence_parallel_degree"),
    (None, {"tensor_parallel_size": 2}, "tensor_parallel_size"),
    (None, {"model_type": "AutoModelForSequenceClassification"}, "model_type AutoModelForSequenceClassification"),
    (None, {"model_type": "MambaLMHeadModel"}, "model_type MambaLMHeadModel"),
    (None, {"trainer_cls": "axolotl.core.trainers.AxolotlMambaTrainer"}, "trainer_cls axolotl.core"),
    (None, {"trainer_cls": "trl.SFTTrainer"}, "trainer_cls trl.SFTTrainer"),
    *((None, {"rl": rl}, "rl") for rl in ("dpo", "ipo", "gdpo", "grpo", "orpo", "kto", "simpo", "ebft")),
]


@pytest.mark.parametrize(
    ("plugin", "keys", "named", "order"),
    [(*row, order) for row in REFUSED for order in ("before", "after") if row[0] or order == "after"],
)
def test_refused(plugin, keys, named, order, make_config, manager):
    others = {order: [PLUGINS[plugin]]} if plugin else {}
    with pytest.raises(ValueError, match=rf"cv_loss cannot be used with {named}[\w.]*( above 1)?: .{{20}}"):
        validated(make_config(**keys), **others)


@pytest.mark.parametrize(
    ("key", "error"),
    [
        ("anchored", "cv_loss.anchored: it needs log p of each token under a reference model"),
        ({"anchored": 1, "reference": "adapter_off"}, "cv_loss.reference: adapter_off needs an adapter"),
    ],
)
def test_refused_without_a_reference(key, error, make_config, manager):
    with pytest.raises(ValueError, match=error):
        validated(make_config(cv_loss=key))


CUT, FUSED = "cut_cross_entropy", "liger_fused_linear_cross_entropy"


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    ("plugin", "keys", "off"),
    [
        ("cut", {}, [CUT]),  # its key defaults to true
        ("cut", {CUT: True, "chunked_cross_entropy": True}, [CUT, "chunked_cross_entropy"]),  # Axolotl takes one
        ("liger", {FUSED: True, "liger_rms_norm": True}, [FUSED]),
        ("liger", {"liger_cross_entropy": True, "liger_rope": True}, ["liger_cross_entropy"]),
        (None, {"chunked_cross_entropy": True}, ["chunked_cross_entropy"]),
        (None, {"flash_attn_cross_entropy": True}, ["flash_attn_cross_entropy"]),
    ],
)
def test_what_only_saves_memory_is_switched_off(plugin, keys, off, order, make_config, manager, caplog):
    caplog.set_level("INFO", "axolotl_cvloss")
    cfg = validated(make_config(**keys), **({order: [PLUGINS[plugin]]} if plugin else {}))
    assert {key: cfg[key] for key in off} == dict.fromkeys(off, False)
    for key in keys.keys() - set(off):
        assert cfg[key] is True
    said = [message for message in caplog.messages if message.startswith("cv_loss")]
    assert [message.split(", so ")[1] for message in said] == [f"{key} is switched off" for key in off]


def test_it_stays_on_without_the_key(make_config, manager, caplog):
    cfg = validated(make_config(cv_loss=None, bf16=True, chunked_cross_entropy=None), before=[PLUGINS["cut"]])
    assert cfg.cut_cross_entropy is True
    assert not any("switched off" in message for message in caplog.messages)


@pytest.mark.parametrize("keys", [{}, {"eaft_alpha": 0.5, "eaft_k": 5}])
def test_entropy_adaptive_instead_of_eaft(keys, make_config, manager):
    """The config of the message trains with the gradient of Axolotl's own loss."""
    from axolotl.monkeypatch.loss.eaft import eaft_loss

    with pytest.raises(ValueError, match="cannot be used with use_eaft") as error:
        validated(make_config(use_eaft=True, **keys))
    instead = re.search(r"write cv_loss: (\{.*?\}\})", str(error.value))[1]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 30, generator=generator, requires_grad=True)
    labels = torch.randint(0, 30, (2, 9), generator=generator)
    host = eaft_loss(SimpleNamespace(logits=logits), labels, **{name[5:]: value for name, value in keys.items()})
    ours = Objective.from_config(yaml.safe_load(instead)).from_logits(logits, labels).loss
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (host, ours)]
    # Of the weight the message has four digits; Axolotl adds 1e-10 within its logarithm.
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-6)


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


def test_mamba_is_refused_before_its_model_is_loaded(make_config, manager, tmp_path):
    """Its trainer computes a loss of its own; Axolotl knows so only from the config of the model."""
    MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path / "mamba")
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config(base_model=str(tmp_path / "mamba"))))
    cfg = load_cfg(str(path))
    with pytest.raises(ValueError, match=r"cannot be used with .*mamba: Axolotl's trainer for Mamba"):
        manager.pre_model_load(cfg)


def test_nothing_is_refused_without_the_key(make_config, manager):
    assert validated(make_config(cv_loss=None, chunked_cross_entropy=True)).chunked_cross_entropy


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"pretraining_dataset": [{"path": "x"}], "datasets": None}, "pretraining_dataset"),
        ({"streaming": True, "sample_packing": True}, "streaming with sample_packing"),
    ],
)
def test_columns_that_streaming_drops_are_refused(keys, named, make_config, manager):
    config = make_config(**keys, cv_loss={"focal": {"where": "bad"}})
    with pytest.raises(ValueError, match=rf"cv_loss\.focal\.where cannot be used with {named}: it drops the columns"):
        validated(config)


def test_every_problem_is_named_at_once(make_config, manager):
    with pytest.raises(ValueError, match="use_eaft") as error:
        validated(make_config(cv_loss={"lovas": 1, "focal": {"gamma": -1}}, use_eaft=True, rl="dpo"))
    for part in ("with rl:", "did you mean lovasz", "cv_loss.focal.gamma: must be"):
        assert part in str(error.value)


def test_plugins_that_are_no_list_never_train(make_config, manager, tmp_path):
    """Axolotl takes each letter for a plugin and stops at the first, before anything of ours could run."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**make_config(), "plugins": OURS}))
    with pytest.raises(ValueError, match="not enough values to unpack"):
        load_cfg(str(path))


@pytest.mark.parametrize("key", ["cvloss", "cv-loss", "cv_losses", "CV_LOSS", "cv_los"])
def test_misspelt_key(key, make_config, manager):
    with pytest.raises(ValueError, match=f"unknown key {key}: did you mean cv_loss?"):
        validated(make_config(cv_loss=None, **{key: "lovasz"}))


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"cv_los": {"dice": 1}}, "cv_los"),
        ({"cv_losses": "dice"}, "cv_losses"),
        ({"cv-loss.lovasz": 0}, "cv-loss.lovasz"),
    ],
)
def test_misspelt_key_beside_the_right_one(keys, key, make_config, manager):
    with pytest.raises(ValueError, match=f"unknown key {key}: did you mean cv_loss"):
        validated(make_config(**keys))


# Dotted keys, as sweeps and people give them, and the same on the command line. Then what is trained with.
DOTTED = [
    ({"cv_loss.lovasz": 0.1}, {"cross_entropy": 0.6, "lovasz": 0.1}),
    ({"cv_loss__lovasz": 0.1}, {"cross_entropy": 0.6, "lovasz": 0.1}),
    ({"cv_loss.dice": 0.1}, {"cross_entropy": 0.6, "lovasz": 0.4, "dice": 0.1}),
    ({"cv_loss.lovasz.weight": 0.1}, {"cross_entropy": 0.6, "lovasz": 0.1}),
    ({"cv_loss.lovasz.tolerance": 0.1}, {"cross_entropy": 0.6, "lovasz": {"weight": 0.4, "tolerance": 0.1}}),
    ({"cv_loss": {"focal": 0.2, "focal__gamma": 1}}, {"focal": {"weight": 0.2, "gamma": 1}}),  # as Axolotl leaves it
    (
        {"cv_loss": {"focal": {"gamma": 1}, "dice": 1}, "cv_loss.focal": 0.3},
        {"focal": {"weight": 0.3, "gamma": 1}, "dice": 1},
    ),
    ({"cv_loss": "focal", "cv_loss.focal.gamma": 1}, {"focal": {"gamma": 1}}),
    ({"cv_loss": None, "cv_loss.focal": 1}, {"focal": 1}),
    ({"cv_loss": {"terms": ["focal", "dice"]}, "cv_loss.terms.1.weight": 0.1}, {"focal": 1, "dice": 0.1}),
    ({"cv_loss.head": "logits"}, {"cross_entropy": 0.6, "lovasz": 0.4, "head": "logits"}),
]


@pytest.mark.parametrize(("keys", "meant"), DOTTED)
def test_dotted_keys(keys, meant, make_config, manager):
    assert validated(make_config(**keys)).cv_loss == validated(make_config(cv_loss=meant)).cv_loss


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"cv_loss.lovas": 0.1}, r"cv_loss\.lovas: unknown loss"),
        ({"cv_loss.lovasz.gama": 0.1}, r"cv_loss\.lovasz\.gama: unknown parameter"),
        (
            {"cv_loss": {"terms": ["focal"]}, "cv_loss.terms.1.weight": 1},
            r"cv_loss\.terms\.1\.weight: there is no term 1",
        ),
        ({"cv_loss": {"terms": ["focal"]}, "cv_loss.dice": 1}, r"cv_loss\.dice: unknown field"),
    ],
)
def test_dotted_keys_that_have_no_place(keys, problem, make_config, manager):
    with pytest.raises(ValueError, match=problem):
        validated(make_config(**keys))


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        (["--cv-loss.lovasz", "0.1"], {"cross_entropy": 0.6, "lovasz": 0.1}),
        (["--cv_loss__lovasz=1e-1"], {"cross_entropy": 0.6, "lovasz": 0.1}),
        (["--cv-loss", "focal"], "focal"),
        (["--cv-loss={focal: 1, dice: 1}", "--cv-loss.dice=0.2"], {"focal": 1, "dice": 0.2}),
    ],
)
def test_options_that_the_python_launcher_ignores(options, meant, make_config, manager, monkeypatch):
    expected = validated(make_config(cv_loss=meant)).cv_loss
    monkeypatch.setattr(sys, "argv", ["axolotl", "train", "config.yaml", "--launcher", "python", *options])
    assert validated(make_config()).cv_loss == expected


@pytest.mark.parametrize(
    ("options", "lovasz"),
    [
        ({"cv_loss.lovasz": 0.1}, {"weight": 0.1}),  # --cv-loss.lovasz=0.1, as Fire reads it
        ({"cv_loss__lovasz": 0.1}, {"weight": 0.1}),
        ({"cv_loss__lovasz__tolerance": 0.1}, {"weight": 0.4, "tolerance": 0.1}),
    ],
)
def test_options_of_axolotls_module(options, lovasz, make_config, manager, tmp_path):
    """`python -m axolotl.cli.train CONFIG ...`, which accelerate and torchrun start, hands options to load_cfg."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(make_config()))
    cfg = load_cfg(str(path), **options)
    expected = validated(make_config(cv_loss={"cross_entropy": 0.6, "lovasz": lovasz})).cv_loss
    assert cfg.cv_loss == expected


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--cv-loss"], "--cv-loss: has no value"),
        (["--cv-loss.lovasz", "--launcher", "python"], r"--cv-loss\.lovasz: has no value"),
        (["--cv-loss={focal"], "--cv-loss: {focal cannot be read"),
        (["--cv-los.lovasz=1"], r"unknown key cv_los\.lovasz: did you mean cv_loss\.lovasz"),
        (["--cv-loss=lovas"], "unknown loss 'lovas'"),
    ],
)
def test_options_that_mean_nothing(options, problem, make_config, manager, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["axolotl", "train", "config.yaml", *options])
    with pytest.raises(ValueError, match=problem):
        validated(make_config())


def test_guard_knows_dotted_keys_and_options(make_config, manager, monkeypatch):
    guarded = checked(validate_config)
    without = {"plugins": None, "cv_loss": None}
    with pytest.raises(ValueError, match="its plugin is not loaded"):
        guarded(DictDefault(make_config(**without, **{"cv_loss.lovasz": 1})))
    assert guarded(DictDefault(make_config(**without)))
    monkeypatch.setattr(sys, "argv", ["axolotl", "train", "config.yaml", "--cv-loss", "focal"])
    with pytest.raises(ValueError, match="its plugin is not loaded"):
        guarded(DictDefault(make_config(**without)))


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
