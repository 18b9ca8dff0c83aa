"""A tiny tokenizer, model and data set, and what starts the real `axolotl train` on them."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

GUEST = Path(__file__).parents[1] / "guest"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = ["sort", ":", "?", *(f"w{i}" for i in range(80)), *"0123456789"]


@pytest.fixture(scope="session")
def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def make_model(tokenizer):
    """A 2-layer Llama with random weights, always the same."""

    def make(**config):
        set_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                **{
                    "vocab_size": len(tokenizer),
                    "hidden_size": 32,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "max_position_embeddings": 128,
                    "pad_token_id": 0,
                    "bos_token_id": 1,
                    "eos_token_id": 2,
                    **config,
                }
            )
        )

    return make


@pytest.fixture(scope="session")
def problems():
    """Prompts and completions of many lengths."""
    rng = random.Random(0)

    def make(count):
        found = []
        for _ in range(count):
            words = [f"w{rng.randrange(12)}" for _ in range(rng.randint(1, 7))]
            found.append({"prompt": " ".join(["sort :", *words, "?"]), "completion": " ".join(sorted(set(words)))})
        return found

    return {"train": make(64), "test": make(12)}


@pytest.fixture(scope="session")
def numbers(problems):
    """The same with numbers for words."""
    return {part: [{k: v.replace("w", "") for k, v in row.items()} for row in rows] for part, rows in problems.items()}


@pytest.fixture(scope="session")
def files(tmp_path_factory, tokenizer, make_model, problems):
    """The folder with the model and the two data files."""
    folder = tmp_path_factory.mktemp("axolotl")
    make_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, rows in problems.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def make_config(files, tmp_path):
    """A config that trains on a CPU in a few seconds; ``None`` takes a key out."""

    def make(name="run", **keys):
        def data(part):
            return {
                "path": str(files / f"{part}.jsonl"),
                "ds_type": "json",
                "split": "train",
                "type": {
                    "field_instruction": "prompt",
                    "field_output": "completion",
                    "format": "{instruction}\n",
                    "no_input_format": "{instruction}\n",
                },
            }

        config = {
            "base_model": str(files / "model"),
            "plugins": ["axolotl_cvloss.CVLossPlugin"],
            "cv_loss": {"cross_entropy": 0.6, "lovasz": 0.4},
            "datasets": [data("train")],
            "test_datasets": [data("test")],
            "dataset_prepared_path": str(files / "prepared"),  # each of them takes two processes to write
            "dataset_num_proc": 1,
            "output_dir": str(tmp_path / name),
            "sequence_len": 64,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "max_steps": 12,
            "learning_rate": 1e-2,
            "lr_scheduler": "constant",
            "optimizer": "adamw_torch",
            "seed": 0,
            "logging_steps": 1,
            "eval_steps": 6,
            "save_steps": 12,
            "save_only_model": True,
            "bf16": False,
            "fp16": False,
            "tf32": False,
            "flash_attention": False,
            **keys,
        }
        return {key: value for key, value in config.items() if value is not None}

    return make


@pytest.fixture
def manager(monkeypatch):
    """Axolotl's plugin manager is one for the process; each test gets a new one, and the old one comes back."""
    from axolotl.integrations.base import PluginManager

    monkeypatch.setattr(PluginManager, "_instance", None)
    return PluginManager.get_instance()


@pytest.fixture(scope="session")
def guest(tmp_path_factory):
    """The folder that a package of somebody else's, tests/guest, is installed into, beside the environment."""
    folder = tmp_path_factory.mktemp("guest")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", folder]
    done = start([sys.executable, "-m", "pip", "install", *options, GUEST], folder, {})
    assert done.returncode == 0, done.stdout
    return str(folder)


@pytest.fixture
def run_program(tmp_path):
    """Run a program in the folder of the test; further arguments are environment variables."""

    def run(*command, **environment):
        return start(command, tmp_path, environment)

    return run


@pytest.fixture
def axolotl(tmp_path):
    """Run the real command on a config; named arguments are environment variables."""

    def run(config, command="train", *options, **environment):
        program = [Path(sys.executable).with_name("axolotl"), command, write(config, tmp_path)]
        return start([*program, "--launcher", "python", *options], tmp_path, environment)

    return run


@pytest.fixture
def train(axolotl, tmp_path):
    """Train: the log history, the output directory and what was printed. Quickly, but for the command line.

    Further arguments are environment variables.
    """

    def run(config, by_command=False, **environment):
        if by_command:
            done = axolotl(config, **environment)
            code, printed = done.returncode, done.stdout
        else:
            code, printed = forked.axolotl_train(write(config, tmp_path), environment)
        assert code == 0, printed[-5000:]
        return history_of(config), Path(config["output_dir"]), printed

    return run


@pytest.fixture
def stopped(tmp_path):
    """Try to train, which must not succeed: what was printed. Further arguments are environment variables."""

    def run(config, **environment):
        code, printed = forked.axolotl_train(write(config, tmp_path), environment)
        assert code != 0
        return printed

    return run


def write(config, folder):
    path = folder / f"{Path(config['output_dir']).name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def start(command, folder, environment):
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


def history_of(config):
    (state,) = Path(config["output_dir"]).glob("checkpoint-*/trainer_state.json")
    return json.loads(state.read_text())["log_history"]
