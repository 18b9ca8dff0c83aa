"""Statistics, choice and report of `cvloss compare` against cases made by hand. tests/hosts has the real runs."""

import math
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from scipy import stats

from axolotl_cvloss import available_losses
from axolotl_cvloss.command.compare import children, command, plan, report, running
from axolotl_cvloss.command.compare.statistics import bootstrap, holm, paired, verdict

TOLD = """
import atexit, os, subprocess, sys, time


def main():
    if sys.argv[2] == "wait":
        print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"]).pid, flush=True)
        time.sleep(99)
    atexit.register(print, "gone")
    hook = sys.excepthook
    sys.excepthook = lambda *error: (hook(*error), sys.stderr.flush(), print("hooked", flush=True))
    if sys.argv[2] == "an error":
        1 / 0
    where = sys.modules["__main__"].__name__
    print(sys.argv[1:], os.environ["CVLOSS_TOLD"], where, repr(os.read(0, 1).decode()))
    sys.exit(int(sys.argv[2]))


if __name__ == "__main__":
    main()
"""


def test_paired_t_by_hand():
    """1, 2, 3: mean 2, standard error 1/sqrt(3), t = 2 sqrt(3) with 2 degrees of freedom: p = 1 - t/sqrt(t^2 + 2)."""
    found = paired([1.0, 2.0, 3.0])
    t = 2 * math.sqrt(3)
    assert (found.mean, found.error) == (2, pytest.approx(1 / math.sqrt(3)))
    assert found.p == pytest.approx(1 - t / math.sqrt(t**2 + 2))
    reach = 4.302652729911275 / math.sqrt(3)  # the 97.5% point for 2 degrees of freedom, from a printed table
    assert (found.low, found.high) == (pytest.approx(2 - reach), pytest.approx(2 + reach))


def test_what_has_no_t_test():
    assert paired([0.3]).p is None
    assert paired([0.1 + 0.2, 0.3, 0.3]).p is None  # without spread, but for rounding
    assert paired([0.0, 0.0]).p == 1
    assert paired([0.0, math.nan, 1.0]).p is None  # after a training that diverged


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == [pytest.approx(0.03), pytest.approx(0.06), pytest.approx(0.06)]
    assert holm([0.6, None, 0.7]) == [1, None, 1]


def test_bootstrap_over_examples_alone_and_over_both():
    """Two seeds, of which one gains on every example and the other loses: fixed, the examples decide nothing; drawn
    again, the seeds may both be the one or the other."""
    table = [[1.0] * 50, [-1.0] * 50]
    assert bootstrap(table, over_seeds=False) == (0, 0)
    assert bootstrap(table, over_seeds=True) == (pytest.approx(-1), pytest.approx(1))


def test_bootstrap_is_as_wide_as_the_binomial():
    """One seed, 30 of 100 examples gained: the interval is that of the binomial, within a step of 1/100."""
    low, high = bootstrap([[1.0] * 30 + [0.0] * 70], over_seeds=False)
    assert low == pytest.approx(stats.binom(100, 0.3).ppf(0.025) / 100, abs=0.0101)
    assert high == pytest.approx(stats.binom(100, 0.3).ppf(0.975) / 100, abs=0.0101)


def test_verdict_needs_both():
    assert verdict(0.01, (0.1, 0.2), 0.15) == "better"
    assert verdict(0.01, (-0.2, -0.1), -0.15) == "worse"
    assert verdict(0.01, (-0.1, 0.2), 0.05) == "not decided"
    assert verdict(0.06, (0.1, 0.2), 0.15) == "not decided"
    assert verdict(None, None, 0.15) == "not decided"


def choice(rate, examples, nll, seed=0):
    return {"rate": rate, "seed": seed, "examples": examples, "nll": nll}


@pytest.mark.parametrize(
    ("lines", "rate"),
    [
        # 70 points behind on 100 rows is no luck: the score decides, whatever the NLL says.
        ([choice(1e-3, "1" * 20 + "0" * 80, 0.1), choice(3e-3, "1" * 90 + "0" * 10, 0.9)], 3e-3),
        # One row of a hundred is: the NLL decides.
        ([choice(1e-3, "1" * 50 + "0" * 50, 0.1), choice(3e-3, "1" * 51 + "0" * 49, 0.9)], 1e-3),
        # The same rows: a paired difference of 5 points, all to one side, is more than two standard errors.
        ([choice(1e-3, "1" * 50 + "0" * 50, 0.1), choice(3e-3, "1" * 55 + "0" * 45, 0.9)], 3e-3),
        # Without scores the NLL alone; a training that diverged is the worst.
        ([choice(1e-3, "", None), choice(3e-3, "", 7.0)], 3e-3),
        # The mean over seeds.
        (
            [
                choice(1e-3, "", 1.0),
                choice(3e-3, "", 0.5),
                choice(1e-3, "", 1.0, seed=1),
                choice(3e-3, "", 9.0, seed=1),
            ],
            1e-3,
        ),
    ],
)
def test_choice_of_the_rate(lines, rate):
    assert plan.choose_rate(lines) == rate


def test_the_two_parts_of_the_test_set_are_all_of_it_and_always_the_same():
    validation, test = plan.halves(11, 4)
    assert len(validation) == 4
    assert sorted(validation + test) == list(range(11))
    assert plan.halves(11, 4) == (validation, test)


def test_the_plan():
    both = {"cross_entropy": "cross_entropy", "mix": "lovasz"}
    swept = plan.Plan(both, (1e-3, 3e-3), (0,), (0, 1))
    assert len(swept.choice()) == 4
    assert [str(run) for run in swept.finals({"cross_entropy": 1e-3, "mix": 3e-3})] == [
        "cross_entropy, rate 0.001, seed 0",
        "mix, rate 0.003, seed 0",
        "cross_entropy, rate 0.001, seed 1",
        "mix, rate 0.003, seed 1",
    ]
    assert plan.Plan(both, (1e-3,), (0,), (0, 1)).choice() == []  # nothing to choose
    assert len(plan.Plan(both, (1e-3,), (5,), ()).choice()) == 2  # a screen


@pytest.mark.parametrize("host", ["axolotl", "trl"])
def test_configs_of_two_runs_differ_in_objective_rate_and_seed_alone(host):
    config = {
        "learning_rate": 1,
        "eval_steps": 5,
        "save_steps": 5,
        "test_datasets": [],
        "plugins": ["x.Y"],
        "lora_r": 8,
    }
    one, other = (plan.run_config(host, config, *given) for given in [("dice", 1e-3, 0), ("lovasz", 3e-3, 1)])
    assert {key for key in one if one[key] != other[key]} == {"cv_loss", "learning_rate", "seed"}
    assert one["lora_r"] == 8
    assert "eval_steps" not in one
    assert "save_steps" not in one


def test_the_setting_is_the_content_not_the_place(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("one row\n")

    def setting(folder, **more):
        config = {"dataset_name": str(tmp_path / folder), "output_dir": folder, "learning_rate": 1, **more}
        return plan.setting("trl", config, {"score": "text"})

    assert setting("a") == setting("b") == setting("a", learning_rate=2, seed=3, cv_loss="dice")
    assert setting("a") != setting("a", max_steps=7)
    (tmp_path / "b" / "train.jsonl").write_text("another row\n")
    assert setting("a") != setting("b")


def test_a_model_of_another_setting_is_not_taken_for_the_one_to_train(tmp_path):
    """As after a stop before the first line, and a change of the config."""
    run = plan.Run("mix", 1e-3, 0)
    keys = [
        running.Comparison("trl", {"max_steps": steps}, tmp_path, "text", 0.5).key("", "lovasz", run)
        for steps in (5, 6, 5)
    ]
    assert keys[0] == keys[2] != keys[1]


def test_one_rate_after_a_choice_of_others(lines):
    """The choice says 1e-3, the final runs were given 3e-3 alone."""
    mine = [each for each in lines if each["stage"] == "choice" or each["rate"] == 3e-3]
    assert [(row.name, row.rate) for row in report.summary(mine).rows] == [("gain", 3e-3)]


def test_a_choice_that_moved_counts_when_its_seeds_are_there(lines):
    """1e-3 is chosen: with a seed fewer than the 3e-3 of before it does not count yet, and the table says so."""
    fewer = [each for each in lines if each["stage"] == "choice" or each["seed"] or each["rate"] == 3e-3]
    (gain,) = (row for row in report.summary(fewer).rows if row.name == "gain")
    assert (gain.rate, gain.not_chosen, len(gain.seeds)) == (3e-3, True, 4)
    assert "| gain | 0.003\\*† |" in report.markdown(report.summary(fewer))
    (gain,) = (row for row in report.summary(lines).rows if row.name == "gain")
    assert (gain.rate, gain.not_chosen) == (1e-3, False)


def test_a_choice_that_is_not_complete_goes_by_the_seeds_of_all_rates(lines):
    """The second seed has been run with one of the rates, so the first alone counts, in whatever order they came."""
    choice = [line("gain", 0, "1100", stage="choice", rate=rate, nll=nll) for rate, nll in ((1e-3, 0.4), (3e-3, 0.5))]
    more = line("gain", 1, "0000", stage="choice", rate=1e-3, nll=9.0)
    assert plan.choose_rate([more, *choice]) == 1e-3
    both = [*choice, more, line("gain", 1, "1100", stage="choice", rate=3e-3, nll=0.1)]
    assert plan.choose_rate(both) == plan.choose_rate(both[::-1]) == 3e-3
    assert plan.choose_rate([choice[1], more]) == 3e-3  # no seed in common: by NLL


def line(objective, seed, examples, stage="final", rate=1e-3, nll=0.5, **more):
    mean = sum(map(int, examples)) / len(examples)
    return {
        "stage": stage,
        "objective": objective,
        "cv_loss": objective,
        "rate": rate,
        "seed": seed,
        "steps": 10,
        "rows": len(examples),
        "nll": nll,
        "scores": {"exact_match": mean},
        "examples": examples,
        "train_seconds": 1.0,
        "host": "trl",
        "score": "text",
        "machine": {"cpu": "a CPU <fast>"},
        "versions": {"torch": "2.0"},
        **more,
    }


@pytest.fixture
def lines():
    """gain wins on every seed by 20, 21, 19 and 20 points; luck by 30, -30, 20 and -20."""
    base = ["1" * 50 + "0" * 50] * 4
    gain = ["1" * (50 + more) + "0" * (50 - more) for more in (20, 21, 19, 20)]
    luck = ["1" * (50 + more) + "0" * (50 - more) for more in (30, -30, 20, -20)]
    of = {"cross_entropy": base, "gain": gain, "luck": luck}
    finals = [line(name, seed, found[seed]) for seed in range(4) for name, found in of.items()]
    tried = [line(name, 0, "10", stage="choice", rate=rate, nll=rate) for name in of for rate in (1e-3, 3e-3)]
    stale = [line("gain", seed, "0" * 100, rate=3e-3) for seed in range(4)]  # of a rate that is not chosen any more
    return [*stale, *tried, *finals]


def test_summary_by_hand(lines):
    found = report.summary(lines)
    _, gain, luck = sorted(found.rows, key=lambda row: row.name)
    assert gain.rate == 1e-3
    assert gain.at_the_end
    assert gain.difference.mean == pytest.approx(0.2)
    assert gain.differences == pytest.approx([0.2, 0.21, 0.19, 0.2])
    p = stats.ttest_1samp([0.2, 0.21, 0.19, 0.2], 0).pvalue
    assert gain.p == pytest.approx(2 * p)  # of two objectives the smaller p-value counts twice
    assert (gain.verdict, luck.verdict) == ("better", "not decided")
    assert report.headline(found) == (
        "By exact match on the test rows, gain: better than cross_entropy; not decided: luck."
    )


def test_what_is_written(lines, tmp_path):
    text = report.summarize(lines, tmp_path)
    assert (tmp_path / "table.md").read_text() == text
    assert "| gain | 0.001\\* | 4 | 50.0 | 70.0 ± 0.4 | +20.0 ± 0.4 |" in text
    assert "| luck | " in text
    assert "not decided |" in text
    page = (tmp_path / "report.html").read_text()
    assert "a CPU &lt;fast&gt;" in page
    assert "<svg" in page
    # Nothing that a browser would load from elsewhere.
    assert not re.search(r'(?:src|href)="(?!#)|url\((?!#)|@import|<script', page)
    first = (tmp_path / "forest.svg").read_bytes()
    report.summarize(lines, tmp_path)
    assert (tmp_path / "forest.svg").read_bytes() == first


def test_a_lower_nll_is_better(tmp_path):
    of = {"cross_entropy": (1.0, 1.1, 1.2), "low": (0.5, 0.61, 0.7)}
    lines = [line(name, seed, "1", nll=nll[seed]) for name, nll in of.items() for seed in range(3)]
    for each in lines:
        del each["scores"], each["examples"]
    found = report.summary(lines)
    assert found.metric == "nll"
    assert found.rows[1].verdict == "better"


def test_one_seed_decides_nothing(lines, tmp_path):
    one = [each for each in lines if each["seed"] == 0]
    assert {row.verdict for row in report.summary(one).rows} == {"", "not decided"}
    report.summarize(one, tmp_path)


def test_a_screen_has_the_tables_of_the_choice_alone(lines, tmp_path):
    screen = [each for each in lines if each["stage"] == "choice"]
    screen += [line("gain", 1, "1110", stage="choice", rate=1e-3, nll=1e-3)]
    screen += [line("cross_entropy", 1, "1000", stage="choice", rate=1e-3, nll=1e-3)]
    text = report.summarize(screen, tmp_path)
    assert "| gain | 62.5 / 0.0010 | 50.0 / 0.0030 |" in text
    rows = [row.split(" | ") for row in text.splitlines() if " | 0.001 | " in row]
    # The best first, each at the rate of its choice.
    assert [row[0] for row in rows[:3]] == ["| gain", "| luck", "| cross_entropy"]
    assert [row[4] for row in rows[:3]] == ["+0.0, +50.0", "+0.0", ""]
    assert {path.name for path in tmp_path.iterdir()} == {"table.md"}


def test_in_a_screen_by_nll_what_diverged_is_the_last():
    found = {"a": 0.3, "diverged": None, "cross_entropy": 0.2, "b": 0.4, "c": 0.1}
    screen = [{**line(name, 0, "1", stage="choice", nll=nll), "scores": {}} for name, nll in found.items()]
    ((_, rows),) = report.ranking(screen).values()
    assert [row[0] for row in rows] == ["c", "cross_entropy", "a", "b", "diverged"]


def test_steps_that_differ_are_no_fair_comparison(lines):
    lines[-1]["steps"] = 9
    assert "not a fair one" in report.markdown(report.summary(lines))


def test_all_losses_of_the_catalogue_are_mixed_with_cross_entropy():
    found = command._objectives((), None, "all")
    assert set(found) == set(available_losses())
    assert found["lovasz"] == {"cross_entropy": 0.6, "lovasz": 0.4}
    assert found["cross_entropy"] == {"cross_entropy": 1.0}


@pytest.fixture(params=["forked", "by itself"])
def started(request, tmp_path, monkeypatch):
    """Starts the module of TOLD with these arguments and environment; the child and its log."""
    (tmp_path / "told.py").write_text(TOLD)
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "told.log"
    log.write_text("from the last time, and longer than what comes now" * 9)
    forks = children.Forks(["no_such_module", "told"], tmp_path / "imports.log") if request.param == "forked" else None
    begin = children.start if forks is None else forks.start
    yield lambda *arguments, **environment: (begin("told", arguments, log, environment), log)
    if forks is not None:
        forks.close()


def wait(done):
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ended(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_child_is_as_if_it_was_called(started):
    child, log = started("a", "3", CVLOSS_TOLD="so")
    wait(lambda: child.poll() is not None)
    assert child.poll() == 3
    assert log.read_text() == "['a', '3'] so __main__ ''\ngone\n"
    child, log = started("a", "an error", CVLOSS_TOLD="so")
    wait(lambda: child.poll() is not None)
    assert child.poll() == 1
    assert log.read_text().endswith("ZeroDivisionError: division by zero\nhooked\ngone\n")


def test_a_child_ends_with_what_it_started(started):
    child, log = started("a", "wait")
    wait(lambda: log.read_text().endswith("\n"))
    children.end(child)
    assert child.poll() == -signal.SIGKILL
    wait(lambda: ended(int(log.read_text())))


def test_many_at_once_keep_their_codes(started):
    """Asked by a thread each, while others are started."""

    def run(code):
        child, _ = started("a", str(code), CVLOSS_TOLD="so")
        wait(lambda: child.poll() is not None)
        return child.poll()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(12))) == list(range(12))


def test_forks_end_with_who_asked_for_them(tmp_path, monkeypatch):
    """Killed, or with the process that they are forked from killed."""
    (tmp_path / "told.py").write_text(TOLD)
    monkeypatch.chdir(tmp_path)
    log = tmp_path / "told.log"
    forks = children.Forks([], tmp_path / "imports.log")
    child = forks.start("told", ["a", "wait"], log, {})
    wait(lambda: log.read_text().endswith("\n"))
    forks.process.stdin.close()  # as the system does it for one that is killed
    forks.process.wait(60)
    wait(lambda: ended(child.pid) and ended(int(log.read_text())))
    forks = children.Forks([], tmp_path / "imports.log")
    child = forks.start("told", ["a", "wait"], log, {})
    wait(lambda: log.read_text().endswith("\n"))
    forks.process.kill()
    wait(lambda: child.poll() is not None)
    wait(lambda: ended(child.pid) and ended(int(log.read_text())))
    with pytest.raises(children.Gone):
        forks.start("told", ["a", "3"], log, {})
