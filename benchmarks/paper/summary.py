"""The table and the figure of the committed lines, which the runner before `cvloss compare` wrote. Needs no torch.

python benchmarks/paper/summary.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from axolotl_cvloss.command.compare.running import read_lines
from axolotl_cvloss.command.compare.statistics import mean_and_error, paired

CROSS_ENTROPY = "cross_entropy"
PAPER = ("focal", "generalized_dice", "self_adjusting_dice", "lovasz")  # the four that the paper compares with it
LOSSES = (CROSS_ENTROPY, *PAPER, "dice", "tversky", "dft", "generalized_dice:reference")
RESULTS = Path(__file__).resolve().parent / "results"
Line = dict[str, Any]
# What two lines must share to be compared.
SETTING = (
    "model",
    "dataset",
    "train_examples",
    "steps",
    "batch",
    "validation_examples",
    "test_examples",
    "new_tokens",
    "rates",  # that were tried
    "sweep_seed",  # with which they were tried
    "device",  # on a GPU the base model is in bfloat16
    "inputs",  # a digest of the model's weights and of all rows
)
FORMULAS = (
    "iou",
    "equivalent_iou",
    "overlap",
    "dice",
    "precision",
    "recall",
    "wrong_operators",
    "inverted_operands",
    "missing_steps",
    "extra_steps",
    "repetitions",
)


class Setting:
    """The final runs of one model on one dataset that differ in loss, seed and learning rate alone.

    Of two lines of a loss and a seed the later one counts, as after a change of the rule for the rate.
    """

    def __init__(self, lines: Sequence[Line]) -> None:
        self.about = {name: lines[0][name] for name in SETTING}
        self.untrained = next((line for line in lines if line["stage"] == "untrained"), None)
        self.runs: dict[str, dict[int, Line]] = {}
        for line in (line for line in lines if line["stage"] == "final"):
            self.runs.setdefault(line["loss"], {})[line["seed"]] = line
        known = [loss for loss in LOSSES if loss in self.runs]
        self.losses = known + [loss for loss in self.runs if loss not in known]

    def values(self, loss: str, of: Callable[[Line], float]) -> list[float]:
        return [of(line) for _, line in sorted(self.runs[loss].items())]

    def differences(self, loss: str) -> list[float]:
        """Exact match minus that of cross-entropy, for the seeds that both have."""
        base = self.runs.get(CROSS_ENTROPY, {})
        return [
            line["exact_match"] - base[seed]["exact_match"]
            for seed, line in sorted(self.runs[loss].items())
            if seed in base
        ]

    def complete(self) -> bool:
        """Whether the four losses of the paper have every seed of cross-entropy, as the headline needs."""
        seeds = self.runs.get(CROSS_ENTROPY, {}).keys()
        return bool(seeds) and all(self.runs.get(loss, {}).keys() >= seeds for loss in PAPER)

    def best(self, rank: Callable[[Line], tuple[float, float]]) -> str:
        def mean_rank(loss: str) -> tuple[float, float]:
            ranks = [rank(self.runs[loss][seed]) for seed in self.runs[CROSS_ENTROPY]]
            return fmean(first for first, _ in ranks), fmean(second for _, second in ranks)

        return max(PAPER, key=mean_rank)

    def headline(self) -> dict[str, str]:
        """The paper's way, the best of the four on the test set itself, and the honest way, by the validation rows."""
        return {
            "test": self.best(lambda line: (line["exact_match"], -finite(line["nll"]))),
            "validation": self.best(
                lambda line: (line["validation"]["exact_match"], -finite(line["validation"]["nll"]))
            ),
        }

    def gain(self, loss: str) -> float | None:
        """Relative to cross-entropy, over its seeds."""
        base = self.runs[CROSS_ENTROPY]
        before = fmean(line["exact_match"] for line in base.values())
        after = fmean(self.runs[loss][seed]["exact_match"] for seed in base)
        return after / before - 1 if before else None


def finite(nll: float) -> float:
    """NaN, of a training that diverged, as infinity, which is worse than any other."""
    return math.inf if math.isnan(nll) else nll


def settings(lines: Iterable[Line]) -> list[Setting]:
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        groups.setdefault(tuple(line[name] for name in SETTING), []).append(line)
    return [Setting(group) for group in groups.values() if any(line["stage"] == "final" for line in group)]


# The table


def _percent(mean: float, error: float | None = None, sign: str = "") -> str:
    return f"{100 * mean:{sign}.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(header), _row(["---", *["---:"] * (len(header) - 1)]), *map(_row, rows)]


def _main_rows(setting: Setting) -> list[list[str]]:
    rows = []
    if line := setting.untrained:
        validation = _percent(line["validation"]["exact_match"])
        rows.append(["untrained", "", "", validation, _percent(line["exact_match"]), "", "", f"{line['nll']:.3f}"])
    for loss in setting.losses:
        rates = dict.fromkeys(f"{rate:g}" for rate in setting.values(loss, lambda line: line["lr"]))
        exact = mean_and_error(setting.values(loss, lambda line: line["exact_match"]))
        valid = mean_and_error(setting.values(loss, lambda line: line["validation"]["exact_match"]))
        nll, nll_error = mean_and_error(setting.values(loss, lambda line: line["nll"]))
        differences = setting.differences(loss) if loss != CROSS_ENTROPY else []
        p = paired(differences).p if differences else None
        rows.append(
            [
                loss,
                ", ".join(rates),
                str(len(setting.runs[loss])),
                _percent(*valid),
                _percent(*exact),
                _percent(*mean_and_error(differences), sign="+") if differences else "",
                f"{p:.2f}" if p is not None else "",
                f"{nll:.3f}" + (f" ± {nll_error:.3f}" if nll_error is not None else ""),
            ]
        )
    return rows


def _formula_rows(setting: Setting) -> list[list[str]]:
    rows = []
    if setting.untrained and "iou" in setting.untrained["test"]:
        rows.append(["untrained", *(_percent(setting.untrained["test"][name]) for name in FORMULAS)])
    for loss in setting.losses:
        lines = [line["test"] for line in setting.runs[loss].values()]
        if all("iou" in scores for scores in lines):
            rows.append([loss, *(_percent(fmean(scores[name] for scores in lines)) for name in FORMULAS)])
    return rows


def _gain(value: float | None) -> str:
    return "not defined" if value is None else f"{100 * value:+.0f}%"


def markdown(lines: Sequence[Line], formulas: bool = True) -> str:
    """The tables; without those of the formula metrics where they are not wanted."""
    found = settings(lines)
    if not found:
        return "No finished runs yet.\n"
    text = [
        "Exact match in percent, mean ± standard error over seeds. Every loss but cross_entropy is mixed: 0.6 "
        "cross_entropy + 0.4 of it.",
        "`:reference` is the loss as the paper's code computes it. The learning rate is chosen for each loss on the "
        "validation rows.",
        "p: paired t-test over the seeds against cross_entropy, not corrected for the number of losses.",
        "",
    ]
    for setting in found:
        about = setting.about
        text += [
            f"### {about['dataset']}, {about['model']}",
            "",
            f"{about['train_examples']} training examples, {about['steps']} steps of {about['batch']}; "
            f"{about['validation_examples']} validation and {about['test_examples']} test examples; "
            f"answers of at most {about['new_tokens']} tokens; learning rates {about['rates'].replace(' ', ', ')}; "
            f"{about['device']}; weights and rows `{about['inputs']}`.",
            "",
        ]
        header = ["loss", "lr", "seeds", "validation", "exact match", "minus cross_entropy", "p", "NLL"]
        text += [*_table(header, _main_rows(setting)), ""]
        if formulas and (rows := _formula_rows(setting)):
            text += [*_table(["formulas, %", *(name.replace("_", " ") for name in FORMULAS)], rows), ""]
    text += _headline(found)
    return "\n".join(text)


def _headline(found: Sequence[Setting]) -> list[str]:
    ready = [setting for setting in found if setting.complete()]
    if not ready:
        return []
    rows, gains = [], {"test": [], "validation": []}
    for setting in ready:
        cells = [f"{setting.about['dataset']}, {setting.about['model']}"]
        for split, loss in setting.headline().items():
            gain = setting.gain(loss)
            gains[split].append(gain)
            cells.append(f"{loss}: {_gain(gain)}")
        rows.append(cells)
    means = []
    for values in gains.values():
        defined = [value for value in values if value is not None]
        means.append(_gain(fmean(defined)) if defined else "not defined")
    if len(ready) > 1:
        rows.append(["mean where it is defined", *means])
    return [
        "### Relative gain in exact match over cross_entropy",
        "",
        "The paper's headline takes the best of its four losses for each task, by the test set. Beside it the gain of "
        "the one that the validation rows choose.",
        "A gain is not defined where cross_entropy has no exact match at all.",
        "",
        *_table(["", "chosen on the test set, as in the paper", "chosen on the validation rows"], rows),
        "",
    ]


# The figure


def plot(lines: Sequence[Line], path: Path) -> None:
    """Exact match of every seed, mean and standard error; a panel for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = settings(lines)
    figure, axes = plt.subplots(
        1,
        len(found),
        figsize=(5.5 * len(found), 1.5 + 0.4 * max(len(s.losses) for s in found)),
        layout="constrained",
        squeeze=False,
    )
    for axis, setting in zip(axes[0], found, strict=True):
        for y, loss in enumerate(setting.losses):
            values = [100 * value for value in setting.values(loss, lambda line: line["exact_match"])]
            mean, error = mean_and_error(values)
            axis.plot(values, [y] * len(values), "o", color="0.7", ms=4)
            axis.errorbar(mean, y, xerr=error, fmt="D", color="C0", ms=5, capsize=3)
            if loss == CROSS_ENTROPY:
                axis.axvline(mean, color="C0", lw=0.8, ls="--")
        if setting.untrained:
            axis.axvline(100 * setting.untrained["exact_match"], color="C1", lw=0.8, ls=":", label="untrained")
        axis.set(yticks=range(len(setting.losses)), yticklabels=setting.losses, xlabel="exact match, %")
        axis.set_title(f"{setting.about['dataset']}, {setting.about['model']}", fontsize="medium")
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def summarize(folder: Path) -> str:
    """Write table.md and exact_match.png beside runs.jsonl; the text of the table."""
    lines = read_lines(folder / "runs.jsonl")
    text = markdown(lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text, encoding="utf-8")
    if settings(lines):
        plot(lines, folder / "exact_match.png")
    return text


if __name__ == "__main__":
    print(summarize(RESULTS))
