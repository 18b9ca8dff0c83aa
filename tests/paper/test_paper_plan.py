"""What the experiment trains, in which order, and which rate it takes."""

import math
import sys

import pytest
from experiment import make_plan


def test_objectives():
    import plans

    from axolotl_cvloss.config import CVLossConfig

    for loss in plans.LOSSES:
        terms = CVLossConfig.parse(plans.objective(loss)).dump()["terms"]
        assert terms[0]["scope"] == "sequence"
        assert sum(term["weight"] for term in terms) == pytest.approx(1)
    reference = plans.objective("generalized_dice:reference")
    assert reference == {**plans.objective("generalized_dice"), "reference": True}


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [(1000, 1e-2), (20, 1e-4)],
    ids=["exact match tells", "exact match does not tell: the lowest NLL"],
)
def test_the_rate_is_chosen_by_exact_match_unless_it_is_noise(rows, chosen):
    import plans

    plan = make_plan(rates=(1e-4, 1e-3, 1e-2), losses=("lovasz",))
    runs = plans.sweep(plan, "gsm8k")
    assert {run.seed for run in runs} == {0}
    found = [(0.1, 2.0), (0.2, 3.0), (0.19, 2.5)]
    lines = {
        run: {"validation": {"examples": rows, "exact_match": exact, "nll": nll}}
        for run, (exact, nll) in zip(runs, found, strict=True)
    }
    assert plans.best_rate(plan, lines, "gsm8k", "lovasz") == chosen
    lines[runs[0]]["validation"]["nll"] = math.nan  # this one diverged
    assert plans.best_rate(plan, lines, "gsm8k", "lovasz") == 1e-2
    assert plans.sweep(make_plan(rates=(1e-4,)), "gsm8k") == []


def test_the_clock_counts_what_is_left():
    import plans
    import run

    plan = make_plan(datasets=("gsm8k", "mathqa"), losses=("cross_entropy", "lovasz"), rates=(1e-4, 1e-3))
    clock = run.Clock(plan)
    # Untrained, 4 runs of the sweep, 2 final ones that it has trained, and 4 of the other seeds; twice.
    assert clock.todo.total() == 22
    assert clock.left() == ""
    clock.count(("sweep", "gsm8k"), 600.0)
    assert clock.left() == ", about 3.5 hours left"  # 21 of 10 minutes
    clock.count(("untrained", "gsm8k"), 0.0)
    clock.count(("untrained", "mathqa"), None)  # found among the results
    for name in "gsm8k", "mathqa":
        for one in plans.finals(plan, name, dict.fromkeys(plan.losses, 1e-4)):
            clock.count((run.stage_of(plan, "final", one), name), 60.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quick"], "--model is needed"),
        ([], "one of the arguments"),
        (["--quick", "--model=m", "--losses", "lovas"], "lovasz"),
        (["--quick", "--model=m", "--datasets", "gsm"], "invalid choice"),
        (["--quick", "--model=m", "--valid", "0"], "0 is less than 1"),
        (["--quick", "--model=no/such/folder"], "--model no/such/folder: there is no such folder"),
        (["--quick", "--model=/nowhere"], "--model /nowhere: there is no such folder"),
    ],
)
def test_wrong_options(options, message, monkeypatch, capsys):
    import run

    monkeypatch.setattr(sys, "argv", ["run.py", *options])
    with pytest.raises((SystemExit, ValueError)) as caught:
        run.main()
    assert message in str(caught.value) + capsys.readouterr().err


def test_missing_rows_are_told_without_a_traceback(request, tmp_path, monkeypatch):
    import run  # before the tiny model, whose demo has a module of that name, too

    tiny = request.getfixturevalue("tiny")
    empty = tmp_path / "empty"
    empty.mkdir()
    options = f"--quick --model {tiny.folder} --data {empty} --work {tmp_path} --results {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["run.py", *options.split()])
    with pytest.raises(SystemExit, match=r"no gsm8k_train\.jsonl"):
        run.main()


def test_options_change_the_plan(monkeypatch):
    import run

    options = "--full --model m --seeds 4 5 --rates 1e-3 --train 9 --losses lovasz dice --datasets mathqa"
    monkeypatch.setattr(sys, "argv", ["run.py", *options.split()])
    plan = run.plan_of(run.arguments())
    assert (plan.seeds, plan.rates, plan.train, plan.losses) == ((4, 5), (1e-3,), 9, ("lovasz", "dice"))
    assert (plan.datasets, plan.batch) == (("mathqa",), 8)
