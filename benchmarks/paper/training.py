"""One training: its Axolotl config, which is the example config with a few keys changed, and `axolotl train` on it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from plans import Plan, Run, objective
from tasks import Data, Task

ENVIRONMENT = {"AXOLOTL_DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
# The paper puts LoRA on the head, too, for models of these types. A head tied to the embeddings cannot have it.
WITH_HEAD = ("llama", "stablelm")
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GPU_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
# Where things lie, which does not make another training of it.
PLACES = ("base_model", "datasets", "dataset_prepared_path", "output_dir")


def steps_of(plan: Plan, task: Task, data: Data) -> int:
    return plan.steps or task.recipe["num_epochs"] * math.ceil(len(data.train) / plan.batch)


def config_of(
    run: Run, plan: Plan, task: Task, data: Data, model: str, model_config: Any, tokens: dict[str, str], on_gpu: bool
) -> dict[str, Any]:
    """Everything but the places. Only `cv_loss` and the learning rate differ between the losses."""
    steps = steps_of(plan, task, data)
    config = {
        **task.recipe,
        "base_model": model,
        "special_tokens": tokens,
        "plugins": [*task.recipe["plugins"], "seeding.SeedPlugin"],
        "cv_loss": objective(run.loss),
        "datasets": [{"path": str(data.file), "ds_type": "json", "split": "train", "type": task.dataset["type"]}],
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "max_steps": steps,
        "warmup_steps": min(task.recipe["warmup_steps"], steps // 10),
        "micro_batch_size": plan.batch,
        "learning_rate": run.rate,
        "seed": run.seed,
        "save_strategy": "no",  # the adapter is saved at the end
        "logging_steps": max(1, steps // 20),
        "include_tokens_per_second": False,
    }
    for key in (
        "test_datasets",
        "val_set_size",
        "evals_per_epoch",
        "saves_per_epoch",
        "save_total_limit",
        "num_epochs",
    ):
        config.pop(key, None)
    if model_config.model_type in WITH_HEAD and not model_config.tie_word_embeddings:
        config.pop("lora_target_linear")
        config["lora_target_modules"] = [*MODULES, "lm_head"]
    if not on_gpu:
        config.update(bf16=False, fp16=False, tf32=False)
        config.update(dict.fromkeys(GPU_KERNELS, False))  # Axolotl turns them on by itself, on a CPU too
    return config


def weights_of(model: str) -> str:
    """Tells models apart whose folders have one name: a digest of config and weights. Of the hub: the name itself."""
    if not (folder := Path(model)).exists():
        return model
    digest = hashlib.sha256()
    for path in sorted(path for end in ("config.json", "*.safetensors", "*.bin") for path in folder.glob(end)):
        with path.open("rb") as file:
            while part := file.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()[:12]


def name_of(run: Run, config: dict[str, Any], weights: str, data: Data) -> str:
    """The same for the same training, on any machine; the folder of the run is called so."""
    known = {key: value for key, value in config.items() if key not in PLACES}
    text = json.dumps([weights, data.digest, known], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{run.dataset}-{run.loss.replace(':', '-')}-seed{run.seed}-lr{run.rate:g}-{digest}"


def train(config: dict[str, Any], folder: Path, on_step: Callable[[int], None]) -> tuple[Path, float]:
    """The folder of the adapter, and the seconds of the training; a training that has ended is not repeated."""
    done, adapter = folder / "trained.json", folder / "adapter"
    if done.exists():
        return adapter, json.loads(done.read_text())["seconds"]
    # A folder for this attempt alone, also for the rows as Axolotl prepares them: after a kill it may still be writing
    # to the last one, or have left it half written.
    attempt = folder / f"attempt-{os.getpid()}"
    for left in [adapter, *folder.glob("attempt-*")]:
        shutil.rmtree(left, ignore_errors=True)
    prepared = attempt / "prepared"
    prepared.mkdir(parents=True)
    path, log = folder / "config.yaml", folder / "train.log"
    places = {"output_dir": str(attempt), "dataset_prepared_path": str(prepared)}
    path.write_text(yaml.safe_dump({**config, **places}, sort_keys=False))
    start = time.monotonic()
    _axolotl(path, log, config["max_steps"], on_step)
    shutil.rmtree(prepared)
    attempt.rename(adapter)
    seconds = time.monotonic() - start
    done.write_text(json.dumps({"seconds": seconds}))
    return adapter, seconds


def _axolotl(config: Path, log: Path, steps: int, on_step: Callable[[int], None]) -> None:
    program = shutil.which("axolotl", path=str(Path(sys.executable).parent)) or shutil.which("axolotl")
    if program is None:
        sys.exit("axolotl is not installed: pip install 'axolotl-cvloss[axolotl]'")
    command = [program, "train", str(config), "--launcher", "python"]
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}  # for seeding.py
    with (
        log.open("w") as out,
        subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process,
    ):
        try:
            while process.poll() is None:
                time.sleep(0.5)
                if found := re.findall(rf"\b(\d+)/{steps} \[", log.read_text(errors="replace")[-2000:]):
                    on_step(int(found[-1]))
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        tail = log.read_text(errors="replace").replace("\r", "\n").splitlines()[-40:]
        sys.exit("\n".join([*tail, f"axolotl train ended with code {process.returncode}; the end of {log} is above"]))
