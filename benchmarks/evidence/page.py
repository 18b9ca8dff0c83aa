"""docs/evidence.md, and table, figure and report of every task, from the lines in results/.

python benchmarks/evidence/page.py
"""

from pathlib import Path

from axolotl_cvloss.command.compare.report import markdown, summarize, summary
from axolotl_cvloss.command.compare.running import read_lines

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "evidence.md"

TASKS = {
    "slots": (
        "Slots of SNIPS, from scratch",
        "Words in, a tag a word out: segmentation of text, literally. A Llama of 0.7 million weights that has seen "
        "nothing, 200 steps of 32 sentences, less than half an epoch. Right are all spans of a sentence with their "
        "labels (exact match); F1 is that of the spans. Every objective prefers the higher of two rates. One run of "
        "cross_entropy at 8e-3, before this plan, had 35.4 % on the validation rows, so its best rate lies between "
        "1.5e-3 and 8e-3; rates of between were not tried.",
    ),
    "problems": (
        "Word problems, from scratch",
        "The problems of `make demo`: question in, formulas and `#### number` out. A Llama of 0.6 million weights that "
        "has seen nothing. Right is the number.",
    ),
}
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
            text += [markdown(found)]
    return "\n".join(text)


def main() -> None:
    for task in TASKS:
        if (results(task) / "runs.jsonl").exists():
            summarize(read_lines(results(task) / "runs.jsonl"), results(task))
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
