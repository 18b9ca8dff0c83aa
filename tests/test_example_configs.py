"""Axolotl itself accepts every example config, and each dataset type makes the prompts that its config describes."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

pytest.importorskip("axolotl")

from axolotl.cli.config import prepare_plugins
from axolotl.cli.utils.train import generate_config_files
from axolotl.integrations.base import PluginManager
from axolotl.integrations.config import merge_input_args
from axolotl.utils.config import validate_config
from axolotl.utils.data.wrappers import get_dataset_wrapper
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.datasets import SFTDataset
from axolotl.utils.schemas.fsdp import FSDPConfig
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "example_configs"
SWEEP = CONFIGS / "losses.sweep.yaml"
TRL = CONFIGS / "trl_sft.yaml"  # runs in tests/hosts/test_trl.py
DATA = REPOSITORY.parent / "shared" / "data"  # real rows of three of the datasets, where somebody has put them

# The machines that the configs are for. Axolotl's own tests state them in the same way.
MACHINE = {
    "quickstart": {"bf16": False, "fp8": False, "tf32": False, "n_gpu": 1, "compute_capability": None},
    "llama-8b-fsdp2": {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 8, "compute_capability": "sm_90"},
}
ONE_GPU = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_86"}


@pytest.fixture
def manager(monkeypatch):
    """Axolotl's plugin manager is one for the process; each test gets a new one, and the old one comes back."""
    monkeypatch.setattr(PluginManager, "_instance", None)
    return PluginManager.get_instance()


def read(name):
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def accepted(raw, machine, manager):
    """What Axolotl's command line makes of a config before it loads a model."""
    cfg = DictDefault(raw)
    prepare_plugins(cfg)
    # Axolotl prints the import error of a plugin and goes on, and it drops the keys that it does not know.
    assert list(manager.plugins) == raw["plugins"]
    assert raw.keys() <= merge_input_args()[1].model_fields.keys()
    for dataset in [*raw["datasets"], *raw.get("test_datasets", [])]:
        assert dataset.keys() <= SFTDataset.model_fields.keys()
    assert raw.get("fsdp_config", {}).keys() <= FSDPConfig.model_fields.keys()
    return validate_config(cfg, capabilities=machine, env_capabilities={"torch_version": "2.13.0"})


def terms(cfg):
    return [(term["loss"], term["weight"], term["scope"]) for term in cfg["cv_loss"]["terms"]]


PAPER = [("cross_entropy", 0.6, "sequence"), ("lovasz", 0.4, "completion")]


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml") if path not in (SWEEP, TRL)))
def test_axolotl_accepts(name, manager):
    raw = read(name)
    cfg = accepted(raw, MACHINE.get(name, ONE_GPU), manager)
    assert "axolotl_cvloss.CVLossPlugin" in manager.plugins
    assert sum(weight for _, weight, _ in terms(cfg)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "num_epochs", "learning_rate"),
    [("gsm8k", 10, 1e-5), ("mathqa", 2, 1e-4), ("hellaswag", 1, 1e-4), ("openbookqa", 10, 1e-4)],
)
def test_recipe_of_the_paper(name, num_epochs, learning_rate, manager):
    cfg = accepted(read(name), ONE_GPU, manager)
    assert terms(cfg) == PAPER
    recipe = {
        "num_epochs": num_epochs,
        "learning_rate": learning_rate,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "warmup_steps": 500,
        "weight_decay": 0.01,
        "adapter": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "lora_target_linear": True,
    }
    assert {key: cfg[key] for key in recipe} == recipe


def test_sweep(manager):
    runs = {}
    for path, _ in generate_config_files(str(CONFIGS / "gsm8k.yaml"), str(SWEEP)):
        raw = yaml.safe_load(Path(path).read_text())
        Path(path).unlink()
        manager.plugins.clear()
        runs[Path(raw["output_dir"]).name] = terms(accepted(raw, ONE_GPU, manager))

    others = ["focal", "generalized_dice", "self_adjusting_dice", "lovasz"]
    alone, mixed = ("cross_entropy", 1, "sequence"), ("cross_entropy", 0.6, "sequence")
    expected = [[alone], *([mixed, (other, 0.4, "completion")] for other in others)]
    assert sorted(runs.values()) == sorted(expected)
    # the comment that says which directory holds which mix
    said = dict(re.findall(r"# +(sweep\d+) (\w+)", SWEEP.read_text()))
    assert said == {directory: mix[-1][0] for directory, mix in runs.items()}


# Rows as the hub's datasets have them, and what becomes of them.
ROWS = {
    "gsm8k": [
        (
            {
                "question": "Ann reads 12 pages a day. How many in two weeks, and half of that?",
                "answer": "She reads 12*14 = <<12*14=168>>168 pages.\nHalf of that is 168/2 = <<168/2=84>>84.\n#### 84",
            },
            "Question: Ann reads 12 pages a day. How many in two weeks, and half of that?\nAnswer: ",
            "<<12*14=168>> <<168/2=84>> #### 84",
        )
    ],
    "mathqa": [
        (
            {
                "Problem": "a man saves rs . 30 a day for n1 = 40 days . how much does he save ?",
                "Rationale": '"30 * 40 = 1200 answer : b"',
                "options": "a ) rs . 1,100 , b ) rs . 1,200 , c ) rs . 70 , d ) rs . 1,300 , e ) none of these",
                "correct": "b",
                "annotated_formula": "add(multiply(30, 40), 0)",
                "linear_formula": "multiply(n0,n1)|add(#0,const_0)",
                "category": "gain",
            },
            "Question: a man saves rs . 30 a day for n1 = 40 days . how much does he save ?\nAnswer: ",
            "<<multiply(n0,n1)>> <<add(#0,const_0)>> #### 1200.0",
        ),
        (
            {
                "Problem": "what is the square root of 2 ?",
                "Rationale": '"answer : a"',
                "options": "['a ) √ 2', 'b ) 1', 'c ) 1 / 2', 'd ) 3', 'e ) 4']",
                "correct": "c",
                "annotated_formula": "sqrt(2)",
                "linear_formula": "sqrt(n0)|",
                "category": "general",
            },
            None,  # 1 / 2 is not one number
            None,
        ),
    ],
    "hellaswag": [
        (
            {
                "ind": 4,
                "activity_label": "Baking",
                "ctx_a": "A woman kneads dough on a table.",
                "ctx_b": "she",
                "ctx": "A woman kneads dough on a table. she",
                "endings": ["drives away.", "paints it blue.", "puts it in a bowl to rise.", "reads it aloud."],
                "source_id": "example~1",
                "split": "train",
                "split_type": "indomain",
                "label": "2",
            },
            "Question: A woman kneads dough on a table. she\nA. drives away.\nB. paints it blue.\n"
            "C. puts it in a bowl to rise.\nD. reads it aloud.\nAnswer: ",
            "C",
        ),
        (
            {
                "ind": 5,
                "activity_label": "Baking",
                "ctx_a": "A man opens an oven.",
                "ctx_b": "",
                "ctx": "A man opens an oven.",
                "endings": ["He sings.", "He swims.", "He takes out bread.", "He sleeps."],
                "source_id": "example~2",
                "split": "test",
                "split_type": "indomain",
                "label": "",  # as everywhere in the test split
            },
            None,
            None,
        ),
    ],
    "openbookqa": [
        (
            {
                "id": "1-1",
                "question_stem": "A plant on a windowsill grows towards",
                "choices": {"text": ["the wall", "the light", "the pot", "the floor"], "label": ["A", "B", "C", "D"]},
                "answerKey": "B",
                "fact1": "plants grow towards light",
                "humanScore": 1.0,
                "clarity": 2.0,
                "turkIdAnonymized": "b3",
            },
            "Question: A plant on a windowsill grows towards\nA. the wall\nB. the light\nC. the pot\nD. the floor\n"
            "Context: plants grow towards light\nAnswer: ",
            "B",
        )
    ],
}


@pytest.fixture(scope="module")
def tokenizer():
    """One token a byte, so that any text comes back as it was."""
    alphabet = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_ = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="<eos>")


@pytest.mark.parametrize("name", ROWS)
def test_dataset_type(name, manager, tokenizer):
    cfg = accepted(read(name), ONE_GPU, manager)
    cfg.dataset_num_proc = None
    rows, prompts, targets = zip(*ROWS[name], strict=True)
    for dataset in [*cfg.datasets, *(cfg.test_datasets or [])]:
        made, _ = get_dataset_wrapper(dataset, tokenizer, cfg, dataset.type, Dataset.from_list(list(rows)))
        expected = [pair for pair in zip(prompts, targets, strict=True) if pair[0]]
        assert len(made) == len(expected)
        for row, (prompt, target) in zip(made, expected, strict=True):
            trained = [label != -100 for label in row["labels"]]
            start = trained.index(True)
            assert tokenizer.decode(row["input_ids"][:start]) == prompt
            assert tokenizer.decode(row["labels"][start:]) == target + "<eos>"
            assert row["labels"][start:] == row["input_ids"][start:]


@pytest.mark.parametrize(
    ("name", "file", "kept", "target"),
    [
        ("gsm8k", "gsm8k_train.jsonl", 7473, r"(<<[^>]+>> )*#### \S.*"),
        ("mathqa", "mathqa_dev.jsonl", 3870, r"(<<\w+\([^>]*\)>> )*#### [-+]?\d+\.\d+"),
        ("openbookqa", "openbookqa_train.jsonl", 4957, "[ABCD]"),
    ],
)
def test_real_rows(name, file, kept, target):
    if not (DATA / file).exists():
        pytest.skip(f"{file} is not here; it is an optional copy of the dataset")
    example = import_module(f"axolotl_cvloss.hosts.axolotl_prompts.{name}").example
    with (DATA / file).open(encoding="utf-8") as lines:
        found = [pair for line in lines if (pair := example(json.loads(line)))]
    assert len(found) == kept
    for prompt, text in found:
        assert re.fullmatch(target, text), text
        assert prompt.startswith("Question: ")
        assert prompt.endswith("\nAnswer: ")
