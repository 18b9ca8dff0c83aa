"""The configs that Axolotl is given, and the names of the runs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from experiment import gsm8k, make_plan


def config(run, name="gsm8k", model="llama", tied=True, on_gpu=False, work=Path("work"), **changes):
    import tasks
    import training

    data = tasks.Data(gsm8k(20), [], [], work / "rows.jsonl", "digest", "inputs", {})
    about = SimpleNamespace(model_type=model, tie_word_embeddings=tied)
    task = tasks.task(name)
    return training.config_of(
        run, make_plan(**changes), task, data, "model", about, {"eos_token": "</s>"}, on_gpu
    ), data


def test_losses_differ_in_objective_and_rate_alone():
    import plans

    one, _ = config(plans.Run("gsm8k", "cross_entropy", 1, 1e-4))
    other, _ = config(plans.Run("gsm8k", "lovasz", 1, 1e-3))
    assert {key for key in one | other if one.get(key) != other.get(key)} == {"cv_loss", "learning_rate"}
    assert other["cv_loss"] == plans.objective("lovasz")


def test_config_is_the_recipe_of_the_paper():
    import plans

    found, _ = config(plans.Run("gsm8k", "lovasz", 1, 1e-4))
    assert found["max_steps"] == 100  # 10 epochs of 20 rows in batches of 2
    assert found["warmup_steps"] == 10  # 500 in the recipe, but never more than a tenth
    assert (found["lora_r"], found["lora_alpha"], found["lora_dropout"], found["weight_decay"]) == (8, 16, 0.05, 0.01)
    assert found["lora_target_linear"] is True
    untied, _ = config(plans.Run("gsm8k", "lovasz", 1, 1e-4), tied=False, on_gpu=True)
    assert "lm_head" in untied["lora_target_modules"]
    assert "lora_target_linear" not in untied
    assert untied["bf16"] == "auto"
    short, _ = config(plans.Run("gsm8k", "lovasz", 1, 1e-4), steps=7, batch=4)
    assert (short["max_steps"], short["warmup_steps"], short["micro_batch_size"]) == (7, 0, 4)


def test_a_run_has_the_same_name_in_other_places_and_another_with_other_settings(tmp_path):
    import plans
    import training

    run = plans.Run("gsm8k", "generalized_dice:reference", 1, 1e-4)

    def name(**changes):
        found, data = config(run, **changes)
        return training.name_of(run, found, "model", data)

    assert name() == name(work=tmp_path)
    assert name().startswith("gsm8k-generalized_dice-reference-seed1-lr0.0001-")
    assert len({name(), name(steps=7), name(batch=4), name(tied=False)}) == 4


def test_models_in_folders_of_one_name_are_told_apart(tmp_path):
    import training

    for part, weights in ("a", b"1"), ("b", b"2"), ("c", b"1"):
        (tmp_path / part / "final").mkdir(parents=True)
        (tmp_path / part / "final" / "config.json").write_text("{}")
        (tmp_path / part / "final" / "model.safetensors").write_bytes(weights)
    one, other, same = (training.weights_of(str(tmp_path / part / "final")) for part in "abc")
    assert one == same != other
    assert training.weights_of("owner/model") == "owner/model"


def test_axolotl_accepts_the_configs(tmp_path):
    pytest.importorskip("axolotl")
    import plans
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    machine = {"bf16": False, "fp8": False, "tf32": False, "n_gpu": 1, "compute_capability": None}
    for name in "gsm8k", "mathqa", "openbookqa", "hellaswag":
        raw, _ = config(plans.Run(name, "generalized_dice:reference", 1, 1e-4), name=name, steps=7)
        raw = {**raw, "output_dir": "out", "dataset_prepared_path": "prepared"}
        cfg = DictDefault(raw)
        prepare_plugins(cfg)
        cfg = validate_config(cfg, capabilities=machine, env_capabilities={"torch_version": "2.13.0"})
        assert cfg["max_steps"] == 7
        assert cfg["cv_loss"]["reference"] is True
        assert not any(cfg[key] for key in raw if key.startswith("lora_") and key.endswith("_kernel"))
