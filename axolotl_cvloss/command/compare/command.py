"""The commands ``cvloss compare`` and ``cvloss predict``. Only click is imported at the top, so that help is quick."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class Numbers(click.ParamType):
    """Numbers with commas between them; whole ones may also be a range such as 0-7."""

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind = kind
        self.name = "N,N,..." if kind is int else "X,X,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        found: list[Any] = []
        try:
            for part in filter(None, value.replace(" ", ",").split(",")):
                ends = re.fullmatch(r"(\d+)-(\d+)", part)
                found += range(int(ends[1]), int(ends[2]) + 1) if ends and self.kind is int else [self.kind(part)]
        except ValueError:
            self.fail(f"{value!r}: give numbers with commas between them", param, ctx)
        return tuple(dict.fromkeys(found))


@click.command()
@click.argument("config", type=FILE)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Where the results go.")
@click.option("--objective", "given", multiple=True, metavar="NAME=YAML", help="A value of cv_loss; may come again.")
@click.option("--objectives", "file", type=FILE, help="A YAML file that maps names to values of cv_loss.")
@click.option("--losses", metavar="NAME,...", help="0.6 cross_entropy + 0.4 of each of these, or all.")
@click.option("--rates", type=Numbers(float), help="Learning rates to choose from. Default: that of the config.")
@click.option("--seeds", type=Numbers(int), default="0,1,2", show_default=True, help="Of the final runs; may be ''.")
@click.option(
    "--choice-seeds", type=Numbers(int), help="Of the runs that choose the rate. Default: the first of --seeds."
)
@click.option("--score", default="text", show_default=True, help="text, number, choice, label, json, spans, M:F, none.")
@click.option(
    "--validation",
    type=click.FloatRange(min=0, min_open=True),
    default=0.5,
    show_default=True,
    help="Rows of the test set that choose the rates, or their share below 1; the others score the models.",
)
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs at once, one a GPU.")
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Prompts answered at once.")
@click.option("--new-tokens", type=click.IntRange(min=1), help="Default: what the longest reference needs.")
@click.option("--keep-models", is_flag=True, help="Keep the trained models in OUT/work.")
@click.option("--host", type=click.Choice(["axolotl", "trl"]), help="What the config is for, if its keys do not say.")
def compare(
    config: Path,
    out: Path,
    given: Sequence[str],
    file: Path | None,
    losses: str | None,
    rates: tuple[float, ...] | None,
    seeds: tuple[int, ...],
    choice_seeds: tuple[int, ...] | None,
    score: str,
    validation: float,
    jobs: int,
    batch: int,
    new_tokens: int | None,
    keep_models: bool,
    host: str | None,
) -> None:
    """Train CONFIG with several objectives, and say what the differences decide.

    Every run is a process that trains as the host's own command does, with the same steps, data order and seeds. For
    each objective the learning rate is chosen on a part of the config's test set; with this rate it is trained with
    each seed and scored on the other part. Called again, it goes on where it was stopped.

    For example: cvloss compare sft.yaml --out out/compare --rates 1e-4,3e-4 --seeds 0-7 --score number
    --objective 'mix={cross_entropy: 0.6, lovasz: 0.4}' --losses focal,dice
    """
    import signal

    from rich.console import Console

    from ..scorers import scorer
    from .plan import Plan, problem
    from .progress import Progress
    from .running import Comparison, RunFailed, alone, counted, execute

    data, host = _config(config, host)
    if wrong := problem(host, data):
        raise click.ClickException(f"{config}: {wrong}")
    assert host is not None
    objectives = _objectives(given, file, losses)
    if not rates:
        if "learning_rate" not in data:
            raise click.ClickException(f"{config} has no learning_rate; give --rates")
        rates = (float(data["learning_rate"]),)
    plan = Plan(objectives, rates, choice_seeds or seeds[:1], seeds)
    if not plan.choice_seeds:
        raise click.ClickException("--seeds is empty; then --choice-seeds must have some")
    try:
        if score != "none":
            scorer(score)
    except ValueError as error:
        raise click.ClickException(f"--score: {error}") from error
    _needs_extra()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on from here"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // jobs)))  # of each run
    console = Console(highlight=False, stderr=True)
    try:
        with alone(out):
            comparison = Comparison(host, data, out, score, validation, batch, new_tokens, keep_models)
            console.print(
                f"{len(plan.choice())} runs to choose rates and {len(objectives) * len(seeds)} final ones; "
                f"{len(comparison.lines)} lines are in {comparison.file}",
                soft_wrap=True,
            )
            comparison.prepare()
            progress = Progress(*counted(plan, comparison), jobs, console)
            try:
                with progress.bars:
                    failed = execute(plan, comparison, jobs, progress)
            finally:
                comparison.stop()
    except RunFailed as error:
        raise click.ClickException(str(error)) from error
    _report(out)
    if failed:
        raise click.ClickException("\n\n".join(failed))


def _report(out: Path) -> None:
    from .report import summarize
    from .running import read_lines

    lines = read_lines(out / "runs.jsonl")
    click.echo(summarize(lines, out))
    click.echo(f"in {out}: runs.jsonl, table.md, forest.svg, report.html")


def _needs_extra() -> None:
    """Said at once, not after hours."""
    from importlib.util import find_spec

    if missing := [name for name in ("scipy", "matplotlib", "jinja2") if find_spec(name) is None]:
        raise click.ClickException(f"{', '.join(missing)} not installed; pip install 'axolotl-cvloss[compare]'")


def _config(path: Path, host: str | None) -> tuple[dict[str, Any], str | None]:
    import yaml

    from ..checking import HOSTS

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise click.ClickException(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise click.ClickException(f"{path} is not a mapping of keys to values")
    return data, host or next((name for name, keys in HOSTS.items() if any(key in data for key in keys)), None)


def _objectives(given: Sequence[str], file: Path | None, losses: str | None) -> dict[str, Any]:
    """By name, the baseline first. Each is checked, so that a mistake ends it here and not after hours."""

    from ...losses.registry import available_losses
    from ...objective.config import ConfigError, CVLossConfig
    from .plan import BASELINE

    found: dict[str, Any] = {BASELINE: {BASELINE: 1.0}}
    if file is not None:
        found |= {str(name): value for name, value in (_yaml(file.read_text(), str(file)) or {}).items()}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign:
            raise click.ClickException(f"--objective {text}: must be NAME=YAML, such as 'mix={{lovasz: 1.0}}'")
        found[name.strip()] = _yaml(value, f"--objective {name}")
    if losses is not None:
        known = available_losses()
        names = list(known) if losses == "all" else [name.strip() for name in losses.split(",") if name.strip()]
        found |= {name: {BASELINE: 0.6, name: 0.4} for name in names if name != BASELINE}
    for name, value in found.items():
        try:
            CVLossConfig.parse(value)
        except ConfigError as error:
            raise click.ClickException(f"objective {name}: {error}") from error
    if len(found) == 1:
        raise click.ClickException("there is nothing to compare; give --objective, --objectives or --losses")
    return found


def _yaml(text: str, where: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise click.ClickException(f"{where}: {error}") from error


@click.command()
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("config", type=FILE)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default="predictions.jsonl", show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Prompts answered at once.")
@click.option("--new-tokens", type=click.IntRange(min=1), help="Default: what the longest reference needs.")
@click.option("--host", type=click.Choice(["axolotl", "trl"]), help="What the config is for, if its keys do not say.")
def predict(model: Path, config: Path, out: Path, batch: int, new_tokens: int | None, host: str | None) -> None:
    """What MODEL writes after the prompts of CONFIG's test set, greedily, and its NLL.

    MODEL is the folder of a trained model or adapter. `cvloss score OUT --score ...` scores what comes out.
    """
    import subprocess
    import tempfile

    from . import predict as predicting
    from . import rows

    _, host = _config(config, host)
    if host is None:
        raise click.ClickException(f"{config}: its keys do not tell whether it is for Axolotl or TRL; give --host")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        reader = "axolotl_cvloss.command.compare.rows"
        made = subprocess.run([sys.executable, "-m", reader, host, str(config), str(file)])
        if made.returncode:
            raise click.ClickException(f"the test set of {config} could not be read; the reason is above")
        found = rows.read(file)
    records = predicting.predict(*predicting.load(str(model)), found, batch, new_tokens or rows.longest_answer(found))
    rows.write(records, out)
    nll = sum(record["nll"] for record in records) / max(1, sum(record["tokens"] for record in records))
    click.echo(f"{out}: {len(records)} rows, NLL {nll:.4f}")
