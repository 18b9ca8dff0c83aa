"""What torch calls when it is imported: it harms nobody, and stays until it is needed."""

import subprocess
import sys

import pytest

from axolotl_cvloss.hosts.axolotl_guard import watch

# A module in the place of Axolotl's, as its own takes long to import.
CONFIG = "def validate_config(cfg):\n    return {}\n"
LOOKED_FOR = """
import sys
from importlib.util import find_spec
from axolotl_cvloss.hosts.axolotl_guard import watch
assert "torch" not in sys.modules
watch()
spec = find_spec("axolotl.utils.config")  # as somebody does who only wants to know
assert spec.origin.endswith("config.py") and find_spec("axolotl.utils.nothing") is None
assert spec.loader.get_source("axolotl.utils.config").startswith("def validate_config")
from axolotl.utils.config import validate_config
try:
    validate_config({"cv_loss": "lovasz"})
except ValueError as error:
    print(error)
"""


def run(program, folder):
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def axolotl(tmp_path):
    package = tmp_path / "axolotl" / "utils"
    package.mkdir(parents=True)
    for folder in package.parent, package:
        (folder / "__init__.py").touch()
    (package / "config.py").write_text(CONFIG)
    return package


def test_who_only_looks_for_the_module_does_not_take_the_check_away(axolotl, tmp_path):
    done = run(LOOKED_FOR, tmp_path)
    assert "cv_loss: the config has this key, but its plugin is not loaded" in done.stdout, done.stderr


def test_another_axolotl_is_left_alone(axolotl, tmp_path):
    (axolotl / "config.py").write_text("")
    done = run("from axolotl_cvloss.hosts.axolotl_guard import watch; watch(); import axolotl.utils.config", tmp_path)
    assert done.returncode == 0, done.stderr


def test_nothing_in_it_makes_the_import_of_torch_fail(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", None)  # whatever has happened to the interpreter
    watch()


def test_it_imports_nothing_that_could_be_missing(tmp_path):
    """No dependency of ours, though it lies in the package."""
    program = """
import sys
before = set(sys.modules)
from axolotl_cvloss.hosts.axolotl_guard import watch
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names)))
"""
    assert run(program, tmp_path).stdout.strip() == "['axolotl_cvloss']"
