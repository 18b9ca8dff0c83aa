"""Whole runs of the real hosts in two processes: they train as one process that accumulates, a killed one goes on as if
nothing had happened, and what they save needs no plugin."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import GUEST_MIX, nll_of
from one_step import ZERO
from transformers import AutoModelForCausalLM, AutoTokenizer

needs_axolotl = pytest.mark.skipif(find_spec("axolotl") is None, reason="Axolotl is not installed")
needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
STEPS = 6
OBJECTIVE = {
    "terms": [
        {"loss": "cross_entropy", "weight": 0.6},
        {"loss": "lovasz", "weight": {"from": 0.1, "to": 0.4, "over": 1.0}},
    ]
}
LAYERS = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}
# How checkpoints are kept. A gathered one of an adapter is not wholly restored by accelerate 1.13, with or without us.
CHECKPOINTS = {"full": "FULL_STATE_DICT", "LoRA": "SHARDED_STATE_DICT"}
PROCESSES = {"1 process": 1, "DDP": 2, "FSDP2": 2, "ZeRO-2": 2, "ZeRO-3": 2}  # by sharding

# A process that cannot import the plugin.
GENERATE = """
import sys
sys.modules["axolotl_cvloss"] = None
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
folder, adapter = sys.argv[1:]
if adapter == "LoRA":
    merged = AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload()
    folder += "/merged"
    merged.save_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = torch.tensor([[1, 4, 5, 9, 6]])
print("generated", model.generate(prompt, max_new_tokens=4, do_sample=False).shape[1] - 5)
"""


class Runs:
    """Runs of a host: a script for torchrun, and the file of a setup that it is started on."""

    host: str
    script: str
    first_evaluated = 0  # of the rows to test with

    def __init__(self, start_processes, make_config, files, folder):
        self.start_processes, self.make_config, self.data, self.folder = start_processes, make_config, files, folder

    def output(self, setup):
        return Path(setup.get("arguments", setup)["output_dir"])

    def start(self, sharding, setup, **options):
        """Run it; what was printed."""
        kept = "none" if sharding in ("1 process", "DDP") else sharding
        given = PROCESSES[sharding], self.script, self.file(setup)
        return self.start_processes(*given, sharding=sharding, SHARDING=kept, **options)

    def file(self, setup):
        path = self.folder / f"{self.output(setup).name}.yaml"
        path.write_text(json.dumps(setup))  # which is YAML too
        return path

    def history(self, setup, key="loss"):
        """What was logged in each step, or in each evaluation, from the last checkpoint."""
        last = max(self.output(setup).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        state = json.loads((last / "trainer_state.json").read_text())
        return [entry for entry in state["log_history"] if key in entry]


class AxolotlRuns(Runs):
    """`axolotl train` on YAML files."""

    host = "axolotl train"
    script = "train_axolotl.py"

    def setup(self, name, packing, adapter, sharding, resume=None):
        processes = PROCESSES[sharding]
        keys = {"max_steps": STEPS, "save_steps": 3, "eval_steps": 3, "save_only_model": False, "cv_loss": OBJECTIVE}
        keys["plugins"] = ["axolotl_cvloss.CVLossPlugin", "crash_plugin.CrashPlugin"]
        keys |= {"micro_batch_size": 2, "gradient_accumulation_steps": 2 // processes, "eval_batch_size": 5}
        keys |= ZERO.get(sharding, {})
        if sharding == "FSDP2":
            fsdp = {**LAYERS, "state_dict_type": CHECKPOINTS[adapter], "reshard_after_forward": True}
            keys |= {"fsdp_version": 2, "fsdp_config": {**fsdp, "final_state_dict_type": "FULL_STATE_DICT"}}
        if packing == "packed":
            keys |= {"sample_packing": True, "eval_sample_packing": False, "attn_implementation": "sdpa"}
            keys["eval_batch_size"] = 6  # of 12 rows: with packing Axolotl leaves out a last batch that is not full
        if adapter == "LoRA":
            keys |= {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
            keys |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}  # they need a GPU
        return self.make_config(name, resume_from_checkpoint=resume, **keys)


class ScriptRuns(Runs):
    """A script of TrainingArguments."""

    def setup(self, name, packing, adapter, sharding, resume=None, **more):
        processes = PROCESSES[sharding]
        arguments = {"output_dir": str(self.folder / name), "max_steps": STEPS, "save_steps": 3, "learning_rate": 1e-2}
        arguments |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 // processes}
        # 12 rows. Of packed ones a batch has one, as one line has all documents of a batch.
        arguments |= {"eval_strategy": "steps", "eval_steps": 3}
        arguments["per_device_eval_batch_size"] = 1 if packing == "packed" else 5
        arguments |= ZERO.get(sharding, {})
        if sharding == "FSDP2":
            fsdp = {"version": 2, "reshard_after_forward": True, "state_dict_type": CHECKPOINTS[adapter], **LAYERS}
            arguments |= {"fsdp": "full_shard auto_wrap", "fsdp_config": {**fsdp, "cpu_ram_efficient_loading": False}}
        setup = {"arguments": {**arguments, **more}, "adapter": adapter, "packing": packing, "resume": resume}
        setup |= {"model": str(self.data / "model"), "cv_loss": OBJECTIVE}
        return {**setup, "data": {part: str(self.data / f"{part}.jsonl") for part in ("train", "test")}}


class TRLRuns(ScriptRuns):
    """`CVLossSFTTrainer` in a script."""

    host = "SFTTrainer"
    script = "train_trl.py"

    def setup(self, name, packing, *way, **named):
        setup = super().setup(name, packing, *way, **named)
        if packing == "packed":
            setup["arguments"] |= {"packing": True, "max_length": 24}  # so that an epoch is longer than the run
        return setup


class TrainerRuns(ScriptRuns):
    """transformers' own Trainer in a script."""

    host = "transformers Trainer"
    script = "train_trainer.py"
    first_evaluated = 1


HOSTS = {
    "Axolotl": pytest.param(AxolotlRuns, marks=needs_axolotl),
    "TRL": pytest.param(TRLRuns, marks=needs_trl),
    "Trainer": TrainerRuns,
}


@pytest.fixture
def runs(request, start_processes, make_config, files, tmp_path):
    return request.param(start_processes, make_config, files, tmp_path)


def same(found, expected, tolerance, prefix="", but=()):
    terms = [f"cv_loss/{name}" for name in ("cross_entropy", "lovasz", "nll", "lovasz/sets", "lovasz/classes")]
    names = ["loss", *terms] if prefix else ["loss", *terms, "grad_norm", "cv_loss/lovasz/weight"]
    names = ["step", *(prefix + name for name in names if name not in but)]
    for one, other in zip(found, expected, strict=True):
        values = {name: other[name] for name in names}
        assert {name: one[name] for name in names} == pytest.approx(values, rel=tolerance, abs=1e-6)


WAYS = [
    *(("FSDP2", packing, adapter) for packing in ("padded", "packed") for adapter in ("full", "LoRA")),
    ("ZeRO-2", "padded", "LoRA"),
    ("ZeRO-2", "packed", "full"),
    ("ZeRO-3", "padded", "full"),
    ("ZeRO-3", "packed", "LoRA"),
]


@pytest.mark.hosts
@pytest.mark.matrix
@pytest.mark.parametrize(("sharding", "packing", "adapter"), WAYS)
@pytest.mark.parametrize("runs", HOSTS.values(), ids=HOSTS, indirect=True)
def test_two_processes(runs, sharding, packing, adapter, problems, record_property):
    way = {"packing": packing, "adapter": adapter}
    for ran in "1 process", sharding:
        record_property("setup", {"host": runs.host, "sharding": ran, **way})
    alone = runs.setup("alone", **way, sharding="1 process")
    whole = runs.setup("whole", **way, sharding=sharding)
    killed = runs.setup("killed", **way, sharding=sharding)
    checkpoint = runs.output(killed) / "checkpoint-3"
    resumed = runs.setup("killed", **way, sharding=sharding, resume=str(checkpoint))

    runs.start(sharding, killed, killed=True, CRASH_AFTER="5")
    assert checkpoint.is_dir()
    assert not (runs.output(killed) / f"checkpoint-{STEPS}").exists()
    runs.start(sharding, resumed)
    runs.start(sharding, whole)
    runs.start("1 process", alone)

    expected, evaluated = runs.history(whole), runs.history(whole, "eval_loss")
    assert [entry["step"] for entry in expected] == list(range(1, STEPS + 1))
    for entry in expected:
        weight = entry["cv_loss/lovasz/weight"]
        mix = 0.6 * entry["cv_loss/cross_entropy"] + weight * entry["cv_loss/lovasz"]
        assert entry["loss"] == pytest.approx(mix, abs=1e-4)
    same(runs.history(resumed), expected, tolerance=1e-5)
    # Axolotl packs other documents together for two processes.
    if runs.host != "axolotl train" or packing != "packed":
        same(runs.history(alone), expected, tolerance=1e-3)
        # No rows that fill the last batches are counted.
        same(runs.history(alone, "eval_loss"), evaluated, tolerance=1e-3, prefix="eval_")

    command = [sys.executable, "-c", GENERATE, str(runs.output(whole)), adapter]
    # Through the backends of torch the plugin guards the YAML of Axolotl.
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.split()[-2:-1] == ["generated"], done.stderr[-3000:]
    folder = runs.output(whole) / ("merged" if adapter == "LoRA" else "")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(runs.data / "model")
    nll = nll_of(model, tokenizer, problems["test"][runs.first_evaluated :])
    assert nll == pytest.approx(evaluated[-1]["eval_cv_loss/nll"], rel=1e-3)


@pytest.mark.hosts
@pytest.mark.matrix
@pytest.mark.parametrize(
    ("option", "size"),
    [("dispatch_batches", 3), ("dispatch_batches", 4), ("dispatch_batches", 11), ("split_batches", 4)],
)
@pytest.mark.parametrize("runs", [TrainerRuns], ids=["Trainer"], indirect=True)
def test_other_ways_to_deal_batches_out(runs, option, size):
    """Rank 0 reads all batches and hands parts of them on, as with a dataset that can only be iterated over; or every
    rank takes its part of each batch."""
    found = []
    for sharding in "1 process", "DDP":
        more = {"per_device_eval_batch_size": size, "max_steps": 1, "eval_steps": 1, "save_steps": 1}
        more["learning_rate"] = 0.0  # ranks train on other rows
        setup = runs.setup(sharding, "padded", "full", sharding, **more, accelerator_config={option: True})
        runs.start(sharding, setup)
        found.append(runs.history(setup, "eval_loss"))
    # Of a last batch that is not full, Trainer takes rank 0's part for all of it in its own eval_loss.
    same(*found, tolerance=1e-3, prefix="eval_", but=["loss"])


@needs_trl
@pytest.mark.hosts
@pytest.mark.matrix
@pytest.mark.parametrize("runs", [TRLRuns], ids=["TRL"], indirect=True)
def test_the_metrics_of_sfttrainer(runs):
    """Entropy, token accuracy and tokens are those that SFTTrainer itself finds in two processes."""
    found = []
    for name in "ours", "theirs":
        setup = runs.setup(name, "padded", "full", sharding="FSDP2", per_device_eval_batch_size=3)
        setup["cv_loss"] = "cross_entropy" if name == "ours" else None
        runs.start("FSDP2", setup)
        found.append(setup)
    names = ["loss", "entropy", "mean_token_accuracy", "num_tokens"]
    for key, names_of in ("loss", [*names, "grad_norm"]), ("eval_loss", [f"eval_{name}" for name in names]):
        for ours, theirs in zip(*(runs.history(setup, key) for setup in found), strict=True):
            values = {name: theirs[name] for name in names_of if name != "eval_loss"}
            assert {name: ours[name] for name in values} == pytest.approx(values, rel=1e-4)


@pytest.mark.hosts
@pytest.mark.parametrize("runs", [TrainerRuns], ids=["Trainer"], indirect=True)
def test_nan_on_another_rank(runs):
    setup = runs.setup("nan", "padded", "full", sharding="FSDP2", max_steps=1, eval_strategy="no")
    printed = runs.start("FSDP2", setup, NAN_ON_RANK="1")
    (line,) = [line for line in printed.splitlines() if "became NaN" in line]
    assert "cross_entropy, lovasz, nll became NaN or infinite in step 1 on rank 1." in line


@pytest.fixture
def conversations(files, problems, tmp_path):
    """Keys of a setup whose data are conversations of two rounds; some answers have a weight, and some are bad."""
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + ' </s>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
    )
    AutoModelForCausalLM.from_pretrained(files / "model").save_pretrained(tmp_path / "chats")
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "chats")
    data = {}
    for part, rows in problems.items():
        data[part], lines = str(tmp_path / f"{part}.jsonl"), []
        for number, both in enumerate(zip(rows[::2], rows[1::2], strict=True)):
            messages = []
            for row, weight in zip(both, (2.0, 0.25 * (number % 3)), strict=True):
                messages.append({"role": "user", "content": row["prompt"]})
                messages.append({"role": "assistant", "content": row["completion"], "weight": weight})
            messages[1]["bad"] = int(number % 4 == 0)
            lines.append(json.dumps({"messages": messages}))
        Path(data[part]).write_text("\n".join(lines))
    terms = [{"loss": "cross_entropy"}, {"loss": "unlikelihood", "weight": 0.1, "where": "bad"}]
    cv_loss = {"terms": terms, "example_weights": "weight"}
    return {"model": str(tmp_path / "chats"), "data": data, "cv_loss": cv_loss}


@needs_trl
@pytest.mark.hosts
@pytest.mark.matrix
@pytest.mark.parametrize(("sharding", "packing"), [("DDP", "packed"), ("FSDP2", "padded")])
@pytest.mark.parametrize("runs", [TRLRuns], ids=["TRL"], indirect=True)
def test_weights_of_messages(runs, sharding, packing, conversations):
    """A field of a message is a number of its tokens, and two processes do with it what one does."""
    found = []
    for way in "1 process", sharding:
        more = {"assistant_only_loss": True, "eval_strategy": "no", "save_steps": STEPS}
        setup = {**runs.setup(way, packing, "full", way, **more), **conversations}
        runs.start(way, setup)
        found.append(runs.history(setup))
    names = ["loss", "grad_norm", "cv_loss/nll"]
    names += [f"cv_loss/{term}{what}" for term in ("cross_entropy", "unlikelihood") for what in ("", "/tokens")]
    for alone, both in zip(*found, strict=True):
        assert {name: both[name] for name in names} == pytest.approx({name: alone[name] for name in names}, rel=1e-3)
        assert abs(both["cv_loss/cross_entropy"] - both["cv_loss/nll"]) > 0.01  # weights are no part of the latter
    assert any(0 < entry["cv_loss/unlikelihood/tokens"] < entry["cv_loss/cross_entropy/tokens"] for entry in found[1])


@needs_axolotl
@pytest.mark.hosts
@pytest.mark.parametrize("runs", [AxolotlRuns], ids=["Axolotl"], indirect=True)
def test_a_strangers_losses(runs, guest):
    """Those of tests/guest under Axolotl, fused and packed, in two processes."""
    config = {**runs.setup("guest", "packed", "full", sharding="FSDP2"), "cv_loss": {**GUEST_MIX, "head": "fused"}}
    printed = runs.start("FSDP2", config, PYTHONPATH=guest)
    assert "0.6 huberised" in printed
    logged = runs.history(config)
    for entry in logged:
        mixed = 0.6 * entry["cv_loss/huberised"] + 0.4 * entry["cv_loss/fowlkes_mallows"]
        assert entry["loss"] == pytest.approx(mixed, abs=1e-4)
    assert logged[-1]["cv_loss/huberised"] < logged[0]["cv_loss/huberised"] - 0.1
