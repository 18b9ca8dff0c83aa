"""Starting processes, and the table of setups that the tests ran."""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
DEEPSPEED = HERE.parents[1] / ".deepspeed"
COLUMNS = ("host", "sharding", "packing", "adapter")
PACKAGES = ("axolotl", "transformers", "trl", "accelerate", "peft", "torch")


def _load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The tiny model, its data and its Axolotl config are those of tests/hosts.
hosts = _load("hosts_fixtures", HERE.parent / "hosts" / "conftest.py")
compatibility = _load("compatibility", HERE.parents[1] / "tools" / "compatibility.py")
tokenizer, make_model, problems = hosts.tokenizer, hosts.make_model, hosts.problems
files, make_config, guest = hosts.files, hosts.make_config, hosts.guest


def torchrun(processes, script, *arguments, folder, killed=False, **variables):
    """The real launcher: what was printed. Fails with it where a process does, or where none does that is to be killed.

    ``variables`` are those of the environment.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    paths = [str(HERE), str(HERE.parent), variables.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]
    ours = {
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    environment = {**os.environ, **ours, **variables}
    done = subprocess.run(
        [str(part) for part in [*launcher, HERE / script, *arguments]],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800,
        check=False,
    )
    assert (done.returncode != 0) == killed, done.stdout[-20000:]
    assert not killed or "SIGKILL" in done.stdout, done.stdout[-20000:]
    return done.stdout


@pytest.fixture
def start_processes(tmp_path):
    """Start processes on a script of this folder; sharding by DeepSpeed ("ZeRO-2", "ZeRO-3") needs to be told."""

    def start(processes, script, *arguments, sharding="none", **options):
        if sharding.startswith("ZeRO"):
            if not DEEPSPEED.exists():
                pytest.skip("DeepSpeed is not installed: make .deepspeed")
            # Told to use CPUs, accelerate would pass DeepSpeed by.
            ours = {"PYTHONPATH": str(DEEPSPEED), "DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}
            options = {**ours, **options}
        return torchrun(processes, script, *arguments, folder=tmp_path, **options)

    return start


@pytest.fixture
def steps_of(start_processes, tmp_path):
    """Gradients and losses of many cases, of one launch."""

    def start(cases, processes):
        files = tmp_path / "cases.json", tmp_path / "found.pt"
        files[0].write_text(json.dumps(cases))
        start_processes(processes, "one_step.py", *files, sharding=cases[0]["sharding"])
        return torch.load(files[1])

    return start


def pytest_terminal_summary(terminalreporter, config):
    """What ran, as a table; into the file that COMPATIBILITY names, too, which the table in docs/ is made from."""
    rows = []
    for outcome in ("skipped", "passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            setups = [value for name, value in getattr(report, "user_properties", []) if name == "setup"]
            rows += [{**setup, "result": outcome} for setup in setups]
    if not rows:
        return
    terminalreporter.section("setups")
    columns = [*COLUMNS, "result"]
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in columns}
    for row in [{name: name for name in columns}, *rows]:
        terminalreporter.write_line("  ".join(str(row[name]).ljust(widths[name]) for name in columns))
    if path := os.environ.get("COMPATIBILITY"):
        versions = {name: version(name) for name in PACKAGES if importlib.util.find_spec(name)}
        before = json.loads(Path(path).read_text()) if Path(path).exists() else {}
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text(json.dumps(compatibility.merged(before, versions, rows, COLUMNS), indent=1) + "\n")
