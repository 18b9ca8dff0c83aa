"""The published lines: tables and page are what they say, and they hold what the page claims of them."""

import json
import re
import sys
from pathlib import Path
from statistics import fmean

import pytest
import yaml

from axolotl_cvloss.command.compare import report
from axolotl_cvloss.command.compare.running import read_lines
from axolotl_cvloss.command.compare.statistics import paired
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
def test_the_lines_are_of_one_fair_comparison(folder, page):
    lines = read_lines(folder / "runs.jsonl")
    assert len({(line["setting"], line["steps"], line["score"]) for line in lines}) == 1
    runs = [json.dumps([line[key] for key in ("stage", "objective", "rate", "seed")]) for line in lines]
    assert len(runs) == len(set(runs))
    seeds = {stage: {line["seed"] for line in lines if line["stage"] == stage} for stage in ("choice", "final")}
    assert not seeds["choice"] & seeds["final"]  # the final runs are fresh
    task = next(task for task in page.TASKS for end in page.FOLDERS if folder.name == task + end)
    for end in page.FOLDERS:  # and so they are beside all others of the task, unless they have the same baseline
        beside = read_lines(folder.with_name(task + end) / "runs.jsonl")
        if folder.name != task + end and {line["objective"] for line in lines if line in beside} != {page.BASELINE}:
            assert not seeds["final"] & {line["seed"] for line in beside}
    rates = {line["objective"]: set() for line in lines}
    for line in lines:
        if line["stage"] == "choice":
            rates[line["objective"]].add(line["rate"])
    assert len({frozenset(found) for found in rates.values()}) == 1  # the same rates for all


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(EVIDENCE))
    import page

    yield page
    sys.modules.pop("page")


def test_the_page_is_written_from_the_lines(page):
    assert page.PAGE.read_text() == page.page()
    guide = page.GUIDE.read_text()
    assert guide == page.guide(guide)


def test_what_is_read_from_the_verdicts(page):
    """The sentences below them."""

    def verdicts(*tasks):
        return {row.name: row.verdict for task in tasks for row in page.summary_of(task).rows if row.difference}

    slots, kept = verdicts("slots", "slots_chosen"), verdicts("slots_kept_back")
    gains = {name for name, verdict in slots.items() if verdict == kept.get(name) == "better"}
    assert gains == {"topk_cross_entropy", "weighted_cross_entropy", "sparsemax", "spherical_z"}
    for longer in "slots_long", "intents_long":
        assert verdicts(longer) == {"topk_cross_entropy": "not decided", "weighted_cross_entropy": "not decided"}
    intents, kept = verdicts("intents"), verdicts("intents_kept_back")
    later = verdicts("intents_others", "intents_chosen")
    intents |= {name: later[name] for name in gains & later.keys()}
    assert gains <= intents.keys()
    both = {name for name, verdict in intents.items() if verdict == kept.get(name) == "better"}
    assert gains - both == {"sparsemax"}
    assert intents["sparsemax"] == "not decided"
    assert set(verdicts("slots_large").values()) == set(verdicts("slots_further_scratch").values()) == {"better"}
    further = verdicts("slots_further")
    assert gains <= further.keys()
    assert {name for name, verdict in further.items() if verdict != "not decided"} == {"topk_cross_entropy"}
    assert further["topk_cross_entropy"] == verdicts("slots_further_kept_back")["topk_cross_entropy"] == "worse"
    assert verdicts("problems")["focal"] == verdicts("problems_kept_back")["focal"] == "better"
    assert verdicts("problems_others") == {"sparsemax": "worse", "weighted_cross_entropy": "better"}
    assert verdicts("problems_again") == {"focal": "not decided", "weighted_cross_entropy": "not decided"}
    assert all(row.metrics["exact_match"][0] > 0.99 for row in page.summary_of("problems_long").rows)
    assert set(verdicts("intents_pretrained", "intents_pretrained_more", "slots_text").values()) == {"not decided"}
    assert [row.difference.mean < 0 for row in page.summary_of("slots_text").rows if row.difference] == [True] * 3
    found = page.summary_of("intents_pretrained_more")
    runs = page.finals_of(found)
    beside = {row.rate: fmean(runs[page.BASELINE, row.rate].values()) for row in found.rows}
    far = [abs(fmean(runs[row.name, row.rate].values()) - beside[row.rate]) for row in found.rows]
    assert len(far) == 7
    assert max(far) < 0.022


def test_what_is_said_of_the_name_alone(page):
    def scores(folder, objective):
        return page.finals_of(page.summary_of(folder))[objective, 3e-3]

    others = {row.name: row for row in page.summary_of("intents_others").rows}
    name, weighted = others["topk_cross_entropy alone"], scores("intents_chosen", "weighted_cross_entropy")
    assert f"gains {100 * name.difference.mean:.1f} points" in page.EXPLAINED
    alone = scores("intents_others", name.name)
    assert len(alone) == 8
    more = paired([100 * (weighted[seed] - alone[seed]) for seed in alone])
    assert f"has {more.mean:.1f} ± {more.error:.1f} points" in page.EXPLAINED
    for part in others["the name at the start"], others["the name later"]:
        assert part.verdict == "not decided"
        assert 2 <= 100 * part.difference.mean <= 3


def test_intents_one_by_one(page):
    """Every run has its line, and what gains is the name that has 32 rows to train on."""
    names = [folder.name for folder in FOLDERS if folder.name.startswith("intents")]
    keys = ("objective", "rate", "seed")
    runs = [(name, line) for name in names for line in page.lines_of(name) if line["stage"] == "final"]
    lines = {(line["folder"], *map(line.get, keys)): line for line in read_lines(page.BY_LABEL)}
    assert {(name, *map(line.get, keys)) for name, line in runs} == lines.keys()

    def mean(folder, row, key, *label):
        """Of the runs of a row of the table, of one label or of all weighed."""
        found = [lines[folder, row.name, row.rate, seed][key] for seed in row.seeds]
        return fmean(value[label[0]] if label else value for value in found)

    intents = next(iter(lines.values()))["recall"]
    for folder in ("intents", "intents_chosen", "intents_kept_back"):
        rows = {row.name: row for row in page.summary_of(folder).rows}
        base = rows[page.BASELINE]
        for row in (row for row in rows.values() if row.verdict == "better"):
            more = {
                label: mean(folder, row, "recall", label) - mean(folder, base, "recall", label) for label in intents
            }
            assert max(more, key=more.get) == "SearchCreativeWork"
            assert more["SearchCreativeWork"] > 0.5 * sum(abs(one) for one in more.values())
        left = [mean(folder, row, "as_in_training") for row in (rows["weighted_cross_entropy"], base)]
        assert 0.007 < left[0] - left[1] < 0.013


def test_p_values_with_more_losses_in_one_table(page):
    def p_values(*folders):
        lines = {json.dumps(line): line for folder in folders for line in page.lines_of(folder)}.values()
        return {row.name: row.p for row in report.summary(list(lines)).rows}

    together = p_values("problems_kept_back", "problems_others")
    said = page.TASKS["problems"].more["_others"][1]
    assert (
        "focal {focal:.3f} and that of weighted_cross_entropy {weighted_cross_entropy:.3f}".format(**together) in said
    )
    assert p_values("problems_kept_back")["focal"] < 0.05 > p_values("problems_others")["weighted_cross_entropy"]


def test_every_folder_of_lines_is_on_the_page(page):
    assert {folder.name for folder in FOLDERS} <= {f"{task}{end}" for task in page.TASKS for end in page.FOLDERS}


def change(lines, **more):
    return [{**line, **more} for line in lines]


def of_two(task):
    lines = read_lines(EVIDENCE / "results" / task / "runs.jsonl")
    return [line for line in lines if line["objective"] in ("cross_entropy", "topk_cross_entropy")]


def write(page, monkeypatch, tmp_path, **folders):
    """The page of other lines."""
    for name, lines in folders.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(page, "results", tmp_path.__truediv__)
    return page.page()


def test_what_is_decided_follows_the_lines(page, monkeypatch, tmp_path):
    """The same lines, said to be of the word problems and complete, then without the choice of one seed."""
    lines = of_two("slots")
    choice = [line for line in lines if line["stage"] == "choice"]
    lines += [line for seed in (9, 10) for line in change(choice, seed=seed)]
    text = write(page, monkeypatch, tmp_path / "all", problems=lines)
    assert "Nothing is decided here yet" not in text
    assert "topk_cross_entropy: better than cross_entropy." in text
    assert "an end of those that were tried. A better" not in text
    low = [line for line in lines if line["rate"] <= 0.0045]
    text = write(page, monkeypatch, tmp_path / "low", problems=low)
    assert "The rate of cross_entropy is an end of those that were tried. A better one" in text
    some = [line for line in lines if line["seed"] != 10]
    text = write(page, monkeypatch, tmp_path / "some", problems=some)
    assert f"the seeds 0, 9, 10, and {len(choice)} of its {3 * len(choice)} runs are missing" in text
    assert "better than cross_entropy." not in text
    assert " |  |  | `topk_cross_entropy` |" in page.guide(page.GUIDE.read_text())


def test_kept_back_and_screen_are_on_the_page(page, monkeypatch, tmp_path):
    lines = of_two("slots")
    finals = [line for line in lines if line["stage"] == "final"]
    base = {line["seed"]: line for line in finals if line["objective"] == "cross_entropy" and line["rate"] == 0.003}
    again = [line for line in finals if line["rate"] == 0.003]
    screen = [line for line in lines if line["stage"] == "choice" and line["rate"] == 0.003]
    text = write(page, monkeypatch, tmp_path / "better", slots=lines, slots_kept_back=again, slots_screen=screen)
    assert "That topk_cross_entropy is better than cross_entropy is confirmed." in text
    mean = sum(line["scores"]["exact_match"] for line in base.values()) / len(base)
    assert f"has {100 * mean:.1f} % at 0.003 and " in text
    assert re.search(
        r"\| `topk_cross_entropy` \+6\.4 ± 1\.1 \(on data kept back .*: better\) \|", page.guide(page.GUIDE.read_text())
    )
    best = next(row for row in text.split("#### exact match on the validation rows")[1].splitlines() if "0.003" in row)
    assert best.startswith("| topk_cross_entropy | 0.003 | 1 | 55.1 | +7.4 |")
    # With nothing but the baseline's lines under another name the gain is gone.
    same = [*base.values(), *change(base.values(), objective="topk_cross_entropy")]
    text = write(page, monkeypatch, tmp_path / "same", slots=lines, slots_kept_back=same)
    assert "That topk_cross_entropy is better than cross_entropy is not confirmed." in text
    assert " |  |  | `topk_cross_entropy` +6.4 ± 1.1 (on data kept back " in text  # not decided


def test_the_screen_has_every_loss_that_next_token_data_can_train():
    objectives = yaml.safe_load((EVIDENCE / "screen.yaml").read_text())
    terms = [CVLossConfig.parse(value).terms for value in objectives.values()]
    assert all(sum(term.weight for term in both) == pytest.approx(1) for both in terms if not both[1].schedules)
    screened = {(term.loss, term.weight) for both in terms for term in both[1:]}
    left_out = {"anchored", "prior_weighted", "importance_weighted", "unlikelihood"}
    wanted = {name for name, loss in available_losses().items() if loss.kind.name != "number"} - left_out
    assert {(name, weight) for name in wanted for weight in (0.2, 0.4)} <= screened
    by_batch = {both[1].loss for both in terms if both[1].per == "batch"}
    assert by_batch >= {n for n in wanted if available_losses()[n].kind.name in ("region", "ranking")}


def test_what_is_said_of_the_pull_of_losses(page):
    """The sentences of the page, in figures."""
    screen = {line["objective"]: line for line in read_lines(EVIDENCE / "results" / "slots_screen" / "runs.jsonl")}
    topk = "topk_cross_entropy 0.4 k 0.3"
    shown = [screen[name]["scores"]["exact_match"] for name in (f"{topk} at the start", f"{topk} later", topk)]
    shown.append(screen["cross_entropy"]["scores"]["exact_match"])
    said = "at the start alone had {:.1f} %, later alone {:.1f}, throughout {:.1f} and cross_entropy {:.1f}, one seed"
    said = said.format(*(100 * score for score in shown))
    assert said in " ".join(page.EXPLAINED.split())
    of = {}
    for text in page.EXPLAIN.read_text().splitlines():
        line = json.loads(text)
        of.setdefault((line["task"], line["step"] / line["steps"]), {})[line["loss"]] = line
    plain = "cross_entropy"
    early, later = of["slots_further", 0.05], of["slots_further", 0.1]
    assert early[plain]["easy"] > 0.5
    assert early[plain]["pull_on_hard"] == pytest.approx(0.96, abs=0.005)
    same = ("topk_cross_entropy", "weighted_cross_entropy", "sparsemax")
    assert all(early[loss]["cosine_weights"] > 0.88 - 0.005 for loss in same)
    assert sorted(round(later[loss]["cosine_weights"], 2) for loss in same)[::2] == [0.52, 0.61]
    assert early["spherical_z"]["cosine_weights"] == pytest.approx(0.25, abs=0.005)
    middle = of["slots", 0.25]
    assert abs(middle["aldr"]["cosine_weights"] - middle["spherical_z"]["cosine_weights"]) < 0.05
    for (task, done), at in of.items():
        if task not in ("slots", "problems"):
            continue
        focal, topk = at["focal"], at["topk_cross_entropy"]
        assert focal["pull_on_hard"] >= at[plain]["pull_on_hard"]
        if done >= 0.5:
            assert focal["pull_on_hard"] > topk["pull_on_hard"]
            assert topk["cosine_weights"] > 0.85
            assert 2.5 < topk["norm_weights"] < 4.5
            for loss in ("lovasz", "generalized_dice", "self_adjusting_dice"):
                assert page._share(at[loss]) < 1 / 3
                assert at[loss]["pull_on_easy"] > at[plain]["pull_on_easy"]
                assert at[loss]["cosine_weights"] < 0.85
            if task == "slots":
                assert all(at[loss]["cosine_weights"] > 0.7 for loss in ("weighted_cross_entropy", "sparsemax"))
                assert at["spherical_z"]["cosine_weights"] < 0.6
        if done <= 0.1:
            assert at[plain]["easy"] == 0
            assert topk["cosine_weights"] < 0.5 < 0.95 < focal["cosine_weights"]
            if task == "slots":
                assert all(at[loss]["cosine_weights"] < 0.7 for loss in ("weighted_cross_entropy", "sparsemax"))
                assert at["aldr"]["cosine_weights"] > 0.95
                assert all(
                    page._share(at[loss]) < 0.02 for loss in ("lovasz", "generalized_dice", "self_adjusting_dice")
                )
