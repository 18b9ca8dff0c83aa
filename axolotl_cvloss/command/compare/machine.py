"""What a run is made on and with."""

import contextlib
import datetime
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("axolotl-cvloss", "torch", "transformers", "trl", "axolotl", "peft")


def gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name; asked without torch, whose CUDA the children shall have to themselves."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in given.split(",") if name]
    return [str(place) for place, line in enumerate(_listed()) if line.startswith("GPU")]


def _listed() -> list[str]:
    """A line a GPU, where there is NVIDIA's tool."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--list-gpus"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()


def about() -> dict[str, Any]:
    cpu = re.search(r"model name\s*: (.+)", _text("/proc/cpuinfo"))
    machine = {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "system": platform.system(),
        "python": platform.python_version(),
    }
    if gpus():
        machine["gpus"] = [re.sub(r" \(UUID.*", "", line) for line in _listed()]
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"date": date, "machine": machine, "versions": versions}


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
