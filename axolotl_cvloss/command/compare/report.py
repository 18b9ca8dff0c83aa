"""table.md, forest.svg and report.html of the lines of a comparison. Needs no torch."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from .plan import BASELINE, Line, choose_rate, examples_of
from .statistics import LEVEL, Paired, bootstrap, holm, mean_and_error, paired, verdict

NLL = "nll"
RULE = (
    "The learning rate of an objective is chosen on the validation rows, by its runs with the choice seeds: a rate is "
    "out where its mean score is behind the best one by more than twice the standard error of the difference; among "
    "the others the lowest NLL decides."
)
READING = (
    f"An objective is better or worse than {BASELINE} where the p-value of a paired t-test over the seeds, by Holm's "
    f"correction for all objectives of the table, is below {LEVEL:g}, and the 95% interval of a bootstrap that draws "
    "both seeds and examples again leaves out 0. Everything else is not decided, which does not say that it is equal."
)

SCREEN = (
    "Nothing is decided by a screen: the best of many objectives on the rows that sort them is the best by luck, too. "
    "It says what to confirm, with fresh seeds and other rows."
)


@dataclass
class Row:
    """One objective beside the baseline. Intervals and p are of the main score's difference over the seeds of both."""

    name: str
    cv_loss: Any
    rate: float
    seeds: list[int]
    metrics: dict[str, tuple[float, float | None]]
    validation: dict[str, float]
    at_the_end: bool
    not_chosen: bool
    differences: list[float] = field(default_factory=list)
    others: dict[str, Paired] = field(default_factory=dict)  # differences of the other metrics
    difference: Paired | None = None
    within: tuple[float, float] | None = None
    across: tuple[float, float] | None = None
    p: float | None = None
    verdict: str = ""


@dataclass
class Summary:
    """What the lines say: ``metric`` is the main one, which decides."""

    metric: str
    metrics: list[str]
    rows: list[Row]
    lines: list[Line]

    @property
    def higher_is_better(self) -> bool:
        return self.metric != NLL


def metrics_of(line: Line) -> dict[str, float]:
    nll = float("nan") if line["nll"] is None else line["nll"]
    return {**line.get("scores", {}), NLL: nll}


def _means(measured: Sequence[dict[str, float]]) -> dict[str, float]:
    return {metric: fmean(values[metric] for values in measured) for metric in (measured[0] if measured else ())}


def summary(lines: Sequence[Line]) -> Summary | None:
    """None before the first final line. Of two lines of a run the later one counts."""
    found: dict[str, dict[tuple[str, float, int], Line]] = {}
    for line in lines:
        found.setdefault(line["objective"], {})[line["stage"], line["rate"], line["seed"]] = line
    rows, runs = [], {}
    for name, own in found.items():
        choice = [line for (stage, *_), line in own.items() if stage == "choice"]
        finals = [line for (stage, *_), line in own.items() if stage == "final"]
        if not finals:
            continue
        rates = sorted({line["rate"] for line in choice})
        rate = float(finals[-1]["rate"])
        seeds: dict[float, set[int]] = {}
        for line in finals:
            seeds.setdefault(line["rate"], set()).add(line["seed"])
        chosen = choose_rate(choice) if choice else rate
        if chosen in seeds:  # otherwise the comparison was given another rate alone
            # Rates that came later may have moved the choice; until its seeds are there, those of before count.
            most = max(seeds, key=lambda other: len(seeds[other]))
            rate = chosen if len(seeds[chosen]) == len(seeds[most]) else most
        runs[name] = {line["seed"]: line for line in finals if line["rate"] == rate}
        if not runs[name]:
            continue
        measured = [metrics_of(line) for _, line in sorted(runs[name].items())]
        of_choice = [metrics_of(line) for line in choice if line["rate"] == rate]
        rows.append(
            Row(
                name,
                finals[-1]["cv_loss"],
                rate,
                sorted(runs[name]),
                {metric: mean_and_error([values[metric] for values in measured]) for metric in measured[0]},
                _means(of_choice),
                len(rates) > 1 and rate in (rates[0], rates[-1]),
                bool(choice) and rate != chosen,
            )
        )
    if not rows:
        return None
    metrics = list(rows[0].metrics)
    result = Summary(metrics[0], metrics, rows, list(lines))
    if BASELINE in runs:
        for row in rows:
            if row.name != BASELINE:
                _beside(row, runs[row.name], runs[BASELINE], result)
        for row, p in zip(rows, holm([row.difference.p if row.difference else None for row in rows]), strict=True):
            row.p = p
            if row.difference:
                sign = 1 if result.higher_is_better else -1
                row.verdict = verdict(p, row.across, sign * row.difference.mean)
    return result


def _beside(row: Row, own: dict[int, Line], base: dict[int, Line], result: Summary) -> None:
    seeds = sorted(own.keys() & base.keys())
    if not seeds:
        return
    differences = {
        metric: [metrics_of(own[seed])[metric] - metrics_of(base[seed])[metric] for seed in seeds]
        for metric in result.metrics
    }
    row.differences = differences[result.metric]
    tests = {metric: paired(values) for metric, values in differences.items()}
    row.difference = tests[result.metric]
    row.others = {metric: test for metric, test in tests.items() if metric != result.metric}
    pairs = [(examples_of(own[seed]), examples_of(base[seed])) for seed in seeds]
    if all(a and len(a) == len(pairs[0][0]) == len(b) for a, b in pairs):
        table = [[x - y for x, y in zip(a, b, strict=True)] for a, b in pairs]
        row.within = bootstrap(table, over_seeds=False)
        if len(seeds) > 1:
            row.across = bootstrap(table, over_seeds=True)


# What is written


def _factor(metric: str) -> float:
    """Scores between 0 and 1 are read in percent."""
    return 1 if metric == NLL else 100


def _unit(metric: str) -> str:
    return "" if metric == NLL else ", %"


def number(metric: str, value: float, error: float | None = None, sign: str = "") -> str:
    """A value as it stands in a table, scores in percent."""
    digits, factor = (4, 1) if metric == NLL else (1, 100)
    return f"{factor * value:{sign}.{digits}f}" + (f" ± {factor * error:.{digits}f}" if error is not None else "")


def _interval(metric: str, interval: tuple[float, float] | None) -> str:
    return "" if interval is None else " to ".join(number(metric, end, sign="+") for end in interval)


def title(metric: str) -> str:
    return {NLL: "NLL", "f1_micro": "F1 micro", "f1_macro": "F1 macro"}.get(metric, metric.replace("_", " "))


def _p(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def tables(found: Summary) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Headers and cells of each table, by its heading."""
    main = found.metric
    unit = _unit(main)
    header = ["objective", "rate", "seeds", f"validation {title(main)}{unit}", f"{title(main)}{unit}"]
    header += [f"minus {BASELINE}", "examples drawn again", "seeds too", "p (Holm)", "against " + BASELINE]
    rows = []
    for row in found.rows:
        difference = row.difference
        rows.append(
            [
                row.name,
                f"{row.rate:g}" + "*" * row.at_the_end + "†" * row.not_chosen,
                str(len(row.seeds)),
                number(main, row.validation[main]) if row.validation else "",
                number(main, *row.metrics[main]),
                number(main, difference.mean, difference.error, "+") if difference else "",
                _interval(main, row.within),
                _interval(main, row.across),
                _p(row.p),
                row.verdict,
            ]
        )
    made = {f"{title(main)} on the test rows": (header, rows)}
    if len(found.metrics) > 1:
        others = [metric for metric in found.metrics if metric != main]
        header = ["objective", *(part for metric in others for part in (title(metric), f"minus {BASELINE}"))]
        made["Other measures"] = (
            header,
            [
                [row.name]
                + [
                    part
                    for metric in others
                    for part in (
                        number(metric, *row.metrics[metric]),
                        number(metric, row.others[metric].mean, row.others[metric].error, "+")
                        if metric in row.others
                        else "",
                    )
                ]
                for row in found.rows
            ],
        )
    return made | choice_table(found.lines)


def choice_table(lines: Sequence[Line]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Every rate of every objective on the validation rows, by the heading; nothing where no rates were chosen."""
    choice: dict[tuple[str, float], dict[int, Line]] = {}
    for line in lines:
        if line["stage"] == "choice":
            choice.setdefault((line["objective"], line["rate"]), {})[line["seed"]] = line
    if not choice:
        return {}
    shown = list(dict.fromkeys((next(iter(metrics_of(lines[0]))), NLL)))
    rates = sorted({rate for _, rate in choice})
    means = {key: _means([metrics_of(line) for line in found.values()]) for key, found in choice.items()}
    cells = {key: " / ".join(number(metric, mean[metric]) for metric in shown) for key, mean in means.items()}
    return {
        f"The choice of rates: validation {' / '.join(map(title, shown))}": (
            ["objective", *(f"{rate:g}" for rate in rates)],
            [[name, *(cells.get((name, rate), "") for rate in rates)] for name in dict.fromkeys(n for n, _ in choice)],
        )
    }


def ranking(lines: Sequence[Line]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """A screen: every objective at the rate of its choice on the validation rows, the best first, by the heading.

    Beside the means over the choice seeds stand the differences from the baseline of each seed that both have.
    """
    runs: dict[str, dict[int, Line]] = {}
    for name in dict.fromkeys(line["objective"] for line in lines):
        choice = [line for line in lines if line["objective"] == name and line["stage"] == "choice"]
        if choice:
            rate = choose_rate(choice)
            runs[name] = {line["seed"]: line for line in choice if line["rate"] == rate}
    if not runs:
        return {}
    metrics = list(metrics_of(lines[0]))
    main, base = metrics[0], runs.get(BASELINE, {})
    means = {name: _means([metrics_of(line) for line in own.values()]) for name, own in runs.items()}
    header = ["objective", "rate", "seeds", f"{title(main)}{_unit(main)}", f"minus {BASELINE}, by seed"]
    rows, sign = [], 1 if main == NLL else -1
    # A mean that is NaN, of a training that diverged, has no order of its own: it is the last.
    for name in sorted(runs, key=lambda name: (math.isnan(means[name][main]), sign * means[name][main])):
        own = runs[name]
        seeds = sorted(own.keys() & base.keys()) if name != BASELINE else []
        differences = [metrics_of(own[seed])[main] - metrics_of(base[seed])[main] for seed in seeds]
        rate = next(iter(own.values()))["rate"]
        cells = [name, f"{rate:g}", str(len(own)), number(main, means[name][main])]
        cells.append(", ".join(number(main, difference, sign="+") for difference in differences))
        rows.append([*cells, *(number(metric, means[name][metric]) for metric in metrics[1:])])
    return {f"{title(main)} on the validation rows": ([*header, *map(title, metrics[1:])], rows)}


def headline(found: Summary) -> str:
    """What is decided, in one sentence."""
    compared = [row for row in found.rows if row.difference]
    said = []
    for word in ("better", "worse"):
        if names := [row.name for row in compared if row.verdict == word]:
            said.append(f"{', '.join(names)}: {word} than {BASELINE}")
    open_ = [row.name for row in compared if row.verdict == "not decided"]
    if open_:
        said.append(f"not decided: {', '.join(open_)}")
    return f"By {title(found.metric)} on the test rows, {'; '.join(said)}." if said else ""


def facts(found: Summary) -> list[str]:
    finals = [line for line in found.lines if line["stage"] == "final"]
    last = finals[-1]
    steps = sorted({line["steps"] for line in finals if line["steps"]})
    choice = [line for line in found.lines if line["stage"] == "choice"]
    seconds = sum(line["train_seconds"] for line in finals)
    machine, versions = last["machine"], last["versions"]
    said = [
        f"{' or '.join(map(str, steps)) or 'unknown'} steps a run, host {last['host']}, score {last['score']}; "
        f"{last['rows']} test rows"
        + (f", {choice[-1]['rows']} validation rows, choice seeds {_seeds(choice)}" if choice else "")
        + f"; seeds {_seeds(finals)}.",
        f"{seconds / max(1, len(finals)):.0f} s a training on {', '.join(machine.get('gpus') or [machine['cpu']])}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
    ]
    if any(row.at_the_end for row in found.rows):
        said.append("* An end of the rates that were tried: a better one may lie beyond.")
    if any(row.not_chosen for row in found.rows):
        said.append("† Not the rate that the choice takes: of that one there are fewer final runs, or none.")
    if len(steps) > 1:
        said.append("The runs differ in their steps, so the comparison is not a fair one.")
    return said


def _seeds(lines: Sequence[Line]) -> str:
    return ", ".join(map(str, sorted({line["seed"] for line in lines})))


def markdown(found: Summary) -> str:
    text = [headline(found), ""] if headline(found) else []
    text += markdown_of(tables(found))
    text += [" ".join(facts(found)).replace("*", "\\*"), "", RULE, "", READING]
    text += ["", "Means ± standard errors over seeds; differences are of the same seeds.", ""]
    return "\n".join(text)


def markdown_of(made: dict[str, tuple[list[str], list[list[str]]]], level: int = 3) -> list[str]:
    """Lines of text: headings of this level, and the tables."""
    text = []
    for heading, (header, rows) in made.items():
        text += [f"{'#' * level} {heading}", ""]
        text += [_line(header), _line(["---", *["---:"] * (len(header) - 1)]), *map(_line, rows), ""]
    return text


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |"


def forest(found: Summary) -> str:
    """The difference of each objective from the baseline as SVG: seeds, mean, t interval, bootstrap interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in found.rows if row.difference]
    factor = _factor(found.metric)
    figure, axis = plt.subplots(figsize=(8, 1.6 + 0.42 * len(rows)), layout="constrained")
    colors = {"better": "C2", "worse": "C3"}
    for place, row in enumerate(rows):
        test, color = row.difference, colors.get(row.verdict, "C0")
        assert test is not None
        # Below the intervals, which would cover them.
        axis.plot([factor * d for d in row.differences], [place + 0.25] * len(row.differences), "o", color="0.6", ms=4)
        if row.across is not None:
            axis.plot([factor * end for end in row.across], [place] * 2, color=color, lw=1, alpha=0.8)
        if test.low is not None and test.high is not None:
            axis.plot([factor * test.low, factor * test.high], [place] * 2, color=color, lw=4, alpha=0.35)
        axis.plot(factor * test.mean, place, "D", color=color, ms=6)
    axis.axvline(0, color="0.3", lw=0.8)
    axis.set(yticks=range(len(rows)), yticklabels=[f"{row.name}: {row.verdict}" for row in rows])
    better = "right" if found.higher_is_better else "left"
    points = ", points" if factor == 100 else ""
    axis.set_xlabel(f"{title(found.metric)} minus that of {BASELINE}{points} ({better}: better)")
    axis.set_title(
        "diamond: mean; dots: seeds; 95% intervals,\nthick: t-test over seeds, thin: bootstrap over seeds and examples",
        fontsize="small",
    )
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    out = io.StringIO()
    # The same lines make the same file.
    with matplotlib.rc_context({"svg.hashsalt": "cvloss", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    return out.getvalue()


def html(found: Summary, picture: str | None) -> str:
    """One page that needs no other file."""
    import jinja2
    import yaml

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        headline=headline(found),
        tables=tables(found),
        facts=facts(found),
        texts=[RULE, READING],
        picture=picture and picture[picture.index("<svg") :],
        objectives={
            row.name: yaml.safe_dump({"cv_loss": row.cv_loss, "learning_rate": row.rate}, sort_keys=False)
            for row in found.rows
        },
    )


def summarize(lines: Sequence[Line], out: Path) -> str:
    """Write table.md, forest.svg and report.html beside runs.jsonl; the text of the table."""
    found = summary(lines)
    if found is None:  # a screen, without final seeds
        several = len({line["rate"] for line in lines}) > 1
        made = ranking(lines) | (choice_table(lines) if several else {})
        text = "\n".join([*markdown_of(made), *([RULE, ""] if several else []), SCREEN, ""])
        (out / "table.md").write_text(text, encoding="utf-8")
        return text
    text = markdown(found)
    (out / "table.md").write_text(text, encoding="utf-8")
    picture = forest(found) if any(row.difference for row in found.rows) else None
    if picture:
        (out / "forest.svg").write_text(picture, encoding="utf-8")
    (out / "report.html").write_text(html(found, picture), encoding="utf-8")
    return text
