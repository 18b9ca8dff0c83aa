"""The pages for people: what they say of families, hooks and losses is so, and what they show runs in full."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import yaml
from helpers import temporary_losses

from axolotl_cvloss import available_losses, register_loss
from axolotl_cvloss.engine.families import FAMILIES
from axolotl_cvloss.losses import hookspecs
from axolotl_cvloss.losses.registry import plugin_manager
from axolotl_cvloss.objective.config import ConfigError, CVLossConfig

DOCS = Path(__file__).parents[1] / "docs"
TROUBLE = DOCS / "troubleshooting.md"
OWN, WHICH = DOCS / "write-your-own-loss.md", DOCS / "which-loss.md"


def code(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_table_of_families():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.*) \|$", OWN.read_text(), re.MULTILINE)
    assert rows == [(family, *item) for family, given in FAMILIES.items() for item in given.statistics.items()]


def test_the_page_runs_from_top_to_bottom():
    text, names = OWN.read_text(), {"__name__": "page"}
    with temporary_losses():
        for part in code(text, "python"):
            exec(part, names)  # the last one checks a gradient and a value
        names["cvloss_register_losses"](register_loss)
        assert {"shortfall", "geometric", "squared"} <= available_losses().keys()
        assert CVLossConfig.parse({"shortfall": {"gamma": 3.0}}).dump()["terms"][0]["gamma"] == 3
        with pytest.raises(ConfigError, match="gamma"):
            CVLossConfig.parse({"shortfall": {"gamma": 5}})


def test_losses_named_on_the_page_exist():
    table = [line for line in WHICH.read_text().splitlines() if line.startswith("| ")][1:]
    named = {name for line in table for name in re.findall(r"`(\w+)`", line)}
    assert len(named) > 5
    assert named <= available_losses().keys()


def test_every_hook_has_the_signature_that_it_documents():
    hooks = {name: f for name, f in inspect.getmembers(hookspecs, inspect.isfunction) if name.startswith("cvloss_")}
    assert set(hooks) == {name for name in vars(plugin_manager().hook) if name.startswith("cvloss_")}
    for name, function in hooks.items():
        (shown,) = re.findall(rf"def {name}\((.*)\):", inspect.getdoc(function))
        assert shown == ", ".join(inspect.signature(function).parameters)


def test_register_is_typed_as_what_it_is():
    def arguments(function):
        found = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in found if p.name != "self"]

    assert arguments(hookspecs.Register.__call__) == arguments(register_loss)


def test_the_example_of_the_hook_works():
    (source,) = re.findall(
        r"``my_losses.py``::\n\n(.*?)\nand ``", inspect.getdoc(hookspecs.cvloss_register_losses), re.S
    )
    names = {}
    exec(inspect.cleandoc(source), names)
    with temporary_losses():
        names["cvloss_register_losses"](register_loss)
        assert CVLossConfig.parse({"shortfall": {"scale": 2.0}})


# Messages of hosts and launchers, which no code here prints.
OF_HOSTS = {
    "error: unrecognized arguments: --cv-loss...",
    "Torch not compiled with CUDA enabled",
    "not enough values to unpack (expected 2, got 1)",
}


def printed():
    """All texts of the package, what is formatted into them left out but for the name of the key."""
    for path in (DOCS.parent / "axolotl_cvloss").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                names = [
                    getattr(part.value, "id", "") if isinstance(part, ast.FormattedValue) else part.value
                    for part in node.values
                ]
                yield "".join("cv_loss" if name == "KEY" else name for name in names)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_on_the_page_of_troubles_are_printed():
    texts = list(printed())
    headings = re.findall(r"^### `([^`]* [^`]*)`", TROUBLE.read_text(), re.MULTILINE)
    assert len(headings) > 8
    for heading in set(headings) - OF_HOSTS:
        parts = [part.strip() for part in heading.split("...")]
        assert any(all(part in text for part in parts) for text in texts), heading


def test_every_key_of_a_yaml_on_the_page_of_troubles_is_one_of_axolotl():
    schema = pytest.importorskip("axolotl.utils.schemas.config")
    for part in code(TROUBLE.read_text(), "yaml"):
        assert yaml.safe_load(part).keys() <= schema.AxolotlInputConfig.model_fields.keys()
