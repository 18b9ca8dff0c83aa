"""plugin.yaml says what the code says, and travels in the wheel."""

import re
import subprocess
import sys
import zipfile
from importlib import import_module, metadata
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
INSIDE = {"axolotl_cvloss/plugin.yaml", "axolotl_cvloss/py.typed", "axolotl_cvloss/__init__.py"}


@pytest.fixture(scope="module")
def written():
    return yaml.safe_load((REPOSITORY / "plugin.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tool():
    pytest.importorskip("axolotl")
    spec = spec_from_file_location("manifest", REPOSITORY / "tools" / "manifest.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_what_the_code_says(written, tool):
    said = {key: value for key, value in written.items() if key != "tested_with"}
    assert said == tool.manifest(), "run python tools/manifest.py"


def test_it_names_the_tested_hosts(written, tool):
    tested = written["tested_with"]
    assert tuple(tested) == tool.HOSTS
    for host, version in tested.items():
        assert re.fullmatch(r"\d+\.\d+\.\d+", version), host


def test_the_tested_hosts_are_those_that_the_package_asks_for(written):
    requirements = pytest.importorskip("packaging.requirements")
    for text in metadata.requires("axolotl-cvloss"):
        requirement = requirements.Requirement(text)
        if (version := written["tested_with"].get(requirement.name)) is not None:
            assert requirement.specifier.contains(version), text


def test_its_entry_points_exist(written, tool):
    plugin, args = (written["entry_points"][name].rsplit(".", 1) for name in ("axolotl_plugin", "axolotl_args"))
    plugin, args = (getattr(import_module(module), name) for module, name in (plugin, args))
    assert f"{args.__module__}.{args.__name__}" == plugin().get_input_args()
    assert written["config"]["key"] in args.model_fields


def test_it_names_every_field_with_a_description(written):
    fields = written["config"]["fields"]
    for field in [*fields["terms"].values(), fields["head"], fields["reference"]]:
        assert field["description"].endswith(".")


def test_the_build_takes_it_along():
    tomllib = pytest.importorskip("tomllib")
    build = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert build["packages"] == ["axolotl_cvloss"]
    assert build["force-include"] == {"plugin.yaml": "axolotl_cvloss/plugin.yaml"}
    assert (REPOSITORY / "axolotl_cvloss" / "py.typed").exists()


@pytest.mark.skipif(find_spec("hatchling") is None, reason="hatchling, which builds the wheel, is not installed")
def test_the_wheel_holds_it(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=60)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) >= INSIDE
        manifest = archive.read("axolotl_cvloss/plugin.yaml")
    assert manifest == (REPOSITORY / "plugin.yaml").read_bytes()
