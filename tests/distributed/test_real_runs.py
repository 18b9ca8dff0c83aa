"""Whole runs of the real hosts in two processes: they train as one process that accumulates, a killed one goes on as if
nothing had happened, and what they save needs no plugin."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

needs_axolotl = pytest.mark.skipif(find_spec("axolotl") is None, reason="Axolotl is not installed")
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


class AxolotlRuns:
    """`axolotl train` on YAML files."""

    host = "axolotl train"
    script = "train_axolotl.py"

    def __init__(self, make_config, folder):
        self.make_config, self.folder = make_config, folder

    def setup(self, name, packing, adapter, processes, resume=None):
        keys = {"max_steps": STEPS, "save_steps": 3, "eval_steps": 3, "save_only_model": False, "cv_loss": OBJECTIVE}
        keys["plugins"] = ["axolotl_cvloss.CVLossPlugin", "crash_plugin.CrashPlugin"]
        keys |= {"micro_batch_size": 2, "gradient_accumulation_steps": 2 // processes}
        if processes > 1:
            fsdp = {**LAYERS, "state_dict_type": CHECKPOINTS[adapter], "reshard_after_forward": True}
            keys |= {"fsdp_version": 2, "fsdp_config": {**fsdp, "final_state_dict_type": "FULL_STATE_DICT"}}
        if packing == "packed":
            keys |= {"sample_packing": True, "eval_sample_packing": False, "attn_implementation": "sdpa"}
        if adapter == "LoRA":
            keys |= {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
            keys |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}  # they need a GPU
        return self.make_config(name, resume_from_checkpoint=resume, **keys)

    def file(self, setup):
        path = self.folder / f"{self.output(setup).name}.yaml"
        path.write_text(yaml.safe_dump(setup))
        return path

    @staticmethod
    def output(setup):
        return Path(setup["output_dir"])


class TRLRuns:
    """`CVLossSFTTrainer` in a script."""

    host = "SFTTrainer"
    script = "train_trl.py"

    def __init__(self, files, folder):
        self.data, self.folder = files, folder

    def setup(self, name, packing, adapter, processes, resume=None):
        arguments = {"output_dir": str(self.folder / name), "max_steps": STEPS, "save_steps": 3, "cv_loss": OBJECTIVE}
        arguments |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 // processes}
        arguments["learning_rate"] = 1e-2
        if processes > 1:
            fsdp = {"version": 2, "reshard_after_forward": True, "state_dict_type": CHECKPOINTS[adapter], **LAYERS}
            arguments |= {"fsdp": "full_shard auto_wrap", "fsdp_config": {**fsdp, "cpu_ram_efficient_loading": False}}
        if packing == "packed":
            arguments |= {"packing": True, "max_length": 24}  # so that an epoch is longer than the run
        data = {"model": str(self.data / "model"), "data": str(self.data / "train.jsonl")}
        return {**data, "arguments": arguments, "adapter": adapter, "resume": resume}

    def file(self, setup):
        path = self.folder / f"{self.output(setup).name}.json"
        path.write_text(json.dumps(setup))
        return path

    @staticmethod
    def output(setup):
        return Path(setup["arguments"]["output_dir"])


@pytest.fixture(params=[pytest.param(AxolotlRuns, marks=needs_axolotl), TRLRuns], ids=["Axolotl", "TRL"])
def runs(request, make_config, files, tmp_path):
    return request.param(make_config if request.param is AxolotlRuns else files, tmp_path)


def history(runs, setup):
    """What was logged in each step, from the last checkpoint."""
    state = json.loads((runs.output(setup) / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def same(found, expected, tolerance):
    names = ["step", "loss", "grad_norm", "cv_loss/cross_entropy", "cv_loss/lovasz", "cv_loss/lovasz/weight"]
    names += ["cv_loss/lovasz/sets", "cv_loss/lovasz/classes"]
    for one, other in zip(found, expected, strict=True):
        values = {name: other[name] for name in names}
        assert {name: one[name] for name in names} == pytest.approx(values, rel=tolerance, abs=1e-6)


@pytest.mark.hosts
@pytest.mark.matrix
@pytest.mark.parametrize("packing", ["padded", "packed"])
@pytest.mark.parametrize("adapter", ["full", "LoRA"])
def test_two_processes(runs, packing, adapter, start_processes, record_property):
    way = {"packing": packing, "adapter": adapter}
    for sharding in "1 process", "FSDP2":
        record_property("setup", {"host": runs.host, "sharding": sharding, **way})
    alone = runs.setup("alone", **way, processes=1)
    whole = runs.setup("whole", **way, processes=2)
    killed = runs.setup("killed", **way, processes=2)
    checkpoint = runs.output(killed) / "checkpoint-3"
    resumed = runs.setup("killed", **way, processes=2, resume=str(checkpoint))

    start_processes(2, runs.script, runs.file(killed), killed=True, CRASH_AFTER="5")
    assert checkpoint.is_dir()
    assert not (runs.output(killed) / f"checkpoint-{STEPS}").exists()
    for processes, setup in (2, resumed), (2, whole), (1, alone):
        start_processes(processes, runs.script, runs.file(setup))

    expected = history(runs, whole)
    assert [entry["step"] for entry in expected] == list(range(1, STEPS + 1))
    for entry in expected:
        weight = entry["cv_loss/lovasz/weight"]
        mix = 0.6 * entry["cv_loss/cross_entropy"] + weight * entry["cv_loss/lovasz"]
        assert entry["loss"] == pytest.approx(mix, abs=1e-4)
    same(history(runs, resumed), expected, tolerance=1e-5)
    if not (
        runs.host == "axolotl train" and packing == "packed"
    ):  # it packs other documents together for two processes
        same(history(runs, alone), expected, tolerance=1e-3)

    command = [sys.executable, "-c", GENERATE, str(runs.output(whole)), adapter]
    environment = {
        **os.environ,
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }  # through which the plugin guards the YAML of Axolotl
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.split()[-2:-1] == ["generated"], done.stderr[-3000:]


@needs_axolotl
@pytest.mark.hosts
def test_a_strangers_losses(guest, make_config, start_processes, tmp_path):
    """Those of tests/guest under Axolotl, fused and packed, in two processes."""
    runs = AxolotlRuns(make_config, tmp_path)
    mix = {"huberised": {"weight": 0.6, "tau": 5.0}, "fowlkes_mallows": 0.4}
    config = {**runs.setup("guest", "packed", "full", processes=2), "cv_loss": {**mix, "head": "fused"}}
    printed = start_processes(2, runs.script, runs.file(config), PYTHONPATH=guest)
    assert "0.6 huberised" in printed
    logged = history(runs, config)
    for entry in logged:
        mixed = 0.6 * entry["cv_loss/huberised"] + 0.4 * entry["cv_loss/fowlkes_mallows"]
        assert entry["loss"] == pytest.approx(mixed, abs=1e-4)
    assert logged[-1]["cv_loss/huberised"] < logged[0]["cv_loss/huberised"] - 0.1
