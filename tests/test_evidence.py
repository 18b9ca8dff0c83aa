"""The published lines: tables and page are what they say, and they hold what the page claims of them."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from axolotl_cvloss.command.compare import report
from axolotl_cvloss.command.compare.running import read_lines
from axolotl_cvloss.losses.registry import available_losses
from axolotl_cvloss.objective.config import CVLossConfig

EVIDENCE = Path(__file__).parent.parent / "benchmarks" / "evidence"
FOLDERS = sorted(path.parent for path in EVIDENCE.glob("results/*/runs.jsonl"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_table_and_figure_are_those_of_the_lines(folder, tmp_path):
    lines = read_lines(folder / "runs.jsonl")
    assert (folder / "table.md").read_text() == report.summarize(lines, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_lines_are_of_one_fair_comparison(folder):
    lines = read_lines(folder / "runs.jsonl")
    assert len({(line["setting"], line["steps"], line["score"]) for line in lines}) == 1
    runs = [json.dumps([line[key] for key in ("stage", "objective", "rate", "seed")]) for line in lines]
    assert len(runs) == len(set(runs))
    seeds = {stage: {line["seed"] for line in lines if line["stage"] == stage} for stage in ("choice", "final")}
    assert not seeds["choice"] & seeds["final"]  # the final runs are fresh
    rates = {line["objective"]: set() for line in lines}
    for line in lines:
        if line["stage"] == "choice":
            rates[line["objective"]].add(line["rate"])
    assert len({frozenset(found) for found in rates.values()}) == 1  # the same rates for all


def test_the_page_is_written_from_the_lines(monkeypatch):
    monkeypatch.syspath_prepend(str(EVIDENCE))
    import page

    assert page.PAGE.read_text() == page.page()
    sys.modules.pop("page")


def test_the_screen_has_every_loss_that_next_token_data_can_train():
    objectives = yaml.safe_load((EVIDENCE / "screen.yaml").read_text())
    terms = [CVLossConfig.parse(value).terms for value in objectives.values()]
    assert all(sum(term.weight for term in both) == pytest.approx(1) for both in terms)
    screened = {(term.loss, term.weight) for both in terms for term in both[1:]}
    left_out = {"anchored", "prior_weighted", "importance_weighted", "unlikelihood"}
    wanted = {name for name, loss in available_losses().items() if loss.kind.name != "number"} - left_out
    assert {(name, weight) for name in wanted for weight in (0.2, 0.4)} <= screened
    by_batch = {both[1].loss for both in terms if both[1].per == "batch"}
    assert by_batch >= {n for n in wanted if available_losses()[n].kind.name in ("region", "ranking")}
