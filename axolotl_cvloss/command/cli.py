"""The command ``cvloss``, also ``axolotl cvloss``: losses, what a config means, curves.

Only click is imported at the top, so that ``--help`` is quick: the losses bring torch along.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from .compare.command import compare, predict

if TYPE_CHECKING:
    from ..losses.registry import Loss
    from .checking import Report

WIDE = 110  # columns of a terminal that a table of many columns needs

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="axolotl-cvloss")
def cli() -> None:
    """Losses for the key cv_loss: list them, check and probe a config, plot curves, compare objectives."""


@cli.command("list")
@as_json
def list_(as_json: bool) -> None:
    """All losses: formula, what they need, cost and source."""
    from ..losses.registry import available_losses
    from .descriptions import VISIT, cost, described, needs

    losses = available_losses().values()
    if as_json:
        _print_json([described(loss) for loss in losses])
        return
    _print_table(
        ("loss", "family", "formula", "needs", "cost", "source"),
        [(loss.name, loss.family, loss.formula, needs(loss), cost(loss), loss.source) for loss in losses],
    )
    if sys.stdout.isatty():
        click.echo(VISIT)


@cli.command()
@click.argument("loss")
@as_json
def show(loss: str, as_json: bool) -> None:
    """One loss: formula, parameters, source, when it helps and when it hurts. Or examples: its fields."""
    from .checking import examples_fields
    from .descriptions import described, plain

    if loss == "examples":
        columns, fields = ("field", "default", "allowed", "meaning"), examples_fields()
        if as_json:
            _print_json([dict(zip(columns, field, strict=True)) for field in fields])
        else:
            _print_table(columns, fields)
        return
    said = described(_loss(loss))
    if as_json:
        _print_json(said)
        return
    click.echo(f"{said['name']}: {said['summary'] or 'no description'}\n")
    for paragraph in said["remarks"]:
        click.echo(paragraph + "\n")
    for name in ("formula", "source", "family", "cost", "helps", "hurts"):
        if said[name]:
            click.echo(f"{name + ':':<9}{said[name]}")
    for number, (name, what) in enumerate(said["needs"].items()):
        click.echo(f"{'' if number else 'needs:':<9}{name}: {what}")
    if said["requires"]:
        click.echo(f"{'':<9}the package {said['requires']}")
    if said["reference"]:
        click.echo("also:    as the paper's code has it, with reference: true")
    click.echo()
    if said["parameters"]:
        rows = [(p["name"], plain(p["default"]), p["allowed"]) for p in said["parameters"]]
        _print_table(("parameter", "default", "allowed"), rows)
        click.echo()
    given = "".join(f", {p['name']}: {plain(p['default'])}" for p in said["parameters"])
    click.echo(f"cv_loss:\n  {said['name']}: {{weight: 1{given}}}")


@cli.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--host", type=click.Choice(["axolotl", "trl"]), help="What the config is for, if its keys do not say.")
@as_json
def check(config: Path, host: str | None, as_json: bool) -> None:
    """Check the YAML of Axolotl or TRL, or a sweep file, and say which objective it means. No model is loaded.

    The exit code is 1 where training would stop, or would train with another loss.
    """
    from ..objective.objective import Objective
    from .checking import Report, check_file, examples_words, term_rows

    report = check_file(config, host)

    def meant(of: Report) -> dict[str, Any]:
        parsed = of.config
        return {"objective": parsed and str(Objective(parsed)), "cv_loss": parsed and parsed.dump()}

    if as_json:
        swept = [{"value": value, **meant(one), "errors": one.errors} for value, one in report.values.items()]
        _print_json(
            {
                "config": str(config),
                "host": report.host,
                **meant(report),
                **({} if report.runs is None else {"runs": report.runs, "values": swept}),
                "errors": report.errors,
                "warnings": report.warnings,
                "notes": report.notes,
            }
        )
    else:
        for value, one in (report.values or {"": report}).items():
            if value:
                click.echo(value)
            if one.config is not None:
                click.echo(f"objective: {meant(one)['objective']}\n")
                _print_table_of(term_rows(one.config))
                if said := examples_words(one.config):
                    click.echo(f"\nexamples: {said}")
                click.echo()
        for kind, lines in (("error", report.errors), ("warning", report.warnings), ("note", report.notes)):
            for line in lines:
                click.echo(f"{kind}: {line}", err=kind == "error")
        if not report.errors:
            of_host = {"axolotl": "for Axolotl", "trl": "for TRL", None: "as far as the key cv_loss goes"}
            if report.runs is not None:
                click.echo(f"{config}: a sweep of {report.runs} runs")
            click.echo(f"{config}: fine {of_host[report.host]}")
    sys.exit(1 if report.errors else 0)


@cli.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--batches", type=click.IntRange(min=1), default=8, show_default=True, help="Micro-batches to look at.")
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Also the weight that would give each term this share of the gradient, the others as they are.",
)
@click.option("--host", type=click.Choice(["axolotl", "trl"]), help="What the config is for, if its keys do not say.")
@as_json
def probe(config: Path, batches: int, share: float | None, host: str | None, as_json: bool) -> None:
    """What each term of CONFIG does: its gradient on the first micro-batches, and its share of the whole.

    The model and the data are loaded as the host does; nothing is trained or saved.
    """
    import tempfile

    from .checking import check_file

    host = _host(config, check_file(config, host))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "probe.json"
        more = ["--batches", str(batches), *(() if share is None else ("--share", str(share)))]
        if not _in_process("probing", host, str(config), str(out), *more):
            raise click.ClickException(f"{config} could not be probed; the reason is above")
        said = json.loads(out.read_text())
    if as_json:
        _print_json({"config": str(config), "host": host, **said})
        return

    _print_probe(said)


@cli.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="A folder that is new.")
@click.option("--host", type=click.Choice(["axolotl", "trl"]), help="What the config is for, if its keys do not say.")
def reference(config: Path, out: Path, host: str | None) -> None:
    """Make the column that anchored, prior_weighted and importance_weighted need: log p under the model of CONFIG.

    Model and data are loaded as the host does. The folder gets the examples as tokens with the column, and the config
    that trains on them, which is printed. The same call goes on where one was killed.
    """
    import yaml

    from .checking import check, with_references

    data = yaml.safe_load(config.read_text(encoding="utf-8"))
    data = data if isinstance(data, Mapping) else {}
    if "cv_loss" in data:  # with the column that the config has not got yet
        data = {**data, "cv_loss": with_references(data["cv_loss"])}
    if not _in_process("referencing", _host(config, check(data, host)), str(config), str(out)):
        raise click.ClickException(f"no reference could be made of {config}; the reason is above")
    click.echo((out / "config.yaml").read_text(encoding="utf-8"), nl=False)


@cli.command()
@click.argument("losses", nargs=-1, required=True, metavar="LOSS...")
@click.option(
    "-p",
    "given",
    multiple=True,
    metavar="NAME=VALUE",
    help="A parameter, for all losses that have it. Given more than once, there is a curve for each value.",
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default="curves.png", show_default=True)
@as_json
def plot(losses: Sequence[str], given: Sequence[str], out: Path, as_json: bool) -> None:
    """Value and gradient of losses: against the probability p of the target, where they depend on nothing else.

    For example: cvloss plot cross_entropy focal -p gamma=1 -p gamma=3

    If one depends on more, as those of whole answers do, all are drawn on a small made answer: against p of its last
    token, and as a map of the gradient over its rows and the vocabulary. For example: cvloss plot dice lovasz

    With --json the points are printed, and no picture is made.
    """
    from . import answer, curves

    values = _given(given)
    chosen = [_loss(name) for name in losses]
    known = {name for loss in chosen for name in loss.parameters.model_fields}
    for name in values:
        if name not in known:
            raise click.ClickException(f"-p {name}: none of these losses has it; they have: {', '.join(sorted(known))}")
    lines = {}
    for loss in chosen:
        own = [[(name, value) for value in values[name]] for name in values if name in loss.parameters.model_fields]
        for combination in product(*own):
            label = " ".join([loss.name, *(f"{name}={value}" for name, value in combination)])
            lines[label] = loss, _parameters(loss, dict(combination))
    found: dict[str, Any]
    picture: Any = curves
    why = ""
    try:
        found = {label: curves.curve(*line) for label, line in lines.items()}
    except curves.NotACurve as error:
        found, picture = {label: answer.look(*line) for label, line in lines.items()}, answer
        why = f"; on a made answer, as {error}"
    if as_json:
        _print_json({label: {k: v.tolist() for k, v in c._asdict().items()} for label, c in found.items()})
        return
    try:
        picture.save(found, out)
    except ModuleNotFoundError as error:
        raise click.ClickException('plot needs matplotlib: pip install "axolotl-cvloss[plot]"') from error
    except (ValueError, OSError) as error:
        raise click.ClickException(f"{out}: {error}") from error
    click.echo(f"{out}: {', '.join(found)}{why}")


cli.add_command(compare)
cli.add_command(predict)


@cli.command()
@click.argument("predictions", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--score", "by", help="text, number, choice, label, json, spans, or MODULE:FUNCTION; without it by task.")
@as_json
def score(predictions: Path, by: str | None, as_json: bool) -> None:
    """Exact match and other metrics of generated answers.

    PREDICTIONS is JSONL with the fields prediction and reference. With --score all lines are scored in one way, as the
    docstring of axolotl_cvloss.command.scorers has it. Without, a field task (gsm8k, mathqa, openbookqa or hellaswag)
    says how, formulas included; see that of axolotl_cvloss.command.scoring.
    """
    from . import scorers, scoring

    try:
        scores = scoring.score_file(predictions) if by is None else {by: scorers.score_file(predictions, by)}
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        _print_json(scores)
        return
    metrics = list(dict.fromkeys(metric for of_task in scores.values() for metric in of_task))
    rows = [[name, *(f"{s[name]:.4g}" if name in s else "" for s in scores.values())] for name in metrics]
    _print_table(("metric", *scores), rows)


def _given(given: Sequence[str]) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign:
            raise click.ClickException(f"-p {text}: must be NAME=VALUE, such as gamma=3")
        values.setdefault(name.strip(), []).append(value.strip())
    return values


def _parameters(loss: "Loss", given: Mapping[str, str]) -> dict[str, Any]:
    """All parameters of a loss, checked as those of the YAML are."""
    from ..objective.config import ConfigError, CVLossConfig

    try:
        return CVLossConfig.parse({loss.name: dict(given)}).terms[0].parameters
    except ConfigError as error:
        raise click.ClickException(str(error)) from error


def _loss(name: str) -> "Loss":
    from ..losses.registry import get_loss

    try:
        return get_loss(name)
    except KeyError as error:
        raise click.ClickException(f"unknown loss {name!r}; {error.args[0]}") from error


def _host(config: Path, report: "Report") -> str:
    """The host of a config that is right."""
    if report.errors:
        raise click.ClickException("\n".join(report.errors))
    if report.host is None:
        raise click.ClickException(f"{config}: its keys do not tell whether it is for Axolotl or TRL; give --host")
    return report.host


def _in_process(module: str, *arguments: str) -> bool:
    """Run a module that loads a host, in a process of its own with one GPU; whether it went well."""
    import os
    import subprocess

    from .compare.machine import gpus

    command = [sys.executable, "-m", f"axolotl_cvloss.command.{module}", *arguments]
    one = {"CUDA_VISIBLE_DEVICES": found[0]} if (found := gpus()) else {}
    # What hosts print is not what was asked for.
    return not subprocess.run(command, env={**os.environ, **one}, stdout=2).returncode


def _print_probe(said: Mapping[str, Any]) -> None:
    """What a probe says, for people."""

    def text(value: Any, form: str = ".4g") -> str:
        return "" if value is None else str(value) if isinstance(value, str) else format(value, form)

    rows = [
        {
            "term": term["name"],
            "weight": text(term["weight"]),
            "value": text(term["value"]),
            "rows": text(term["rows"], "d"),
            "sets": text(term["sets"], "g"),
            "classes a set": text(term["classes"], ".1f"),
            "gradient": text(term["gradient_norm"]),
            "in the head": text(term["head_gradient_norm"]),
            "share": text(term["share"], ".1%"),
            "cosine": text(term["cosine"], ".3f"),
            "weight for the share": text(term.get("weight_for_share")),
        }
        for term in said["terms"]
    ]
    click.echo(f"{said['batches']} micro-batches, {said['rows']} labelled tokens, on {said['device']}\n")
    _print_table_of(rows)
    peak = {name: "unknown" if value is None else f"{value / 2**20:,.0f} MiB" for name, value in said["memory"].items()}
    click.echo(
        f"\npeak memory of a step, without the optimizer's: {peak['with_objective']} with the objective, "
        f"{peak['without_objective']} with the model's own loss"
    )
    for line in said["warnings"]:
        click.echo(f"warning: {line}")


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


def _print_table_of(rows: Sequence[Mapping[str, str]]) -> None:
    """A table of mappings, without the columns that are empty in all of them."""
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    _print_table(columns, [[row[name] for name in columns] for row in rows])


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people, or a block a row in a narrow terminal; where the output is piped, one line a row."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        names = column in ("loss", "parameter", "metric")  # never cut
        width = max(len(cell) for cell in (column, *(row[number] for row in rows))) if names else None
        table.add_column(column, no_wrap=names or not terminal, min_width=width)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # text, as formulas have brackets
    console = Console(width=None if terminal else 10_000, highlight=False)
    if terminal and len(columns) > 3 and console.width < WIDE:
        for row in rows:
            for column, cell in zip(columns, row, strict=True):
                lines = wrap(cell, max(20, console.width - 11), break_long_words=False) if cell else []
                click.echo(
                    "\n".join(f"{'' if n else column:<10} {line}" for n, line in enumerate(lines)), nl=bool(lines)
                )
            click.echo()
        return
    if terminal:
        console.print(table)
        return
    with console.capture() as capture:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))
