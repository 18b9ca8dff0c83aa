"""Rows and configs that `cvloss compare` is given for the paper's experiment."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from experiment import FOLDER, gsm8k, hellaswag, mathqa, openbookqa, write

from axolotl_cvloss.command.scorers import score_pairs
from axolotl_cvloss.objective.config import CVLossConfig

SHARED = FOLDER.parents[2] / "shared" / "data"  # real rows of three of the datasets, where somebody has put them


def rows_of(name, folder):
    import prepare

    return prepare.rows_of(name, prepare.recipe_of(name), folder)


def config_of(name="gsm8k", tied=True, cpu=False, steps=100, batch=2):
    import prepare

    about = SimpleNamespace(model_type="llama", tie_word_embeddings=tied)
    tokens = {"eos_token": "</s>", "pad_token": "</s>"}
    return prepare.config_of(prepare.recipe_of(name), FOLDER / "out", "model", about, tokens, steps, batch, cpu)


def test_rows_are_always_in_the_same_order(tmp_path):
    write(tmp_path, gsm8k_train=gsm8k(30), gsm8k_test=gsm8k(8))
    rows = rows_of("gsm8k", tmp_path)
    assert (len(rows["train"]), len(rows["test"])) == (30, 8)
    assert rows == rows_of("gsm8k", tmp_path)
    assert rows["train"] != gsm8k(30)


def test_mathqa_trains_on_dev_where_train_is_missing_and_leaves_rows_out(tmp_path):
    rows = rows_of("mathqa", write(tmp_path, mathqa_dev=mathqa(40), mathqa_test=mathqa(10)))
    assert (len(rows["train"]), len(rows["test"])) == (20, 5)


def test_hellaswag_is_scored_on_its_validation_split(tmp_path):
    unlabelled = [{**row, "label": ""} for row in hellaswag(9)]
    files = {"hellaswag_train": hellaswag(20), "hellaswag_validation": hellaswag(8), "hellaswag_test": unlabelled}
    rows = rows_of("hellaswag", write(tmp_path, **files))
    assert (len(rows["train"]), len(rows["test"])) == (20, 8)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no gsm8k_test\.jsonl"):
        rows_of("gsm8k", write(tmp_path, gsm8k_train=gsm8k(9)))


@pytest.mark.skipif(not SHARED.exists(), reason=f"the files of the datasets are not in {SHARED}")
@pytest.mark.parametrize("name", ["gsm8k", "mathqa", "openbookqa"])
def test_real_rows_score_perfectly_against_themselves(name):
    import prepare

    example = prepare.example_of(prepare.recipe_of(name))
    targets = [example(row)[1] for row in rows_of(name, SHARED)["test"]]
    found = score_pairs(f"benchmarks.paper.scorer:{name}", [(target, target) for target in targets]).metrics
    assert next(iter(found)) == "exact_match"
    assert (found["exact_match"], found["no_answer"]) == (1, 0)


def test_config_is_the_recipe_of_the_paper():
    found = config_of()
    assert (found["max_steps"], found["warmup_steps"]) == (100, 10)  # 500 in the recipe, but never more than a tenth
    assert (found["lora_r"], found["lora_alpha"], found["lora_dropout"], found["weight_decay"]) == (8, 16, 0.05, 0.01)
    assert found["lora_target_linear"] is True
    untied = config_of(tied=False)
    assert "lm_head" in untied["lora_target_modules"]
    assert "lora_target_linear" not in untied
    assert untied["bf16"] == "auto"


def test_axolotl_accepts_the_configs():
    pytest.importorskip("axolotl")
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    from axolotl_cvloss.command.compare import plan

    objectives = yaml.safe_load((FOLDER / "objectives.yaml").read_text())
    machine = {"bf16": False, "fp8": False, "tf32": False, "n_gpu": 1, "compute_capability": None}
    for name in "gsm8k", "mathqa", "openbookqa", "hellaswag":
        raw = config_of(name, cpu=True, steps=7)
        assert plan.problem("axolotl", raw) is None
        raw = plan.run_config("axolotl", raw, objectives["generalized_dice:reference"], 1e-4, 1)
        cfg = DictDefault({**raw, "output_dir": "out", "dataset_prepared_path": "prepared"})
        prepare_plugins(cfg)
        cfg = validate_config(cfg, capabilities=machine, env_capabilities={"torch_version": "2.13.0"})
        assert cfg["max_steps"] == 7
        assert cfg["cv_loss"]["reference"] is True
        assert not any(cfg[key] for key in raw if key.startswith("lora_") and key.endswith("_kernel"))


def test_objectives_are_the_mixes_of_the_paper():
    objectives = yaml.safe_load((FOLDER / "objectives.yaml").read_text())
    for name, value in objectives.items():
        first, *second = CVLossConfig.parse(value).terms
        assert (first.loss, first.scope) == ("cross_entropy", "sequence")
        assert [(term.loss, term.weight, term.scope) for term in second] == (
            [] if name == "cross_entropy" else [(name.removesuffix(":reference"), 0.4, "completion")]
        )


@pytest.mark.parametrize("data", [True, False])
def test_the_command(data, tmp_path, monkeypatch, untrained):
    import prepare

    write(tmp_path, openbookqa_train=openbookqa(20), openbookqa_test=openbookqa(7) if data else [])
    options = ["--model", untrained, "--data", tmp_path, "--out", tmp_path / "out", "--train", 9, "--cpu"]
    monkeypatch.setattr(sys, "argv", ["prepare.py", "openbookqa", *map(str, options)])
    if not data:
        with pytest.raises(FileNotFoundError, match="no openbookqa_test"):
            prepare.main()
        return
    prepare.main()
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    recipe = prepare.recipe_of("openbookqa")
    assert config["max_steps"] == recipe["num_epochs"] * 2  # 9 rows in batches of 8
    assert config["special_tokens"] == {"eos_token": "</s>", "pad_token": "<pad>"}
    for key, count in ("datasets", 9), ("test_datasets", 7):
        lines = Path(config[key][0]["path"]).read_text().splitlines()
        assert len([json.loads(line) for line in lines]) == count
