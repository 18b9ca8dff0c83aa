"""From the lines of the runs to the table and the headline."""

import json
import sys

import pytest
from experiment import FOLDER, make_plan


def line(loss, seed, exact, nll=1.0, valid=None, stage="final", **more):
    return {
        "stage": stage,
        "run": f"{loss}-{seed}",
        "model": "small",
        "dataset": "openbookqa",
        "train_examples": 100,
        "steps": 50,
        "batch": 2,
        "validation_examples": 20,
        "test_examples": 40,
        "new_tokens": 4,
        "rates": "0.001",
        "sweep_seed": None,
        "device": "cpu",
        "inputs": "digest",
        "loss": loss,
        "seed": seed,
        "lr": 1e-3,
        "validation": {"exact_match": exact if valid is None else valid, "nll": nll},
        "test": {"exact_match": exact, "nll": nll},
        "exact_match": exact,
        "nll": nll,
        **more,
    }


def results():
    """Lovasz is the best on the test set, focal on the validation rows."""
    exact = {
        "cross_entropy": (0.20, 0.30, 0.25),
        "focal": (0.25, 0.30, 0.35),
        "generalized_dice": (0.20, 0.20, 0.20),
        "self_adjusting_dice": (0.25, 0.35, 0.30),
        "lovasz": (0.30, 0.35, 0.40),
    }
    lines = [line(None, None, 0.1, stage="untrained")]
    for loss, values in exact.items():
        lines += [line(loss, seed, value, valid=0.5 if loss == "focal" else 0.3) for seed, value in enumerate(values)]
    return lines


def test_paired_test():
    import summary

    (setting,) = summary.settings(results())
    assert setting.differences("lovasz") == pytest.approx([0.10, 0.05, 0.15])
    # By hand: mean 0.1, standard error 0.05 / sqrt(3), t = 3.464 at 2 degrees of freedom: p = 1 - t / sqrt(t^2 + 2).
    assert summary.paired_p(setting.differences("lovasz")) == pytest.approx(1 - 3.4641 / (14**0.5), abs=1e-4)
    assert summary.paired_p([0.1]) is None
    assert summary.paired_p([0.0, 0.0]) == 1
    assert summary.paired_p([0.5, 0.5]) is None
    assert summary.paired_p([4 / 80 - 1 / 80, 5 / 80 - 2 / 80, 3 / 80]) is None  # equal but for rounding
    assert summary.mean_and_error([0.2, 0.4]) == pytest.approx((0.3, 0.1))


def test_headline_as_in_the_paper_and_the_honest_one():
    import summary

    (setting,) = summary.settings(results())
    assert setting.headline() == {"test": "lovasz", "validation": "focal"}
    assert setting.gain("lovasz") == pytest.approx(0.4)
    assert setting.gain("focal") == pytest.approx(0.2)
    text = summary.markdown(results())
    assert "| openbookqa, small | lovasz: +40% | focal: +20% |" in text
    other = [{**line, "dataset": "gsm8k"} for line in results()]
    assert "| mean where it is defined | +40% | +20% |" in summary.markdown(results() + other)
    assert "| lovasz | 0.001 | 3 | 30.0 ± 0.0 | 35.0 ± 2.9 | +10.0 ± 2.9 | 0.07 | 1.000 ± 0.000 |" in text
    assert "| untrained |  |  | 10.0 | 10.0 |" in text


def test_there_is_no_headline_before_all_four_losses_have_every_seed():
    import summary

    without = [line for line in results() if (line["loss"], line["seed"]) != ("generalized_dice", 2)]
    text = summary.markdown(without)
    assert "| generalized_dice | 0.001 | 2 |" in text
    assert "Relative gain" not in text


def test_a_gain_over_nothing_is_not_defined():
    import summary

    lines = [{**line, "exact_match": 0.0} if line["loss"] == "cross_entropy" else line for line in results()]
    assert "| openbookqa, small | lovasz: not defined | focal: not defined |" in summary.markdown(lines)


def test_settings_are_not_mixed():
    import summary

    longer = [{**line, "steps": 500} for line in results()]
    assert len(summary.settings(results() + longer)) == 2
    for other in {"inputs": "another model in a folder of this name"}, {"sweep_seed": 3}, {"device": "cuda"}:
        assert len(summary.settings(results() + [{**line, **other} for line in results()])) == 2
    assert summary.markdown([]) == "No finished runs yet.\n"


def test_a_torn_line_is_left_out_and_the_next_one_is_whole(tmp_path):
    import summary

    path = tmp_path / "runs.jsonl"
    first, second = results()[:2]
    summary.append(path, first)
    with path.open("a") as file:
        file.write(json.dumps(second)[:40])
    assert summary.read(path) == [first]
    summary.append(path, second)
    assert summary.read(path) == [first, second]


def test_report_from_the_lines_alone(tmp_path, monkeypatch, capsys):
    import run
    import summary

    for one in results():
        summary.append(tmp_path / "runs.jsonl", one)
    monkeypatch.setattr(sys, "argv", ["run.py", "--report", f"--results={tmp_path}"])
    run.main()
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "exact_match.png").stat().st_size > 5000


def test_the_committed_table_is_that_of_the_committed_lines():
    import summary

    folder = FOLDER / "results"
    assert (folder / "table.md").read_text() == summary.markdown(summary.read(folder / "runs.jsonl"))


def test_the_committed_rates_follow_the_rule():
    import plans
    import summary

    lines = summary.read(FOLDER / "results" / "runs.jsonl")
    found = summary.settings(lines)
    for setting in found:
        about = setting.about
        swept = {
            plans.Run(line["dataset"], line["loss"], line["seed"], line["lr"]): line
            for line in lines
            if line["stage"] == "sweep" and all(line[name] == about[name] for name in summary.SETTING)
        }
        plan = make_plan(rates=tuple(map(float, about["rates"].split())))
        for loss in setting.losses:
            rate = plans.best_rate(plan, swept, about["dataset"], loss)
            assert set(setting.values(loss, lambda line: line["lr"])) == {rate}
    assert found
