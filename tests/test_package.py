"""The package as people import it: its names, and what an import costs."""

import ast
import json
import statistics
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import axolotl_cvloss

HOSTS = ("axolotl", "trl", "transformers", "accelerate", "peft")


def new_process(script):
    command = [sys.executable, "-c", script]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


IMPORT = """
import json, sys, time
start = time.perf_counter()
import torch
torch_seconds = time.perf_counter() - start
start = time.perf_counter()
from axolotl_cvloss import Objective, available_losses, hookimpl, install, register_loss, uninstall
available_losses()
print(json.dumps([sorted(sys.modules), torch_seconds, time.perf_counter() - start]))
"""


def test_importing_the_package_imports_nothing_else():
    modules = new_process("import sys, axolotl_cvloss; print(*sys.modules)").split()
    assert "axolotl_cvloss" in modules
    assert not {"torch", "pydantic", "pluggy", *HOSTS} & set(modules)


def test_the_core_imports_no_host_and_takes_no_longer_than_torch():
    modules, torch, core = zip(*(json.loads(new_process(IMPORT)) for _ in range(3)), strict=True)
    assert not set(HOSTS) & set(modules[0])
    torch, core = statistics.median(torch), statistics.median(core)
    assert torch + core < 1.5 * torch + 0.5


def test_the_public_names():
    assert dir(axolotl_cvloss) == axolotl_cvloss.__all__
    assert set(axolotl_cvloss.__all__) == {"__version__", *axolotl_cvloss._HOME}
    core = [name for name, home in axolotl_cvloss._HOME.items() if not home.startswith("hosts")]
    for name in core:
        value = getattr(axolotl_cvloss, name)
        assert value is getattr(import_module(f"axolotl_cvloss.{axolotl_cvloss._HOME[name]}"), name)
    assert {"Objective", "install", "uninstall", "register_loss", "available_losses", "hookimpl"} <= set(core)


def test_type_checkers_are_told_the_public_names():
    """Lazy imports are Any to them, so the names are imported a second time where only they look."""
    body = ast.parse(Path(axolotl_cvloss.__file__).read_text(encoding="utf-8")).body
    (block,) = (node for node in body if isinstance(node, ast.If))
    told = {alias.name: line.module for line in block.body for alias in line.names}
    assert told == axolotl_cvloss._HOME


def test_no_module_takes_the_place_of_a_public_name():
    # Importing a submodule sets its name in the package, over whatever stands there.
    clashes = [name for name, home in axolotl_cvloss._HOME.items() if home.split(".")[-1] == name]
    assert not clashes


def test_the_names_of_hosts():
    pytest.importorskip("axolotl")
    from axolotl.integrations.base import BasePlugin

    assert issubclass(axolotl_cvloss.CVLossPlugin, BasePlugin)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'axolotl_cvloss' has no attribute 'Objectives'"):
        _ = axolotl_cvloss.Objectives


def test_a_plugin_whose_host_is_missing_stops_the_run():
    # Axolotl prints an ImportError of a plugin and trains on without it, so it must be another error.
    script = """
import sys
sys.modules["axolotl.integrations.base"] = None
import axolotl_cvloss
try:
    axolotl_cvloss.CVLossPlugin
except RuntimeError as error:
    print(error)
"""
    assert "axolotl_cvloss.CVLossPlugin cannot be loaded, so the run stops here" in new_process(script)


def test_the_version_is_that_of_the_installed_package():
    from importlib.metadata import version

    assert version("axolotl-cvloss") == axolotl_cvloss.__version__
