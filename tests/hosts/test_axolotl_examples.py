"""What `make test-configs` does to one example config, and the table that it wrote of all of them."""

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("axolotl")

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "compatibility" / "axolotl-configs.md"
CUT = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "tools")])
    import axolotl_configs

    return axolotl_configs


@pytest.mark.parametrize(
    ("keys", "result", "why", "wrong"),
    [
        ({}, "accepted", "", False),
        ({"plugins": [CUT], "bf16": True, "chunked_cross_entropy": False}, "taken over", "cut_cross_entropy", False),
        ({"rl": "dpo"}, "refused", "cannot be used with rl", False),
        ({"tensor_parallel_size": 2}, "refused", "cannot be used with tensor_parallel_size", False),
        ({"cv_los": "dice"}, "refused", "unknown key cv_los", True),
        ({"tokens": "a"}, "invalid without cv_loss", "tokens Input should be a valid list", False),
    ],
)
def test_one_config(keys, result, why, wrong, make_config, manager, tool):
    row = tool.row("a.yaml", make_config(plugins=None, cv_loss=None) | keys)
    assert row[:2] == ("a.yaml", result)
    assert why in row[2]
    assert tool.wrong(row) == wrong


def test_the_table(tool):
    rows = re.findall(r"^\| (\S+) \| ([\w ]+) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) > 250
    assert not [row for row in rows if tool.wrong(row)]
    assert sum(result in ("accepted", "taken over") for _, result, _ in rows) >= 220
