"""TRL's SFTTrainer with an objective: real training runs of a tiny model, beside SFTTrainer's own."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

import trl
from accelerate.parallelism_config import ParallelismConfig
from datasets import Dataset
from helpers import NEEDS_MORE
from peft import LoraConfig, PromptTuningConfig
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

from axolotl_cvloss import CVLossSFTConfig, CVLossSFTTrainer, Objective, attach, install, uninstall
from axolotl_cvloss.hosts import trl_cli
from axolotl_cvloss.model.installation import installation

COMMAND = Path(sys.executable).with_name("cvloss-sft")
EXAMPLES = Path(__file__).parents[2] / "example_configs"
MIX = {"cross_entropy": 0.6, "lovasz": 0.4}
# What plain text, prompts with completions, and conversations look like; the last trains what the assistant says.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' </s>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' ? ' }}{% endif %}{% endfor %}"
)


@pytest.fixture
def chat_tokenizer(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    return tokenizer


@pytest.fixture
def data(problems, numbers):
    def conversation(row):
        return {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }

    return {
        "completion": problems,
        **{
            f"weighted {number}": {
                k: [{**r, "importance": (i + number) % 2} for i, r in enumerate(rows)] for k, rows in problems.items()
            }
            for number in range(2)
        },
        "numbers": numbers,
        "text": {k: [{"text": f"{r['prompt']} {r['completion']}"} for r in rows] for k, rows in problems.items()},
        "chat": {k: [conversation(r) for r in rows] for k, rows in problems.items()},
    }


@pytest.fixture
def make_trainer(make_model, chat_tokenizer, data, tmp_path):
    """A CVLossSFTTrainer, or SFTTrainer itself."""

    def make(cv_loss=None, *, plain=False, kind="completion", model=None, peft_config=None, named=None, **arguments):
        config, trainer = (SFTConfig, SFTTrainer) if plain else (CVLossSFTConfig, CVLossSFTTrainer)
        if not plain:
            arguments["cv_loss"] = cv_loss
        train, test = (Dataset.from_list(data[kind][part]) for part in ("train", "test"))
        model = make_model() if model is None else model
        set_seed(0)  # adapters start with random weights
        return trainer(
            model=model,
            args=config(
                **{
                    "output_dir": str(tmp_path),
                    "max_steps": 6,
                    "learning_rate": 1e-2,
                    "lr_scheduler_type": "constant",
                    "per_device_train_batch_size": 4,
                    "per_device_eval_batch_size": 5,
                    "logging_steps": 2,
                    "save_strategy": "no",
                    "eval_strategy": "no",
                    "gradient_checkpointing": False,
                    "bf16": False,
                    "use_cpu": True,
                    "report_to": "none",
                    "disable_tqdm": True,
                    "loss_type": "nll",
                    **arguments,
                }
            ),
            train_dataset=train,
            eval_dataset=test,
            processing_class=chat_tokenizer,
            peft_config=peft_config,
            **(named or {}),
        )

    return make


def histories(trainer):
    """What was logged in training and in evaluation."""
    trainer.train()
    trainer.evaluate()
    training = [entry for entry in trainer.state.log_history if "loss" in entry]
    (evaluation,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert training
    return training, evaluation


# Cross-entropy is SFTTrainer's own loss

WAYS = {
    "completion only": {},
    "prompt too": {"completion_only_loss": False},
    "text": {"kind": "text"},
    "assistant only": {"kind": "chat", "assistant_only_loss": True},
    "packing": {"packing": True, "max_length": 48},
    "packing text": {"packing": True, "max_length": 48, "kind": "text"},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 48, "kind": "text"},
    "padding-free": {"padding_free": True, "max_length": None},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "max_steps": 4},
    "checkpointing": {"gradient_checkpointing": True},
    "adapter": {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "down_proj"])},
    "virtual tokens": {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_cross_entropy_is_the_loss_of_sfttrainer(way, make_trainer):
    """The same losses, gradients and metrics, in training and in evaluation."""
    ours, our_evaluation = histories(make_trainer("cross_entropy", **way))
    plain, plain_evaluation = histories(make_trainer(plain=True, **way))
    compare(ours, plain, {"loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "epoch"})
    metrics = {"eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"}
    compare([our_evaluation], [plain_evaluation], metrics)
    assert 0 < our_evaluation["eval_mean_token_accuracy"] < 1


def compare(ours, plain, names):
    assert len(ours) == len(plain)
    for one, other in zip(ours, plain, strict=True):
        assert names <= one.keys()
        assert names <= other.keys()
        assert {name: one[name] for name in names} == pytest.approx({name: other[name] for name in names}, rel=2e-4)


@pytest.fixture
def make_mixtral(tokenizer):
    def make():
        set_seed(0)
        config = MixtralConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            max_position_embeddings=128,
            router_aux_loss_coef=0.1,
        )
        return MixtralForCausalLM(config)

    return make


def test_mixture_of_experts(make_trainer, make_mixtral):
    """Load balancing is part of the loss, and is logged."""
    both = []
    for plain in (False, True):
        trainer = make_trainer("cross_entropy", plain=plain, model=make_mixtral(), router_aux_loss_coef=0.1)
        training, evaluation = histories(trainer)
        both.append([*training, {name[5:]: value for name, value in evaluation.items()}])
        assert evaluation["eval_aux_loss"] > 1
    compare(*both, {"loss", "aux_loss", "entropy"})


def test_the_coefficient_of_load_balancing(make_trainer, make_mixtral):
    training, _ = histories(make_trainer("cross_entropy", model=make_mixtral(), router_aux_loss_coef=0.5))
    for entry in training:
        assert entry["loss"] == pytest.approx(entry["cv_loss/cross_entropy"] + 0.5 * entry["aux_loss"], rel=1e-5)


def shapes_of(found):
    return [shapes_of(part) for part in found] if isinstance(found, tuple) else found.shape


@pytest.mark.parametrize("preprocess", [None, lambda logits, labels: logits], ids=["plain", "preprocessed"])
def test_metrics_of_a_mixture_of_experts_get_what_sfttrainer_gives(preprocess, make_trainer, make_mixtral):
    """Versions differ: the logits alone, or all outputs of the model but the loss."""
    shapes = []
    for plain in (False, True):
        seen = []

        def compute_metrics(prediction, seen=seen):
            seen.append(prediction)
            return {}

        trainer = make_trainer(
            "cross_entropy",
            plain=plain,
            model=make_mixtral(),
            per_device_eval_batch_size=12,
            named={"compute_metrics": compute_metrics, "preprocess_logits_for_metrics": preprocess},
        )
        trainer.evaluate()
        shapes.append(shapes_of(seen[0].predictions))
    assert shapes[0] == shapes[1]


# Objectives


@pytest.mark.parametrize("way", ["completion only", "packing", "padding-free", "assistant only"])
def test_the_terms_are_logged(way, make_trainer):
    """The loss is the weighted sum of what stands beside it; in evaluation where all is one batch."""
    cross_entropy = {"loss": "cross_entropy", "weight": 0.6, "scope": "sequence"}
    objective = {"terms": [cross_entropy, {"loss": "lovasz", "weight": 0.4}]}
    trainer = make_trainer(objective, **WAYS[way], max_steps=12, per_device_eval_batch_size=12)
    training, evaluation = histories(trainer)
    for prefix, entry in [*(("", entry) for entry in training), ("eval_", evaluation)]:
        value = 0.6 * entry[f"{prefix}cv_loss/cross_entropy"] + 0.4 * entry[f"{prefix}cv_loss/lovasz"]
        assert entry[f"{prefix}loss"] == pytest.approx(value, rel=1e-4)
        assert entry[f"{prefix}cv_loss/nll"] != entry[f"{prefix}cv_loss/cross_entropy"]  # prompts are in one of them
    assert training[-1]["loss"] < 0.9 * training[0]["loss"]


@pytest.mark.parametrize("config", [MIX, "focal", "generalized_dice"], ids=str)
def test_accumulation_is_one_big_batch(config, make_trainer, make_model):
    weights = []
    for size, steps in [(8, 1), (4, 2), (2, 4), (3, 3)]:
        trainer = make_trainer(
            config,
            model=make_model().double(),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0,
        )
        trainer.train_dataset = trainer.train_dataset.select(range(8))
        trainer.train()
        weights.append({name: p.detach() for name, p in trainer.model.named_parameters()})
    start = dict(make_model().double().named_parameters())
    for name, one_batch in weights[0].items():
        assert not torch.equal(one_batch, start[name])
        for cut in weights[1:]:
            torch.testing.assert_close(cut[name], one_batch, rtol=1e-6, atol=1e-9)


def test_a_schedule_moves(make_trainer):
    lovasz = {"weight": {"from": 0.0, "to": 0.6, "over": 1.0}}
    training, _ = histories(make_trainer({"cross_entropy": 0.6, "lovasz": lovasz}, logging_steps=1))
    assert [entry["cv_loss/lovasz/weight"] for entry in training] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("way", ["completion only", "packing"])
def test_losses_that_need_a_tokenizer_or_counts(way, make_trainer):
    trainer = make_trainer(NEEDS_MORE, kind="numbers", logging_steps=1, **WAYS[way])
    training, evaluation = histories(trainer)
    for prefix, entry in [*(("", entry) for entry in training), ("eval_", evaluation)]:
        terms = {name: entry[f"{prefix}cv_loss/{name}"] for name in NEEDS_MORE}
        assert all(value > 0 for value in terms.values())
        tokens = {name: entry[f"{prefix}cv_loss/{name}/tokens"] for name in NEEDS_MORE}
        assert 0 < tokens["number_token_mse"] < tokens["ldam"]
        assert 0 < tokens["cross_entropy"] < tokens["ldam"]
        if not prefix:
            assert entry["loss"] == pytest.approx(sum(NEEDS_MORE[n]["weight"] * terms[n] for n in terms), abs=1e-4)
    assert training[-1]["cv_loss/ldam"] < training[0]["cv_loss/ldam"]


def test_no_logits_in_training(make_trainer):
    trainer = make_trainer(MIX)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert "logits" not in outputs


@pytest.mark.parametrize("reduced", [False, True], ids=["logits", "predictions"])
def test_evaluation_with_metrics(reduced, make_trainer):
    """compute_metrics gets the logits of the model, and what is logged does not change."""
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        predictions = prediction.predictions if reduced else prediction.predictions.argmax(-1)
        trained = prediction.label_ids[:, 1:] != -100
        correct = (predictions[:, :-1] == prediction.label_ids[:, 1:])[trained]
        return {"right": correct.mean()}

    def preprocess(logits, labels):
        return logits.argmax(-1)

    named = {"compute_metrics": compute_metrics}
    if reduced:
        named["preprocess_logits_for_metrics"] = preprocess
    trainer = make_trainer(MIX, per_device_eval_batch_size=12, named=named)
    with_logits = trainer.evaluate()
    without = make_trainer(MIX, per_device_eval_batch_size=12).evaluate()
    assert isinstance(seen[0].predictions, np.ndarray)
    assert with_logits["eval_right"] == pytest.approx(with_logits["eval_mean_token_accuracy"])
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_cv_loss/lovasz", "eval_cv_loss/nll"):
        assert with_logits[name] == pytest.approx(without[name], rel=1e-5)


@pytest.mark.parametrize(
    "adapter",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["lm_head", "all-linear", "modules_to_save"],
)
def test_adapters_on_the_head(adapter, make_trainer, make_model):
    trainer = make_trainer(MIX, peft_config=LoraConfig(r=4, **adapter))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    training, _ = histories(trainer)
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    trainable = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert changed == trainable
    assert any("lm_head" in name for name in trainable) == (adapter["target_modules"] != "all-linear")
    assert training[-1]["loss"] < training[0]["loss"]
    # The objective of the logits that the adapted model has.
    batch = next(iter(trainer.get_eval_dataloader()))
    trainer.model.train()
    fused = trainer.model(**batch).loss
    labels = batch.pop("labels")
    expected = Objective.from_config(MIX).from_logits(trainer.model(**batch).logits, labels)
    assert fused.item() == pytest.approx(expected.loss.item(), rel=1e-5)


def test_the_paper_s_code(make_trainer):
    """It runs on logits; the metrics are the same."""
    both = []
    for reference in (True, False):
        terms = [{"loss": "cross_entropy"}, {"loss": "lovasz", "weight": 1e-9}]
        both.append(histories(make_trainer({"terms": terms, "reference": reference}, max_steps=2))[0])
    compare(*both, {"entropy", "mean_token_accuracy", "num_tokens", "cv_loss/nll"})


# Without the key


def test_without_the_key_it_is_sfttrainer(make_trainer):
    ours = make_trainer(cv_loss=None)
    training, evaluation = histories(ours)
    plain, plain_evaluation = histories(make_trainer(plain=True))
    assert installation(ours.model) is None
    time = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    assert training == plain
    assert {k: v for k, v in evaluation.items() if k not in time} == {
        k: v for k, v in plain_evaluation.items() if k not in time
    }


# What is refused

REFUSED = {
    "dft": ({"loss_type": "dft"}, "cv_loss cannot be used with loss_type: dft: .*name the loss in cv_loss"),
    "smoothing": ({"label_smoothing_factor": 0.1}, r"write cross_entropy: \{label_smoothing: 0.1\} in cv_loss"),
    "context": ({"parallelism_config": ParallelismConfig(cp_size=2)}, r"cp_size above 1 \(context parallelism\)"),
    "tensor": ({"parallelism_config": ParallelismConfig(tp_size=2)}, r"tp_size above 1 \(tensor parallelism\)"),
    "sequence": ({"parallelism_config": ParallelismConfig(sp_size=2)}, r"sp_size above 1 \(sequence parallelism\)"),
    "misspelt": ({"cv_loss": {"lovas": 1}}, r"cv_loss.*lovas.*did you mean lovasz\?"),
    "two": ({"cv_loss": "lovas", "loss_type": "dft"}, "(?s)loss_type: dft.*did you mean lovasz"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_options(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CVLossSFTConfig(**{"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "cv_loss": MIX, **arguments})


def test_a_loss_without_its_reference_is_refused_before_the_model_is_loaded(tmp_path):
    given = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    with pytest.raises(ValueError, match=r"cv_loss\.anchored: it needs log p of each token under a reference model"):
        CVLossSFTConfig(cv_loss="anchored", **given)
    args = CVLossSFTConfig(cv_loss={"anchored": 1, "reference": "adapter_off"}, **given)
    with pytest.raises(ValueError, match=r"cv_loss\.reference: adapter_off needs an adapter: use_peft"):
        CVLossSFTTrainer("no such model", args)


def test_a_loss_function_is_refused_before_the_model_is_loaded(tmp_path):
    args = CVLossSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, cv_loss=MIX)
    with pytest.raises(ValueError, match=r"cannot be used with compute_loss_func.*register_loss"):
        CVLossSFTTrainer("no such model", args, compute_loss_func=lambda *_: 0)
    with pytest.raises(TypeError, match=r"needs args=CVLossSFTConfig\(cv_loss=...\), not a SFTConfig"):
        CVLossSFTTrainer("no such model", SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))


def test_a_model_with_an_objective_is_refused_to_sfttrainer_until_it_is_uninstalled(make_trainer, make_model):
    model = make_model()
    make_trainer(MIX, model=model, max_steps=1).train()
    for plain in (True, False):
        with pytest.raises(
            ValueError, match=r"the objective 0.6 cross_entropy \+ 0.4 lovasz .* call uninstall\(model\)"
        ):
            make_trainer(plain=plain, model=model)
    make_trainer("focal", model=model, max_steps=1).train()
    make_trainer(plain=True, model=uninstall(model), max_steps=1).train()


LIGER = {"use_liger_kernel": True, "liger_kernel_config": {"rope": False, "rms_norm": False, "swiglu": False}}


@pytest.mark.parametrize("liger", [{}, {**LIGER, "liger_kernel_config": {"fused_linear_cross_entropy": False}}])
@pytest.mark.parametrize("trainer", [SFTTrainer, Trainer])
def test_no_other_trainer_takes_the_config(trainer, liger, make_model, tokenizer, data, tmp_path):
    """It would train with its own loss, or with that of the model."""
    more = {"report_to": "none", "max_steps": 1, "save_strategy": "no"}
    args = CVLossSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, cv_loss=MIX, **more, **liger)
    train = Dataset.from_list(data["completion"]["train"])
    message = f"cv_loss: only CVLossSFTTrainer trains with it, and this is a {trainer.__name__}"
    with pytest.raises(ValueError, match=message):
        trainer(make_model(), args, train_dataset=train, processing_class=tokenizer)
    args = CVLossSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **more)
    trainer(make_model(), args, train_dataset=train, processing_class=tokenizer)


@pytest.mark.parametrize("of_cross_entropy", [{}, {"cross_entropy": True, "fused_linear_cross_entropy": False}])
def test_liger_s_cross_entropy_is_switched_off(of_cross_entropy, make_trainer, caplog, monkeypatch):
    """Its other kernels may stay; none of them runs on a CPU. Its cross-entropy would run, and fail there."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    kernels = {**LIGER["liger_kernel_config"], **of_cross_entropy}
    trainer = make_trainer(MIX, use_liger_kernel=True, liger_kernel_config=kernels)
    off = "cross_entropy" if of_cross_entropy else "fused_linear_cross_entropy"
    assert [record.message for record in caplog.records if "Liger" in record.message] == [
        "cv_loss computes its loss itself, without keeping logits where the losses allow it, so Liger's "
        f"{off} is switched off"
    ]
    assert trainer.args.liger_kernel_config == {**kernels, off: False}
    training, evaluation = histories(trainer)
    plain, plain_evaluation = histories(make_trainer(MIX))
    compare(training, plain, {"loss", "cv_loss/lovasz", "entropy"})
    compare([evaluation], [plain_evaluation], {"eval_loss", "eval_cv_loss/nll"})


def test_liger_s_cross_entropy_is_switched_off_by_attach(make_model, tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", use_liger_kernel=True)
    trainer = Trainer(install(make_model(), Objective.from_config(MIX)), args)
    attach(trainer)
    assert trainer.args.liger_kernel_config == {"fused_linear_cross_entropy": False}


# Commands and examples


@pytest.fixture
def conversations(make_model, chat_tokenizer, data, tmp_path):
    """A model and a data set of conversations, as folders."""
    make_model().save_pretrained(tmp_path / "model")
    chat_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for part, rows in data["chat"].items():
        (tmp_path / "data" / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "model", tmp_path / "data"


def logged(folder):
    (state,) = folder.glob("checkpoint-*/trainer_state.json")
    history = json.loads(state.read_text())["log_history"]
    return [entry for entry in history if "loss" in entry], [entry for entry in history if "eval_loss" in entry]


@pytest.mark.hosts
@pytest.mark.parametrize(("processes", "more"), [(1, []), pytest.param(2, ["--multi_gpu"], marks=pytest.mark.slow)])
def test_the_example_config(processes, more, conversations, run_program, tmp_path):
    """The real command; arguments go over what the file says. --multi_gpu has accelerate start several processes."""
    model, data = conversations
    arguments = {
        "model_name_or_path": model,
        "dataset_name": data,
        "output_dir": tmp_path / "run",
        "max_steps": 4,
        "logging_steps": 2,
        "eval_steps": 4,
        "save_steps": 4,
        "use_cpu": True,
        "bf16": False,
        "num_processes": processes,  # for accelerate
    }
    command = [COMMAND, "--config", EXAMPLES / "trl_sft.yaml"]
    for name, value in arguments.items():
        command += [f"--{name}", value]
    result = run_program(*command, *more, ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stdout[-5000:]
    training, (evaluation,) = logged(tmp_path / "run")
    assert [entry["step"] for entry in training] == [2, 4]
    for prefix, entry in [("", training[0]), ("eval_", evaluation)]:
        assert {f"{prefix}cv_loss/{name}" for name in ("cross_entropy", "lovasz", "nll")} <= entry.keys()
        assert {f"{prefix}{name}" for name in ("entropy", "mean_token_accuracy", "num_tokens")} <= entry.keys()
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    assert len(list(tmp_path.glob("run/checkpoint-4/rng_state*.pth"))) == processes


@pytest.fixture
def give(monkeypatch, tmp_path):
    """Give a config to the command, in this process."""
    for name in ("SFTConfig", "SFTTrainer"):
        monkeypatch.setattr(trl, name, getattr(trl, name))  # the command replaces them

    def run(lines):
        (tmp_path / "sft.yaml").write_text(f"model_name_or_path: no such model\nuse_cpu: true\nbf16: false\n{lines}\n")
        monkeypatch.setattr(sys, "argv", ["cvloss-sft", "--config", str(tmp_path / "sft.yaml")])
        trl_cli.command()

    return run


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("cv_loss: {lovas: 1}", "did you mean lovasz"),
        ("cv_loss: {focal: {gama: 1}}", "did you mean gamma"),
        ("cv_loss: lovasz\nloss_type: dft", "cv_loss cannot be used with loss_type: dft"),
    ],
)
def test_the_command_checks_the_key(lines, message, give):
    with pytest.raises(ValueError, match=message):
        give(lines)


def test_the_command_refuses_an_unknown_key(give, capsys):
    with pytest.raises(SystemExit):
        give("cv_los: lovasz")
    assert "unrecognized arguments: --cv_los" in capsys.readouterr().err


def test_objectives_on_the_command_line():
    parser = trl.TrlParser(CVLossSFTConfig)
    for given, terms in [("lovasz", ["lovasz"]), ('{"dice": 1, "focal": {"gamma": 3}}', ["dice", "focal"])]:
        (config,) = parser.parse_args_into_dataclasses(["--cv_loss", given, "--use_cpu", "--bf16", "false"])
        assert [term["loss"] for term in config.cv_loss["terms"]] == terms


@pytest.mark.hosts
def test_the_example_script(conversations, run_program, tmp_path):
    script = EXAMPLES / "trl_sft.py"
    assert len(script.read_text().splitlines()) < 30
    result = run_program(sys.executable, script, *conversations, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stdout[-5000:]
    training, _ = logged(tmp_path / "outputs" / "trl_sft")
    assert "cv_loss/lovasz" in training[-1]


@pytest.mark.parametrize("weights", [{"normalize": "examples"}, {"cvar": 0.3}], ids=["normalize", "cvar"])
@pytest.mark.parametrize("way", [{}, {"packing": True, "max_length": 48}], ids=["padded", "packed"])
def test_documents_count_alike_however_a_step_is_cut(way, weights, make_trainer):
    """The same rows as one micro-batch, and as two."""
    objective, found = {**MIX, "examples": weights}, []
    for size, steps in (4, 1), (2, 2):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = make_trainer(objective, max_steps=2, logging_steps=1, **cut, **way)
        trainer.train()
        (names,) = [[name for name in trainer.state.log_history[0] if name.startswith("cv_loss/")]]
        names = [name for name in ("loss", "grad_norm", *names) if not name.endswith("/share")]
        found.append([entry[name] for entry in trainer.state.log_history[:2] for name in names])
    assert "cv_loss/examples/effective" in names
    assert found[0] == pytest.approx(found[1], rel=1e-4)


LAID_OUT = {
    "padded": {},
    "cut": {"max_length": 20, "truncation_mode": "keep_end"},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 80, "per_device_train_batch_size": 2},
    "packed, split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 20},
    "packed, wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 50},
}


@pytest.mark.parametrize("way", LAID_OUT.values(), ids=LAID_OUT)
def test_example_weights(way, make_trainer):
    """The loss is linear in the weights, so those of two halves of the examples add up to the loss of all."""
    losses = []
    for kind in "weighted 0", "weighted 1", "completion":
        objective = MIX if kind == "completion" else {**MIX, "example_weights": "importance"}
        trainer = make_trainer(objective, kind=kind, max_steps=1, logging_steps=1, **way)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert min(losses) > 0.5
    assert sum(losses[:2]) == pytest.approx(losses[2], rel=1e-5)


def test_liger_keeps_the_column(make_trainer):
    """Its kernels do not run here; that the data have what they must is seen without them."""
    trainer = make_trainer({**MIX, "example_weights": "importance"}, kind="weighted 0", use_liger_kernel=True)
    (batch, *_) = trainer.get_train_dataloader()
    assert batch["importance"].shape == batch["labels"].shape
    assert set(batch["importance"].unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("way", [{}, {"padding_free": True, "max_length": None}], ids=["padded", "padding-free"])
def test_prune(way, make_trainer):
    """Each example keeps its number and gets a loss of its own."""
    options = {"max_steps": -1, "num_train_epochs": 3, "logging_steps": 1, **way}
    trainer = make_trainer({**MIX, "prune": {"share": 0.9, "until": 1.0}}, **options)
    seen = []

    def see(model, inputs, given):
        if way:
            starts = (given["position_ids"][0] == 0).nonzero().flatten().tolist()
            lines = given["input_ids"][0].tensor_split(starts[1:])
            numbers = [int(part[0]) for part in given["cv_loss_number"][0].tensor_split(starts[1:])]
        else:
            lines = [line[mask == 1] for line, mask in zip(given["input_ids"], given["attention_mask"], strict=True)]
            numbers = given["cv_loss_number"].tolist()
        for line, number in zip(lines, numbers, strict=True):
            assert trainer.train_dataset[number]["input_ids"] == line.tolist()
        seen.extend(numbers)

    trainer.cv_loss.model.register_forward_pre_hook(see, with_kwargs=True)
    trainer.train()
    steps = trainer.state.global_step
    assert sorted(seen[:64]) == list(range(64))
    assert 16 < steps < 48
    assert len(seen) == 4 * steps
    assert trainer.state.log_history[-2]["cv_loss/prune/left_out"] == pytest.approx(1 - steps / 48)
    assert int(trainer._cv_pruning.losses.isnan().sum()) == 0
