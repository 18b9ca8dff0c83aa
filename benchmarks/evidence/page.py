"""docs/evidence.md, and table, figure and report of every task, from the lines in results/.

python benchmarks/evidence/page.py
"""

from pathlib import Path
from statistics import fmean

from axolotl_cvloss.command.compare.plan import choose_rate
from axolotl_cvloss.command.compare.report import Summary, markdown, summarize, summary, title
from axolotl_cvloss.command.compare.running import read_lines

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "evidence.md"

TASKS = {
    "slots": (
        "Slots of SNIPS, from scratch",
        "Words in, a tag a word out: segmentation of text, literally. A Llama of 0.7 million weights that has seen "
        "nothing, 200 steps of 32 sentences, less than half an epoch. Right are all spans of a sentence with their "
        "labels (exact match); F1 is that of the spans. The rates 4.5e-3 and 6e-3 were added after the first final "
        "runs, as all objectives had preferred the higher of two.",
    ),
    "problems": (
        "Word problems, from scratch",
        "The problems of `make demo`: question in, formulas and `#### number` out. A Llama of 0.6 million weights that "
        "has seen nothing, 300 steps of 64 problems. Right is the number.\n\n"
        "**Nothing is decided here, whatever the table says.** The rate was chosen with one seed, which alone moves "
        "the score by ten points and more, and it took the worse rate for cross_entropy: its final runs at 3e-3, the "
        "rate of topk_cross_entropy, are far above those in the table (final runs at other rates, below it). Most of "
        "the gap is one of rates, and the rest is not decided. More seeds of the choice and higher rates are to be run "
        "before anything is read from it.",
    ),
}
SEEDS = range(1, 9)  # of the plan
INTRODUCTION = """# Evidence

Does another objective than cross-entropy help? Made with `cvloss compare` ([how it works](compare.md)): for each
objective the learning rate is chosen on validation rows with a seed of its own, then it is trained with fresh seeds,
and scored on test rows, on which nothing was chosen. The lines of all runs are in
`benchmarks/evidence/results`, and this page is written from them; how to make them
again says [benchmarks/evidence](../benchmarks/evidence/README.md). All mixes are 0.6 of cross-entropy and 0.4 of the
other loss.
"""


def results(task: str) -> Path:
    return HERE / "results" / task


def page() -> str:
    text = [INTRODUCTION]
    for task, (heading, about) in TASKS.items():
        found = summary(read_lines(results(task) / "runs.jsonl"))
        if found is not None:
            text += [f"## {heading}\n", f"{about}\n"]
            if any(row.difference for row in found.rows):
                text += [f"![Differences from cross_entropy](../benchmarks/evidence/results/{task}/forest.svg)\n"]
            text += [markdown(found), *other_rates(found), *left(found)]
    return "\n".join(text)


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
    shown = {(row.name, row.rate) for row in found.rows}
    if not runs.keys() - shown:
        return []
    text = ["### Final runs at other rates", ""]
    text += [
        f"| objective | rate | seeds | {title(found.metric)}, % | the same seeds in the table, % |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    rates = {row.name: row.rate for row in found.rows}
    for (name, rate), own in sorted(runs.items()):
        if (name, rate) not in shown:
            beside = runs[name, rates[name]]
            seeds = sorted(own.keys() & beside.keys())
            both = [f"{100 * fmean(scores[seed] for seed in seeds):.1f}" if seeds else "" for scores in (own, beside)]
            text.append(f"| {name} | {rate:g} | {len(seeds)} | {both[0]} | {both[1]} |")
    return [*text, ""]


def left(found: Summary) -> list[str]:
    """What of the plan has not been run."""
    runs = finals_of(found)
    missing = []
    for row in found.rows:
        choice = [line for line in found.lines if line["stage"] == "choice" and line["objective"] == row.name]
        rate = choose_rate(choice) if choice else row.rate
        if seeds := [seed for seed in SEEDS if seed not in runs.get((row.name, rate), {})]:
            missing.append(f"{row.name} at {rate:g}: seeds {', '.join(map(str, seeds))}")
    return [f"Not run yet: {'; '.join(missing)}.\n"] if missing else []


def main() -> None:
    for task in TASKS:
        if (results(task) / "runs.jsonl").exists():
            summarize(read_lines(results(task) / "runs.jsonl"), results(task))
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
