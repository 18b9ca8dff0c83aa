"""From the lines of the runs to the table and the headline."""

import pytest
from experiment import FOLDER

from axolotl_cvloss.command.compare.plan import choose_rate
from axolotl_cvloss.command.compare.running import read_lines


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


def test_the_committed_table_is_that_of_the_committed_lines():
    import summary

    folder = FOLDER / "results"
    assert (folder / "table.md").read_text() == summary.markdown(read_lines(folder / "runs.jsonl"))


def test_the_committed_rates_follow_the_rule():
    """That of `cvloss compare`, by NLL: these lines have no scores of examples, and all rates were in the noise."""
    import summary

    lines = read_lines(FOLDER / "results" / "runs.jsonl")
    found = summary.settings(lines)
    for setting in found:
        about = setting.about
        for loss in setting.losses:
            swept = [
                {"rate": line["lr"], "seed": line["seed"], "nll": line["validation"]["nll"]}
                for line in lines
                if (line["stage"], line["loss"]) == ("sweep", loss)
                and all(line[name] == about[name] for name in summary.SETTING)
            ]
            assert set(setting.values(loss, lambda line: line["lr"])) == {choose_rate(swept)}
    assert found
