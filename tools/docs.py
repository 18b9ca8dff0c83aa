"""Write the table of losses in README.md, and pages and tables of docs/: python tools/docs.py.

They come from the docstrings and from the committed results of the benchmarks. A test keeps them equal.
"""

import json
import re
import sys
from pathlib import Path

from axolotl_cvloss import available_losses
from axolotl_cvloss.command import answer
from axolotl_cvloss.command.curves import Curve, NotACurve, curve, save
from axolotl_cvloss.command.descriptions import VISIT, described, plain
from axolotl_cvloss.engine.families import FAMILIES
from axolotl_cvloss.engine.terms import Loss

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"
EXPERIMENT, PERFORMANCE = REPOSITORY / "docs" / "paper-experiment.md", REPOSITORY / "docs" / "performance.md"
PAGES = REPOSITORY / "docs" / "losses"
PICTURE = REPOSITORY / "docs" / "curves.png"
REGION_PICTURE = REPOSITORY / "docs" / "region.png"
LOOKED_AT = ("dice", "generalized_dice", "lovasz", "cross_entropy")
START, END = "<!-- Losses: written by tools/docs.py -->", "<!-- end of losses -->"
SPEED_START, SPEED_END = "<!-- Speed: written by tools/docs.py -->", "<!-- end of speed -->"
ROWS_START, ROWS_END = "<!-- All logits: written by tools/docs.py -->", "<!-- end of all logits -->"
ROWS = REPOSITORY / "benchmarks" / "results" / "statistics_cost_cpu.json"
SPEED = REPOSITORY / "benchmarks" / "results" / "loss_cost_cpu.json"
GPU_START, GPU_END = "<!-- GPU: written by tools/docs.py -->", "<!-- end of GPU -->"
BENCHMARKS = REPOSITORY / "benchmarks"
PAPER_START, PAPER_END = "<!-- Paper: written by tools/docs.py -->", "<!-- end of paper -->"
PAPER = REPOSITORY / "benchmarks" / "paper"
SPEED_CASES = (
    "F.linear_cross_entropy, chunked",
    "floor: 3 matrix products",
    "cross_entropy",
    "focal",
    "0.6 cross_entropy + 0.4 generalized_dice, full logits",
    "0.6 cross_entropy + 0.4 generalized_dice",
    "0.6 cross_entropy + 0.4 tversky",
    "0.6 cross_entropy + 0.4 lovasz",
    "0.6 cross_entropy + 0.2 generalized_dice + 0.2 lovasz",
    "gem",
    "sparsemax",
    "floor: 2 matrix products, frozen head",
    "0.6 cross_entropy + 0.2 generalized_dice + 0.2 lovasz, frozen head",
)


def built_in() -> dict[str, list[Loss]]:
    """The losses of each family that has some; not those of other packages, which may be installed too."""
    losses = [loss for loss in available_losses().values() if loss.built_in]
    families = {family: [loss for loss in losses if loss.family == family] for family in FAMILIES}
    return {family: found for family, found in families.items() if found}


def between(text: str, start: str, end: str, written: str) -> str:
    """The text with something else between two marks."""
    return f"{text.split(start)[0]}{start}\n{written}\n{end}{text.split(end)[1]}"


def shape(settings: dict) -> str:
    """Of a benchmark's hidden states and head."""
    return ", ".join(f"{short} {settings[name]}" for short, name in (("N", "rows"), ("H", "hidden"), ("V", "vocab")))


def readme(text: str) -> str:
    """The README with a new table of losses."""
    rows = [("key", "what it is")]
    for family, losses in built_in().items():
        page = f"{PAGES.relative_to(REPOSITORY)}/{family}.md"
        for loss in losses:
            first = re.split(r"[;:] |\. ", described(loss)["summary"])[0].rstrip(".")
            rows.append((f"[`{loss.name}`]({page}#{loss.name})", first))
    return between(text, START, END, table(rows))


def speed(text: str) -> str:
    """The page of performance with a new table of seconds and memory, as ratios to cross-entropy on full logits."""
    measured = json.loads(SPEED.read_text(encoding="utf-8"))
    results = {row["case"]: row for row in measured["results"]}
    rows = [("forward and backward", "time", "over the rounds", "peak memory")]
    for name in SPEED_CASES:
        row = results[name]
        spread = f"{row['time_ratio_min']:.2f} to {row['time_ratio_max']:.2f}"
        rows.append((f"`{name}`", f"{row['time_ratio']:.2f}", spread, f"{row['memory_ratio']:.2f}"))
    rounds = sorted({row["rounds"] for row in results.values() if row["case"] != row["base"]})
    rounds = " to ".join(str(number) for number in dict.fromkeys((rounds[0], rounds[-1])))
    machine, settings = measured["machine"], measured["settings"]
    about = (
        f"{machine['cpu']}, {machine['torch threads']} threads, torch {machine['torch']}; {shape(settings)}, "
        f"{settings['dtype']}; median of {rounds} rounds, each case in a process of its own."
    )
    return between(text, SPEED_START, SPEED_END, f"{table(rows)}\n\n{about}")


def all_logits(text: str) -> str:
    """The page of performance with a new table of the losses that look at all logits, as ratios to cross_entropy."""
    measured = json.loads(ROWS.read_text(encoding="utf-8"))
    rows = [("loss", "time, cross_entropy 1", "over the rounds")]
    for row in sorted(measured["results"], key=lambda row: row["ratio"]):
        if row["loss"] != "cross_entropy":
            spread = f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}"
            rows.append((f"`{row['loss']}`", f"{row['ratio']:.2f}", spread))
    machine, settings = measured["machine"], measured["settings"]
    about = (
        f"{machine['cpu']}, one thread, torch {machine['torch']}; {shape(settings)}, {settings['dtype']}; seconds of "
        f"the processor, median of {measured['rounds']} rounds by turns in one process; the machine had other work."
    )
    return between(text, ROWS_START, ROWS_END, f"{table(rows)}\n\n{about}")


def gpu(text: str) -> str:
    """The page of performance with what was measured on a GPU, or with the figures of a model before it was."""
    sys.path.append(str(BENCHMARKS))
    import gpu_report

    said, tables = gpu_report.described(gpu_report.lines_of(gpu_report.RESULTS))
    found = "\n\n".join([said, *map(table, tables)])
    if (picture := gpu_report.RESULTS.with_suffix(".png")).exists():
        found += f"\n\n![Milliseconds of heads on a GPU](../{picture.relative_to(REPOSITORY)})"
    return between(text, GPU_START, GPU_END, found)


def paper(text: str) -> str:
    """The page of evidence with the results of the paper's experiment."""
    sys.path.append(str(PAPER))
    import summary

    found = summary.markdown(summary.read_lines(PAPER / "results" / "runs.jsonl"), formulas=False)
    return between(text, PAPER_START, PAPER_END, found.removesuffix("\n"))


def page(family: str, losses: list[Loss]) -> str:
    """The page of a family."""
    kind = FAMILIES[family]
    lines = [
        "<!-- Written by tools/docs.py from the docstrings. -->",
        f"# Losses of the family {family}",
        f"{kind.words} Cost: {kind.cost}. {VISIT}",
        table([("given to the loss", ""), *((f"`{name}`", said) for name, said in kind.statistics.items())]),
    ]
    if family == "token":
        lines += [
            "Value, and pull of the gradient on the logit of the target, for those that are functions of its "
            "probability p alone, with default parameters. `cvloss plot` draws them with others.",
            f"![value and pull against p](../{PICTURE.name})",
        ]
    if {loss.name for loss in losses} & set(LOOKED_AT) and family != "token":
        lines += [
            f"Value and gradient on the answer `{' '.join(answer.ANSWER)}`, beside those of cross_entropy: against the "
            "probability p of its last token, and, with p as it stands on the left, what the gradient adds to each "
            "logit. `cvloss plot` draws it for any loss.",
            f"![value against p, and a map of the gradient](../{REGION_PICTURE.name})",
        ]
    for loss in losses:
        said = described(loss)
        lines += [f"## {loss.name}", said["summary"], *said["remarks"]]
        lines.append(f"`{said['formula']}`")
        if said["parameters"]:
            parameters = [(f"`{p['name']}`", plain(p["default"]), p["allowed"]) for p in said["parameters"]]
            lines.append(table([("parameter", "default", "allowed"), *parameters]))
        facts = [("Helps", said["helps"]), ("Hurts", said["hurts"]), ("Source", linked(said["source"]))]
        if said["requires"]:
            facts.append(("Needs", f"the package `{said['requires']}`"))
        if said["reference"]:
            facts.append(("Reference", "with `reference: true` as the paper's code has it"))
        lines.append("\n".join(f"- {name}: {text}" for name, text in facts if text))
    return "\n\n".join(lines) + "\n"


def table(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *body = (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def linked(source: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", source)


def curves() -> dict[str, Curve]:
    """Of the losses of the family token that have one."""
    found = {}
    for loss in built_in()["token"]:
        try:
            found[loss.name] = curve(loss, loss.parameters().model_dump())
        except NotACurve:
            continue
    return found


def looks() -> dict[str, answer.Look]:
    """Of the losses in the picture of the made answer."""
    losses = available_losses()
    return {name: answer.look(losses[name], losses[name].parameters().model_dump()) for name in LOOKED_AT}


def pages() -> dict[Path, str]:
    return {PAGES / f"{family}.md": page(family, losses) for family, losses in built_in().items()}


if __name__ == "__main__":
    PAGES.mkdir(parents=True, exist_ok=True)
    for path in PAGES.glob("*.md"):
        path.unlink()
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    of_speed = ((PERFORMANCE, written) for written in (speed, all_logits, gpu))
    for path, written in ((README, readme), *of_speed, (EXPERIMENT, paper)):
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
    save(curves(), PICTURE)
    answer.save(looks(), REGION_PICTURE)
