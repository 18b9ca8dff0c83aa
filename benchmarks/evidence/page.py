"""docs/evidence.md, the table of verdicts in docs/which-loss.md, and table, figure and report of every task, from the
lines in results/.

python benchmarks/evidence/page.py
"""

import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from texts import EXPLAINED, INTRODUCTION, READING, TASKS, Task

from axolotl_cvloss.command.compare import report
from axolotl_cvloss.command.compare.plan import BASELINE, choose_rate
from axolotl_cvloss.command.compare.report import Summary, number, summarize, summary, title
from axolotl_cvloss.command.compare.running import read_lines
from axolotl_cvloss.command.compare.statistics import paired

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "evidence.md"
GUIDE = ROOT / "docs" / "which-loss.md"
GUIDE_START, GUIDE_END = "<!-- Verdicts: written by benchmarks/evidence/page.py -->", "<!-- end of verdicts -->"
EXPLAIN = HERE / "results" / "explain.jsonl"
BY_LABEL = HERE / "results" / "by_label.jsonl"
SAME = ("", "_chosen", "_others")  # what data kept back can confirm
# Ends of what is beside results/TASK.
FOLDERS = tuple(dict.fromkeys((*SAME, "_kept_back", "_screen", *(end for task in TASKS.values() for end in task.more))))
WEIGHED = f"weighed by training rows (minus {BASELINE})"
RULES = f"""{report.RULE}

{report.READING}

Means ± standard errors over seeds; differences are of the same seeds. A seed is the order of the training rows: all
runs of a comparison start from the same weights, so errors and p-values are for these weights and rows. Other start
weights are in the comparisons on data kept back, of the larger model and of three intents, one each.

*Examples drawn again* and *seeds too* are 95% intervals of the difference in points, by a bootstrap over test examples
alone, and over seeds as well. NLL is in nats a token. A set is what topk_cross_entropy, lovasz and the losses of Dice
look at together: an answer, or with `per: batch` a micro-batch.
"""


def results(task: str) -> Path:
    return HERE / "results" / task


def lines_of(task: str) -> list[dict[str, Any]]:
    return read_lines(results(task) / "runs.jsonl")


def summary_of(task: str) -> Summary | None:
    return _summary(results(task) / "runs.jsonl")


@functools.cache  # seconds, for the bootstrap, and each is asked for several times
def _summary(file: Path) -> Summary | None:
    return summary(read_lines(file))


def page() -> str:
    text = [INTRODUCTION, f"{verdicts('')}\n", READING, RULES]
    for name, task in TASKS.items():
        found = summary_of(name)
        if found is not None:
            unsettled = caution(task, found)
            text += [f"## {task.heading}\n", f"{task.about}\n", *unsettled]
            text += [*written(name, found, decided=not unsettled), *left(task, found)]
            text += [*kept_back(name), *screen(name), *more(name)]
    return "\n".join([*text, *explained()])


def written(folder: str, found: Summary, level: int = 3, decided: bool = True) -> list[str]:
    """Figure and sentence, where something is decided; tables and facts. The rules are at the top of the page."""
    text = []
    if decided and any(row.difference for row in found.rows):
        text.append(f"![Differences from {BASELINE}](../benchmarks/evidence/results/{folder}/forest.svg)\n")
        text.append(f"{report.headline(found)}\n")
        if any(row.name == BASELINE and row.at_the_end for row in found.rows):
            text.append(
                f"The rate of {BASELINE} is an end of those that were tried. A better one may lie beyond, and take "
                "some of the differences away.\n"
            )
    facts = " ".join(report.facts(found)).replace("*", "\\*")
    tables = report.tables(found) | by_label(folder, found)
    return [*text, *report.markdown_of(tables, level), f"{facts}\n", *other_rates(found, level)]


def by_label(folder: str, found: Summary) -> dict[str, tuple[list[str], list[list[str]]]]:
    """The table of by_label.py, if it has the runs of this comparison."""
    runs = _runs_by_label()
    own = {row.name: runs.get((folder, row.name, row.rate), {}) for row in found.rows}
    if not all(own[row.name].keys() >= set(row.seeds) for row in found.rows):
        return {}
    first = next(iter(own[BASELINE].values()))
    header = ["objective", *(f"{name}, {count}" for name, count in first["training_rows"].items()), WEIGHED]
    rows = []
    for name, seeds in own.items():
        recalls = [fmean(line["recall"][label] for line in seeds.values()) for label in first["training_rows"]]
        weighed = number(found.metric, fmean(line["as_in_training"] for line in seeds.values()))
        if name != BASELINE:
            both = sorted(seeds.keys() & own[BASELINE].keys())
            more = paired([seeds[seed]["as_in_training"] - own[BASELINE][seed]["as_in_training"] for seed in both])
            weighed += f" ({number(found.metric, more.mean, more.error, '+')})"
        rows.append([name, *(f"{100 * recall:.0f}" for recall in recalls), weighed])
    return {"Exact match by intent, and its training rows, %": (header, rows)}


@functools.cache  # each comparison looks for its own
def _runs_by_label() -> dict[tuple[str, str, float], dict[int, dict[str, Any]]]:
    """The lines of by_label.py by folder, objective and rate, and by seed."""
    runs: dict[tuple[str, str, float], dict[int, dict[str, Any]]] = {}
    for line in read_lines(BY_LABEL):
        runs.setdefault((line["folder"], line["objective"], line["rate"]), {})[line["seed"]] = line
    return runs


def caution(task: Task, found: Summary) -> list[str]:
    """Before the rates are chosen as they are meant to be, a difference may be one of rates."""
    choice = [line for line in found.lines if line["stage"] == "choice"]
    rates = {line["rate"] for line in choice}
    done = {(line["objective"], line["rate"], line["seed"]) for line in choice}
    wanted = {(row.name, rate, seed) for row in found.rows for rate in rates for seed in task.choice_seeds}
    moved = [
        row.name for row in found.rows if row.not_chosen and (row.name == BASELINE or row.verdict != "not decided")
    ]
    reasons = []
    if missing := wanted - done:
        reasons.append(
            f"the choice of rates wants the seeds {', '.join(map(str, task.choice_seeds))}, and {len(missing)} of its "
            f"{len(wanted)} runs are missing"
        )
    if moved:
        reasons.append(f"the table does not have the rate that is chosen for {', '.join(moved)}")
    if not reasons:
        return []
    said = f"**Nothing is decided here yet, whatever the table says:** {'; '.join(reasons)}."
    scores = [score for (name, _), own in finals_of(found).items() if name == BASELINE for score in own.values()]
    if len(scores) > 1:
        said += (
            f" Final runs of {BASELINE} alone lie up to {100 * (max(scores) - min(scores)):.0f} points apart, by seed "
            "and rate."
        )
    return [f"{said}\n"]


def guide(text: str) -> str:
    """The page on which loss to take, with a new table of what is decided."""
    before, after = text.split(GUIDE_START)[0], text.split(GUIDE_END)[1]
    return f"{before}{GUIDE_START}\n{verdicts('evidence.md')}\n{GUIDE_END}{after}"


def verdicts(page: str) -> str:
    """What is decided, a row a comparison, with links into the page of evidence."""
    header = ["task", "seeds", f"better than {BASELINE}, by points", "worse", "not decided"]
    rows = []
    for name, task in TASKS.items():
        kept = {"on data kept back": summary_of(f"{name}_kept_back"), "once more": summary_of(f"{name}_again")}
        for end, (added, _) in {"": ("", ""), **task.more}.items():
            if (found := summary_of(name + end)) is None:
                continue
            heading = task.heading + added
            seeds = str(max(len(row.seeds) for row in found.rows))
            again = kept if end in SAME else {}
            of = by_verdict(found.rows, again, settled=bool(end) or not caution(task, found))
            rows.append([f"[{heading}]({page}#{anchor(heading)})", seeds, *map(", ".join, of.values())])
    return "\n".join(report.markdown_of({"": (header, rows)})[2:]).rstrip()


def by_verdict(rows: list[report.Row], again: Mapping[str, Summary | None], settled: bool) -> dict[str, list[str]]:
    """Objectives with their figures. Of what is decided only that stands which comes out once more in ``again``."""
    of: dict[str, list[str]] = {"better": [], "worse": [], "not decided": []}
    for row in rows:
        if not row.difference:
            continue
        verdict = row.verdict if settled else "not decided"
        figure = ""
        if verdict != "not decided":
            figure = f" {_points(row)}"
            looks = [(said, _row_of(row.name, other)) for said, other in again.items()]
            found = [(said, other) for said, other in looks if other]
            if found:
                told = "; ".join(f"{said} {_points(other)}: {other.verdict}" for said, other in found)
                figure += f" ({told})"
            if any(other.verdict != verdict for _, other in found):
                verdict = "not decided"
        of[verdict].append(f"`{row.name}`{figure}")
    return of


def _row_of(name: str, found: Summary | None) -> report.Row | None:
    return next((row for row in found.rows if row.name == name), None) if found else None


def anchor(heading: str) -> str:
    return re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")


def _points(row: report.Row) -> str:
    assert row.difference is not None
    return number("exact_match", row.difference.mean, row.difference.error, "+")


def finals_of(found: Summary) -> dict[tuple[str, float], dict[int, float]]:
    """The score of each final run by its seed."""
    runs: dict[tuple[str, float], dict[int, float]] = {}
    for line in found.lines:
        if line["stage"] == "final":
            runs.setdefault((line["objective"], line["rate"]), {})[line["seed"]] = line["scores"][found.metric]
    return runs


def other_rates(found: Summary, level: int) -> list[str]:
    """Final runs that are not in the table: does a difference come from the rate?"""
    runs = finals_of(found)
    shown = {row.name: row.rate for row in found.rows}
    rows = []
    for (name, rate), own in sorted(runs.items()):
        if rate != shown[name]:
            beside = runs[name, shown[name]]
            seeds = sorted(own.keys() & beside.keys())
            both = [f"{100 * fmean(scores[seed] for seed in seeds):.1f}" if seeds else "" for scores in (own, beside)]
            rows.append([name, f"{rate:g}", str(len(seeds)), *both])
    header = ["objective", "rate", "seeds", f"{title(found.metric)}, %", "the same seeds in the table, %"]
    return report.markdown_of({"Final runs at other rates": (header, rows)}, level) if rows else []


def left(task: Task, found: Summary) -> list[str]:
    """What of the plan has not been run."""
    runs = finals_of(found)
    missing = []
    for row in found.rows:
        choice = [line for line in found.lines if line["stage"] == "choice" and line["objective"] == row.name]
        rate = choose_rate(choice) if choice else row.rate
        if seeds := [seed for seed in task.seeds if seed not in runs.get((row.name, rate), {})]:
            missing.append(f"{row.name} at {rate:g}: seeds {', '.join(map(str, seeds))}")
    return [f"Not run yet: {'; '.join(missing)}.\n"] if missing else []


def kept_back(name: str) -> list[str]:
    """What was better, once more: rows that no choice has seen, and fresh seeds."""
    again = summary_of(f"{name}_kept_back")
    if again is None:
        return []
    summaries = [found for end in reversed(SAME) if (found := summary_of(name + end))]
    before = {row.name: row.verdict for found in summaries for row in found.rows}
    of: dict[tuple[str, str], list[str]] = {}
    for row in again.rows:
        if row.difference and before.get(row.name) in ("better", "worse"):
            confirmed = "confirmed" if row.verdict == before[row.name] else "not confirmed"
            other = _row_of(row.name, summary_of(f"{name}_again"))
            if other and other.verdict != row.verdict:
                confirmed += " here, and not by the fresh seeds of the table further down"
            of.setdefault((before[row.name], confirmed), []).append(row.name)
    said = [
        f"That {', '.join(names)} {'is' if len(names) == 1 else 'are'} {verdict} than {BASELINE} is {confirmed}."
        for (verdict, confirmed), names in of.items()
    ]
    found = summaries[-1]
    rates = [next((row.rate for row in of.rows if row.name == BASELINE), None) for of in (again, found)]
    runs = [finals_of(found).get((BASELINE, rate)) for rate in rates if rate is not None]
    if rates[0] != rates[1] and all(runs):
        here, chosen = (f"{100 * fmean(own.values()):.1f} % at {rate:g}" for own, rate in zip(runs, rates, strict=True))
        said.append(f"The rate of {BASELINE} is not the one chosen above, where it has {here} and {chosen}.")
    chosen = any(line["stage"] == "choice" for line in again.lines)
    left = "the rates chosen anew, on a part of them" if chosen else "nothing left to choose"
    about = f"Rows that no choice has seen, other seeds, {left}. {' '.join(said)}".rstrip()
    return ["### Once more, on data that are kept back\n", f"{about}\n", *written(f"{name}_kept_back", again, level=4)]


def screen(name: str) -> list[str]:
    lines = lines_of(f"{name}_screen")
    if not lines:
        return []
    seeds = ", ".join(map(str, sorted({line["seed"] for line in lines})))
    objectives = len({line["objective"] for line in lines})
    about = f"{objectives} objectives on {lines[0]['rows']} validation rows, seeds {seeds}. {report.SCREEN}"
    return ["### A screen of the catalogue\n", f"{about}\n", *report.markdown_of(report.ranking(lines), level=4)]


def more(name: str) -> list[str]:
    """The comparisons beside it."""
    text = []
    for end, (added, about) in TASKS[name].more.items():
        if found := summary_of(name + end):
            text += [f"### {TASKS[name].heading}{added}\n", f"{about}\n", *written(name + end, found, level=4)]
    return text


def explained() -> list[str]:
    """Tables of explain.py: the tokens of each point of a training, and what each loss does with them."""
    if not EXPLAIN.exists():
        return []
    lines = [json.loads(text) for text in EXPLAIN.read_text(encoding="utf-8").splitlines()]
    text = [f"{EXPLAINED}\n"]
    for task in dict.fromkeys(line["task"] for line in lines):
        own = [line for line in lines if line["task"] == task]
        header = ["step", "NLL", "p > 0.9", "p > 0.99", "p < 0.5", "gradient norm"]
        tokens = [
            [
                str(line["step"]),
                f"{line['nll']:.2f}",
                *_percent(line, "easy", "easiest", "hard"),
                f"{line['gradient_norm']:.2f}",
            ]
            for line in own
            if line["loss"] == BASELINE
        ]
        steps = [step for step, *_ in tokens]
        of = {(line["loss"], str(line["step"])): line for line in own}
        losses = dict.fromkeys(line["loss"] for line in own)
        made = {f"{TASKS[task].heading}: the tokens, and {BASELINE}": (header, tokens)}
        for heading, cell in CELLS.items():
            shown = [loss for loss in losses if loss != BASELINE or heading == PULL]
            rows = [[loss, *(cell(of[loss, step]) for step in steps)] for loss in shown]
            made[heading] = (["loss", *(f"step {step}" for step in steps)], rows)
        # The headings of one task's tables would come again for the next: in bold, where nothing is linked.
        for heading, (names, rows) in made.items():
            text += [f"**{heading}**\n", *report.markdown_of({"": (names, rows)})[2:]]
    return text


def _percent(line: dict[str, Any], *keys: str) -> list[str]:
    return [f"{100 * line[key]:.0f} %" for key in keys]


def _share(line: dict[str, Any]) -> float:
    """Of the mix's gradient, as `cvloss probe` has it, but in the weights."""
    return 0.4 * line["norm_weights"] / (0.6 + 0.4 * line["norm_weights"])


PULL = "Pull on tokens with p < 0.5 / p > 0.9"
CELLS = {
    PULL: lambda line: " / ".join(_percent(line, "pull_on_hard", "pull_on_easy")),
    "Gradient beside that of cross_entropy: norm / cosine": lambda line: (
        f"{line['norm_weights']:.2f} / {line['cosine_weights']:.2f}"
    ),
    "Share of 0.4 of it beside 0.6 of cross_entropy": lambda line: f"{100 * _share(line):.0f} %",
}


def main() -> None:
    for name in TASKS:
        for end in FOLDERS:
            if lines := lines_of(name + end):
                summarize(lines, results(name + end))
    PAGE.write_text(page(), encoding="utf-8")
    GUIDE.write_text(guide(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
