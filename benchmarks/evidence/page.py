"""docs/evidence.md, the table of verdicts in docs/which-loss.md, and table, figure and report of every task, from the
lines in results/.

python benchmarks/evidence/page.py
"""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from axolotl_cvloss.command.compare import report
from axolotl_cvloss.command.compare.plan import BASELINE, choose_rate
from axolotl_cvloss.command.compare.report import Summary, summarize, summary, title
from axolotl_cvloss.command.compare.running import read_lines

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "evidence.md"
GUIDE = ROOT / "docs" / "which-loss.md"
GUIDE_START, GUIDE_END = "<!-- Verdicts: written by benchmarks/evidence/page.py -->", "<!-- end of verdicts -->"
EXPLAIN = HERE / "results" / "explain.jsonl"
SAME = ("", "_chosen")  # what data kept back can confirm
FOLDERS = (*SAME, "_kept_back", "_screen", "_long", "_large", "_again", "_others")  # beside results/TASK


@dataclass
class Task:
    """``choice_seeds`` and ``seeds`` are those of the plan; ``more`` has, by the end of its folder's name, what a
    comparison beside the task's adds to its heading, and what is said about it."""

    heading: str
    about: str
    choice_seeds: tuple[int, ...]
    seeds: tuple[int, ...]
    more: dict[str, tuple[str, str]] = field(default_factory=dict)


TASKS = {
    "slots": Task(
        "Slots of SNIPS, from scratch",
        "Words in, a tag a word out: segmentation of text, literally. A Llama of 0.7 million weights that has seen "
        "nothing, 200 steps of 32 sentences, less than half an epoch. Right are all spans of a sentence with their "
        "labels (exact match); F1 is that of the spans. The rates 4.5e-3 and 6e-3 were added after the first final "
        "runs, as all objectives had preferred the higher of two.",
        (0,),
        tuple(range(1, 9)),
        {
            "_chosen": (
                ": the best of its screen",
                "The five best losses of the screen, with fresh seeds and on the test rows, each at its own rate.",
            ),
            "_long": (
                ": four times as long",
                "800 steps, nearly two epochs, with fresh seeds: is a gain one of short training? All at one rate, a "
                "good one for each at 200 steps.",
            ),
            "_large": (
                ": a model four times as large",
                "2.8 million weights, 256 wide in place of 96, with fresh seeds, all at one rate.",
            ),
        },
    ),
    "slots_further": Task(
        "Slots of SNIPS, from a model of other intents",
        "Pretraining in small: the Llama of the first task after 800 steps of cross-entropy on four of the seven "
        "intents, then trained for 60 steps of 32 sentences of the three others, with tags of which it has seen some. "
        "The rate 9e-3 was added after the first five final runs, as the losses preferred the highest of three.",
        (0,),
        tuple(range(1, 9)),
    ),
    "problems": Task(
        "Word problems, from scratch",
        "The problems of `make demo`: question in, formulas and `#### number` out. A Llama of 0.6 million weights that "
        "has seen nothing, 300 steps of 64 problems. Right is the number. The rate 4.5e-3 and two of the three choice "
        "seeds were added after the first final runs, as one seed alone moves the score of a rate by ten points.",
        (0, 9, 10),
        tuple(range(1, 9)),
        {
            "_others": (
                ": what gains on slots",
                "Two of the losses that gain on slots, on the problems kept back, at the rate of cross_entropy and "
                "beside the same runs of it as above. They were trained after focal and topk_cross_entropy had been "
                "published as a table of their own (spherical_z had been meant to be with them, and there was no "
                "time). With all four in one table Holm's correction would make the p-value of focal 0.068 and that "
                "of weighted_cross_entropy 0.099: neither would be decided.",
            ),
            "_again": (
                ": what is barely decided, once more",
                "Eight fresh seeds on the same rows, for the two of which the tables above just so decide that they "
                "are better. Each was planned in a commit before it ran, and these seeds decide alone: none are "
                "pooled.",
            ),
            "_long": (": three times as long", "900 steps, with fresh seeds, all at one rate."),
        },
    ),
    "intents": Task(
        "Long-tailed intents, from scratch",
        "A sentence in, one of seven names out, of which the rarest was seen 15 times; one token an answer, so sets "
        "are micro-batches. The small Llama, 200 steps of 32 sentences. F1 macro counts all names alike.",
        (0,),
        tuple(range(1, 9)),
    ),
    "intents_pretrained": Task(
        "Long-tailed intents, pretrained",
        "Sentences and names as text, with SmolLM2-135M-Instruct, all weights trained, 60 steps of 8. Of the seven "
        "names the rarest is in 15 of 2,786 training rows, of which a run sees 480; the test rows have all alike. Sets "
        "are micro-batches. The weights come from a file with 4 bits each.",
        (0,),
        (1, 2, 3),
    ),
    "slots_text": Task(
        "Slots as text, pretrained",
        "A sentence in, `artist: westbam; album: allergic` out, with SmolLM2-135M-Instruct, all weights trained, 100 "
        "steps of 8 of 640 sentences. Right are all slots of a sentence; F1 is that of the slots. All at one rate, "
        "between two that were level in a trial of cross_entropy; the weights come from a file with 4 bits each.",
        (0,),
        (1, 2, 3),
    ),
}
INTRODUCTION = """# Evidence

Does another objective than cross-entropy help? Made with `cvloss compare` ([how it works](compare.md)): where several
rates are tried, each objective has its own chosen on validation rows with seeds of their own; then it is trained with
fresh seeds, and scored on test rows, on which no objective was chosen. The lines of all runs are in
`benchmarks/evidence/results`, and this page is written from them; how to make them
again says [benchmarks/evidence](../benchmarks/evidence/README.md). If nothing else is said, a mix is 0.6 of
cross-entropy and 0.4 of the other loss, and `k` of topk_cross_entropy is 0.3.
"""
READING = """**What gains is short training from scratch, on slots and on long-tailed intents.** Four losses gain on
slots, and the two of them that were tried gain on intents; after four times the steps on slots no difference of these
two to cross_entropy could be detected, and from a model that has learned other intents none of the four gains, and
topk_cross_entropy loses. On word problems focal and weighted_cross_entropy were better with eight seeds, by nearly
five points, and undecided, by about three, with eight others; sparsemax, one of the four, loses. With a pretrained
language model nothing is decided; on slots as text the three that were tried were all below cross_entropy. You may
gain if you train from scratch with few steps; for fine-tuning, nothing here speaks for another objective than
cross-entropy.
"""
RULES = f"""{report.RULE}

{report.READING}

Means ± standard errors over seeds; differences are of the same seeds. A seed is the order of the training rows: all
runs of a task start from the same weights.
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
            text += [*written(name, found, decided=not unsettled), *other_rates(found), *left(task, found)]
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
    return [*text, *report.markdown_of(report.tables(found), level), f"{facts}\n"]


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
        once_more = {"once more": summary_of(f"{name}_again")}
        kept = {"on data kept back": summary_of(f"{name}_kept_back"), **once_more}
        again = {**dict.fromkeys(SAME, kept), "_others": once_more}
        for end, (added, _) in {"": ("", ""), **task.more}.items():
            if (found := summary_of(name + end)) is None:
                continue
            heading = task.heading + added
            seeds = str(max(len(row.seeds) for row in found.rows))
            of = by_verdict(found.rows, again.get(end, {}), settled=bool(end) or not caution(task, found))
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
            figure = _points(row)
            looks = [(said, _row_of(row.name, other)) for said, other in again.items()]
            found = [(said, other) for said, other in looks if other]
            if found:
                told = "; ".join(f"{said} {_points(other).strip()}: {other.verdict}" for said, other in found)
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
    error = row.difference.error
    return f" {100 * row.difference.mean:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def finals_of(found: Summary) -> dict[tuple[str, float], dict[int, float]]:
    """The score of each final run by its seed."""
    runs: dict[tuple[str, float], dict[int, float]] = {}
    for line in found.lines:
        if line["stage"] == "final":
            runs.setdefault((line["objective"], line["rate"]), {})[line["seed"]] = line["scores"][found.metric]
    return runs


def other_rates(found: Summary) -> list[str]:
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
    return report.markdown_of({"Final runs at other rates": (header, rows)}) if rows else []


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
EXPLAINED = """## Where the losses pull

We had supposed that topk_cross_entropy gains as it leaves easy tokens out, that focal does the same softly, and that
lovasz and dice hardly differ from cross-entropy. One training with cross_entropy a task, at 3e-3; on the way, at the
steps of the tables, each loss alone had its gradient taken on the same four micro-batches. What the figures show of
the tasks from scratch:

- Pulling on hard tokens is not enough to gain. focal has more of its pull on tokens with p < 0.5 than cross_entropy,
  and at half of the training and at its end more than topk_cross_entropy has; it is not told from cross_entropy.
- On slots the four that gain are, of the losses with a gradient worth mentioning there, those whose gradient has
  another direction at the start, when no token is easy yet:
  the cosines of topk_cross_entropy, weighted_cross_entropy and sparsemax with cross_entropy are below 0.7, that of
  spherical_z falls to 0.8. focal and aldr, not decided, have its direction. Later the four lie nearer to it, but for
  spherical_z, and topk_cross_entropy has then about 1 / k times its length, as the hardest tokens have most of its
  gradient anyway. Length alone should do little: AdamW divides by it, and gradients above 1 are cut to 1 here.
- lovasz, generalized_dice and self_adjusting_dice have next to no gradient at the start of slots, and later a share of
  less than a third. Their direction is another one, and more of their pull is on easy tokens than that of
  cross_entropy, not less.

So on slots the part of the supposition about easy tokens is not borne out. Perhaps what cross-entropy learns first is
how frequent each tag is, most of all that most words have none, and a loss that counts rare tags more, or the worst
tokens of each sentence, learns less of that. In the screen topk_cross_entropy at the start alone had 49.4 %, later
alone 45.9, throughout 55.0 and cross_entropy 41.6, one seed each on validation rows. All this would fit, and is not a
proof.

From a model of other intents the first steps fit, too: it knows already that most words have no tag, more than half of
the tokens are easy, 96 % of the pull of cross_entropy is on the hard ones, and topk_cross_entropy,
weighted_cross_entropy and sparsemax have its direction (cosines of 0.88 and more). But by a tenth of the training they
have left it as far as on slots (0.52 to 0.61), and none of them gains: so another direction does not explain the gains.

The pull of a loss on a token is the norm of its gradient in the token's hidden state, and is summed; the last two
tables are of the gradient in all weights.
"""


def main() -> None:
    for name in TASKS:
        for end in FOLDERS:
            if lines := lines_of(name + end):
                summarize(lines, results(name + end))
    PAGE.write_text(page(), encoding="utf-8")
    GUIDE.write_text(guide(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
