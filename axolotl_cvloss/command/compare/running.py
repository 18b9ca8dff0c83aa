"""The trainings of a comparison: a process each, as the host's own command trains, and a line of results for each.

``OUT/runs.jsonl`` is all that a comparison remembers: a run that has its line there is done. Models, logs, configs and
predictions are in ``OUT/work``, which may be deleted when all is done.
"""

import contextlib
import json
import math
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from ..scorers import score_pairs
from . import plan as plans
from . import rows
from .children import Child, Forks, Gone, can_fork, end, start
from .machine import about, gpus
from .plan import Line, Plan, Run
from .progress import Progress

STEP = re.compile(r"(?:^|[\r\n])\s*\d+%\|[^|\r\n]*\| *(\d+)/(\d+) \[")  # the bar of the Trainer, which has no name


class RunFailed(Exception):
    """A process of a run has ended with an error; the message has the end of its log."""


def read_lines(file: Path) -> list[Line]:
    """All lines but one that a kill has torn off at the end."""
    found = []
    for text in file.read_text(encoding="utf-8").split("\n") if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(text))
    return found


def append(file: Path, line: Line) -> None:
    torn = file.exists() and file.stat().st_size and not file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as out:
        out.write(("\n" if torn else "") + json.dumps(line, ensure_ascii=False) + "\n")
        out.flush()
        os.fsync(out.fileno())


@dataclass(frozen=True)
class Program:
    """A module that trains with a config, in one process: a launcher would import the host once more, and Axolotl's
    asks for a config of accelerate."""

    module: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()  # of the module, when it runs


PROGRAMS = {
    "axolotl": Program(
        "axolotl.cli.main",
        ("train",),
        ("--launcher", "python"),
        ("axolotl.cli.train", "axolotl.common.datasets", "axolotl.core.builders", "axolotl_cvloss.plugin"),
    ),
    "trl": Program("axolotl_cvloss.hosts.trl_cli", ("--config",)),
}
PREDICT, ROWS = (f"axolotl_cvloss.command.compare.{name}" for name in ("predict", "rows"))


class Comparison:
    """Everything that one comparison shares, and the work on it."""

    def __init__(
        self,
        host: str,
        config: dict[str, Any],
        out: Path,
        score: str,
        validation: float,
        batch: int = 32,
        new_tokens: int | None = None,
        keep_models: bool = False,
    ) -> None:
        self.host, self.config, self.out = host, config, out
        self.score, self.batch, self.keep_models = score, batch, keep_models
        self.file, self.work = out / "runs.jsonl", out / "work"
        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / ".gitignore").write_text("*\n")
        self.program = PROGRAMS[host]
        if find_spec(host) is None:
            raise RunFailed(f"{host} is not installed; pip install 'axolotl-cvloss[{host}]'")
        self.forks: Forks | None = None
        self.children: set[Child] = set()
        self.stopping = False
        self.lock = threading.Lock()
        more = {"score": score, "validation": validation, "new_tokens": new_tokens}
        self.setting = plans.setting(host, config, more)
        self.lines = read_lines(self.file)
        if strange := {line["setting"] for line in self.lines} - {self.setting}:
            raise RunFailed(
                f"{self.file} has {'lines' if len(strange) == 1 else 'several sets of lines'} of another config, other "
                "data, another score or another choice of rows; take another --out for this one"
            )
        self.done = {self.key(line["stage"], line["cv_loss"], _run_of(line)): line for line in self.lines}
        self.given = validation, new_tokens
        self.about = about()

    def key(self, stage: str, objective: Any, run: Run) -> str:
        """The same for the same run of the same setting: what tells whether it is done, and whether its model is."""
        return plans.digest(self.setting, stage, run.objective, objective, run.rate, run.seed)

    def prepare(self) -> None:
        """The rows of the test set, from the last time or from the host, and their two parts."""
        validation, new_tokens = self.given
        file = self.work / f"rows-{self.setting}.jsonl"
        if not file.exists():
            config = self.work / "rows.yaml"
            config.write_text(yaml.safe_dump(self.config, sort_keys=False))
            self.process(ROWS, [self.host, str(config), str(file)], self.work / "rows.log", None)
        found = rows.read(file)
        count = round(validation * len(found)) if validation < 1 else int(validation)
        if not 0 < count < len(found):
            raise RunFailed(
                f"the test set has {len(found)} rows; {count} to choose the rates by leave "
                f"{max(0, len(found) - count)} to score the models with, and both must have some"
            )
        self.new_tokens = rows.longest_answer(found) if new_tokens is None else new_tokens
        if self.score == "none":
            self.new_tokens = 0
        self.parts = {}
        for name, places in zip(("validation", "test"), plans.halves(len(found), count), strict=True):
            self.parts[name] = self.work / f"{name}-{self.setting}.jsonl"
            rows.write((found[place] for place in places), self.parts[name])
        self.counts = {"validation": count, "test": len(found) - count}

    def process(
        self,
        module: str,
        arguments: Sequence[str],
        log: Path,
        gpu: str | None,
        on_log: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Run a module to its end, its output in the log."""
        # A rate at which training diverges is a result, the worst.
        environment = {"TOKENIZERS_PARALLELISM": "false", "CVLOSS_GO_ON": "1"}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with self.lock:
            if self.stopping:
                raise RunFailed("stopped")
            if self.forks is None and can_fork():
                self.forks = Forks([self.program.module, *self.program.imports, PREDICT], self.work / "imports.log")
            begin = start if self.forks is None else self.forks.start
            try:
                child = begin(module, arguments, log, environment)
            except Gone as error:
                raise RunFailed(
                    _said(self.work / "imports.log", "the process that imports the host has ended")
                ) from error
            self.children.add(child)
        try:
            while (code := child.poll()) is None:
                time.sleep(0.2)
                on_log(_end_of(log))
        finally:
            end(child)
            with self.lock:
                self.children.discard(child)
        if code:
            raise RunFailed(_said(log, f"{module} ended with code {code}"))

    def stop(self) -> None:
        with self.lock:
            self.stopping = True
            for child in self.children:
                end(child)
            if self.forks is not None:
                self.forks.close()

    def run(self, stage: str, run: Run, objective: Any, gpu: str | None, say: Callable[[str], None]) -> Line:
        """Train, or take the training of the choice, then predict and score."""
        folder = self.work / "runs" / run.folder
        folder.mkdir(parents=True, exist_ok=True)
        trained = self.train(run, objective, folder, gpu, say)
        part = "validation" if stage == "choice" else "test"
        start = time.monotonic()
        predictions = folder / f"{part}.jsonl"
        arguments = [str(folder / "model"), str(self.parts[part]), str(predictions)]
        arguments += ["--batch", str(self.batch), "--new-tokens", str(self.new_tokens)]
        self.process(PREDICT, arguments, folder / f"{part}.log", gpu, lambda text: say(_last_line(text, f"{part} ")))
        records = rows.read(predictions)
        line: Line = {
            "stage": stage,
            "objective": run.objective,
            "cv_loss": objective,
            "rate": run.rate,
            "seed": run.seed,
            "steps": trained["steps"],
            "rows": self.counts[part],
            **self.scores(records),
            "train_seconds": trained["seconds"],
            "predict_seconds": round(time.monotonic() - start, 1),
            "setting": self.setting,
            "host": self.host,
            "score": self.score,
            **self.about,
        }
        with self.lock:
            append(self.file, line)
            self.lines.append(line)
            self.done[self.key(stage, objective, run)] = line
        if stage == "final" and not self.keep_models:
            shutil.rmtree(folder / "model", ignore_errors=True)
        return line

    def train(
        self, run: Run, objective: Any, folder: Path, gpu: str | None, say: Callable[[str], None]
    ) -> dict[str, Any]:
        """Into folder/model. What a training that was killed left behind is thrown away."""
        model, record = folder / "model", folder / "trained.json"
        key = self.key("", objective, run)
        if model.exists() and record.exists() and (known := json.loads(record.read_text()))["key"] == key:
            return dict(known)
        # A place for this attempt alone: a training that outlived its parent may still be writing to the last one.
        attempt = folder / f"attempt-{os.getpid()}"
        for left in (model, *folder.glob("attempt-*")):
            shutil.rmtree(left, ignore_errors=True)
        config = plans.run_config(self.host, self.config, objective, run.rate, run.seed)
        config["output_dir"] = str(attempt)
        if self.host == "axolotl":
            config["dataset_prepared_path"] = str(folder / f"attempt-{os.getpid()}-rows")
        file, log = folder / "config.yaml", folder / "train.log"
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        start = time.monotonic()

        def on_log(text: str) -> None:
            if found := STEP.findall(text):
                say("step {} of {}".format(*found[-1]))

        arguments = [*self.program.before, str(file), *self.program.after]
        self.process(self.program.module, arguments, log, gpu, on_log)
        steps = [int(of) for _, of in STEP.findall(log.read_text(errors="replace"))]
        known = {"key": key, "steps": steps[-1] if steps else None, "seconds": round(time.monotonic() - start, 1)}
        attempt.rename(model)
        for left in folder.glob("attempt-*"):
            shutil.rmtree(left, ignore_errors=True)
        record.write_text(json.dumps(known))
        return known

    def scores(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        nll = sum(record["nll"] for record in records) / max(1, sum(record["tokens"] for record in records))
        found: dict[str, Any] = {"nll": nll if math.isfinite(nll) else None}  # JSON has no NaN
        pairs = [(record["prediction"], record["reference"]) for record in records if "prediction" in record]
        if self.score != "none" and pairs:
            scored = score_pairs(self.score, pairs)
            found |= {"scores": scored.metrics, "examples": plans.compact(scored.examples)}
        return found

    def throw_away(self, run: Run) -> None:
        """The model of a rate that was not chosen."""
        if not self.keep_models:
            shutil.rmtree(self.work / "runs" / run.folder / "model", ignore_errors=True)


def _run_of(line: Line) -> Run:
    return Run(line["objective"], line["rate"], line["seed"])


def _said(log: Path, what: str) -> str:
    tail = _end_of(log, 6000).replace("\r", "\n").splitlines()[-25:]
    return "\n".join([*tail, f"{what}; its log is {log}"])


def _end_of(log: Path, size: int = 2000) -> str:
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - size))
        return file.read().decode(errors="replace")


def _last_line(text: str, before: str) -> str:
    lines = [line for line in text.splitlines() if re.fullmatch(r"\d+/\d+ rows", line)]
    return before + (lines[-1] if lines else "rows")


def chosen_rates(plan: Plan, comparison: Comparison) -> dict[str, float]:
    """For each objective whose runs of the choice are all there; ``choose_rate`` has the rule."""
    runs = plan.choice()
    if not runs:
        return dict.fromkeys(plan.objectives, plan.rates[0])
    rates = {}
    for name, objective in plan.objectives.items():
        keys = [comparison.key("choice", objective, run) for run in runs if run.objective == name]
        if all(key in comparison.done for key in keys):
            rates[name] = plans.choose_rate([comparison.done[key] for key in keys])
    return rates


def counted(plan: Plan, comparison: Comparison) -> tuple[int, int]:
    """All runs, and those that have their lines. The rates of final runs are not known yet, so any rate counts."""
    choice = plan.choice()
    names = {(line["objective"], line["seed"]) for line in comparison.lines if line["stage"] == "final"}
    finals = [(name, seed) for seed in plan.seeds for name in plan.objectives]
    done = sum(comparison.key("choice", plan.objectives[run.objective], run) in comparison.done for run in choice)
    return len(choice) + len(finals), done + sum(final in names for final in finals)


def execute(plan: Plan, comparison: Comparison, jobs: int, progress: Progress) -> list[str]:
    """Everything that has no line yet. What failed, in words: the other runs go on without it."""
    failed: list[str] = []
    devices = gpus()
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)

    def work(stage: str, run: Run) -> None:
        objective = plan.objectives[run.objective]
        slot, start, what = slots.get(), time.monotonic(), f"{stage}: {run}"
        try:
            gpu = devices[slot % len(devices)] if devices else None
            line = comparison.run(stage, run, objective, gpu, lambda text: progress.say(slot, f"{what}, {text}"))
            progress.finished(slot, what, line, time.monotonic() - start)
        except (RunFailed, ValueError) as error:  # ValueError: of the scorer
            if not comparison.stopping:
                failed.append(f"{what}\n{error}")
                progress.failed(slot, f"{what} failed")
        finally:
            slots.put(slot)

    def stage_of(stage: str, runs: Sequence[Run]) -> None:
        keys = {run: comparison.key(stage, plan.objectives[run.objective], run) for run in runs}
        todo = [run for run in runs if keys[run] not in comparison.done]
        if stage == "final":
            progress.expect(len(todo))
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for _ in pool.map(lambda run: work(stage, run), todo):
                    pass
            except BaseException:
                comparison.stop()
                pool.shutdown(cancel_futures=True)
                raise

    stage_of("choice", plan.choice())
    rates = chosen_rates(plan, comparison)
    finals = plan.finals(rates)
    for run in plan.choice():
        if run not in finals:
            comparison.throw_away(run)
    stage_of("final", finals)
    return failed


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Two comparisons in one folder would train everything twice."""
    from filelock import FileLock, Timeout  # torch needs it

    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise RunFailed(f"another comparison is at work in {out}") from error
    try:
        yield
    finally:
        lock.release()
