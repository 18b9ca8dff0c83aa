"""The paper's experiment: the same model, data, steps and seeds with each loss, through `axolotl train`, and scored.

    python benchmarks/paper/run.py --smoke                                       # a tiny random model, 2 minutes
    python benchmarks/paper/run.py --quick --model DIR --data DIR                # 20 minutes on 2 cores with 135M
    python benchmarks/paper/run.py --full --model HuggingFaceTB/SmolLM2-1.7B     # one GPU
    python benchmarks/paper/run.py --report                                      # table and figure from the JSON lines

Started again with the same options it goes on where it stopped. See README.md in this folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tiny
from plans import LOSSES, PLANS, Plan, Run, best_rate, finals, objective, sweep
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from summary import Line, append, key_of, read, summarize

from axolotl_cvloss.config import CVLossConfig
from axolotl_cvloss.scoring import TASKS

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # after this folder: what the benchmarks share
console = Console(highlight=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    plan = parser.add_mutually_exclusive_group(required=True)
    plan.add_argument("--smoke", dest="plan", action="store_const", const="smoke", help="is the pipeline all right?")
    plan.add_argument("--quick", dest="plan", action="store_const", const="quick", help="20 minutes on 2 cores")
    plan.add_argument("--full", dest="plan", action="store_const", const="full", help="the full training sets")
    plan.add_argument("--report", action="store_true", help="only table and figure, from RESULTS/runs.jsonl")
    parser.add_argument("--model", help="a folder or a name on the hub")
    parser.add_argument("--data", type=Path, help="a folder with files such as gsm8k_train.jsonl; default: the hub")
    parser.add_argument("--work", type=Path, default=Path("outputs/paper"), help="adapters, logs and predictions")
    parser.add_argument("--results", type=Path, help="lines, table and figure; default: results/ beside this file")
    parser.add_argument("--datasets", nargs="+", choices=TASKS)
    parser.add_argument("--losses", nargs="+", metavar="LOSS", help=f"default of --full: {' '.join(LOSSES)}")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED")
    parser.add_argument("--rates", nargs="+", type=float, metavar="LR", help="more than one: a sweep per loss")
    parser.add_argument("--train", type=at_least(1), metavar="N", help="rows to train on")
    parser.add_argument("--valid", type=at_least(1), metavar="N", help="rows to choose learning rates and losses by")
    parser.add_argument("--test", type=at_least(1), metavar="N", help="rows to score")
    parser.add_argument("--steps", type=at_least(0), metavar="N", help="0: the epochs of the paper's recipe")
    parser.add_argument("--batch", type=at_least(1), metavar="N")
    parser.add_argument("--eval-batch", type=at_least(1), metavar="N")
    parser.add_argument("--new-tokens", type=at_least(1), metavar="N", help="at most so many tokens for an answer")
    args = parser.parse_args()
    if not args.report and args.plan != "smoke" and not args.model:
        parser.error("--model is needed: a folder or a name on the hub")
    if args.model and not Path(args.model).exists() and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", args.model):
        parser.error(f"--model {args.model}: there is no such folder, and it is no name on the hub")
    if find_spec("matplotlib") is None:  # said here, not after hours
        parser.error("the figure needs matplotlib: pip install matplotlib")
    return args


def at_least(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        return value

    return whole_number


def plan_of(args: argparse.Namespace) -> Plan:
    fields = [field.name for field in dataclasses.fields(Plan)]
    given = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    plan = dataclasses.replace(
        PLANS[args.plan], **{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    )
    for loss in plan.losses:  # an unknown loss ends it here, not after hours
        try:
            CVLossConfig.parse(objective(loss))
        except ValueError as error:
            sys.exit(f"--losses {loss}: {error}")
    return plan


class Experiment:
    def __init__(self, args: argparse.Namespace, plan: Plan, progress: Progress) -> None:
        import torch
        from answers import load_tokenizer
        from tasks import prepare, task
        from training import weights_of
        from transformers import AutoConfig
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.plan, self.work, self.file = plan, args.work, args.results / "runs.jsonl"
        self.model, self.progress = args.model, progress
        self.weights = weights_of(args.model)
        self.model_name = Path(args.model).name if Path(args.model).exists() else args.model
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model_config = AutoConfig.from_pretrained(args.model)
        self.tokenizer = load_tokenizer(args.model, self.model_config)
        self.tokens = {"eos_token": self.tokenizer.eos_token, "pad_token": self.tokenizer.pad_token}
        self.tasks = {name: task(name) for name in plan.datasets}
        self.data = {
            name: prepare(task, args.data, args.work, plan.train, plan.valid, plan.test)
            for name, task in self.tasks.items()
        }
        self.done = {key_of(line): line for line in read(self.file)}
        self.clock = Clock(plan)
        self.bar = progress.add_task("", total=self.clock.todo.total(), left="")

    def everything(self) -> None:
        for name in self.plan.datasets:
            self.line("untrained", name, None)
            tried = {run: self.line("sweep", name, run) for run in sweep(self.plan, name)}
            rates = {loss: best_rate(self.plan, tried, name, loss) for loss in self.plan.losses}
            for run in finals(self.plan, name, rates):
                self.line("final", name, run)

    def line(self, stage: str, dataset: str, run: Run | None) -> Line:
        """The line of a run: found among the results, or made and added to them."""
        from tasks import digest_of
        from training import config_of, name_of, steps_of, train

        plan, task, data = self.plan, self.tasks[dataset], self.data[dataset]
        config: dict[str, Any] = {}
        name = f"{dataset}-untrained"
        if run:
            config = config_of(run, plan, task, data, self.model, self.model_config, self.tokens, self.device == "cuda")
            name = name_of(run, config, self.weights, data)
        line: Line = {
            "stage": stage,
            "run": name,
            "model": self.model_name,
            "dataset": dataset,
            "loss": run.loss if run else None,
            "mix": {term["loss"]: term["weight"] for term in config["cv_loss"]["terms"]} if run else None,
            "reference": config["cv_loss"].get("reference", False) if run else None,
            "seed": run.seed if run else None,
            "lr": run.rate if run else None,
            "train_examples": len(data.train),
            "steps": steps_of(plan, task, data),
            "batch": plan.batch,
            "validation_examples": len(data.valid),
            "test_examples": len(data.test),
            "new_tokens": min(task.new_tokens, plan.new_tokens or task.new_tokens),
            "rates": " ".join(f"{rate:g}" for rate in plan.rates),
            "sweep_seed": plan.sweep_seed,
            "device": self.device,
            "inputs": digest_of(self.weights, data.inputs),
        }
        if found := self.done.get(key_of(line)):
            self.count(stage, dataset, run, None)
            return found
        start, folder = time.monotonic(), self.work / "runs" / self.model_name.replace("/", "--") / name
        says = f"{stage}: {run}" if run else f"untrained: {dataset}"
        adapter, line["train_seconds"] = None, 0.0
        if run:
            adapter, line["train_seconds"] = train(
                config, folder, lambda step: self.show(f"{says}, step {step} of {config['max_steps']}")
            )
        trained = time.monotonic()
        line |= self.scores(line, adapter, folder, lambda text: self.show(f"{says}, {text}"))
        line["evaluation_seconds"] = time.monotonic() - trained
        line |= {"sources": data.sources, **about(self.device)}
        append(self.file, line)
        self.done[key_of(line)] = line
        seconds = time.monotonic() - start
        self.count(stage, dataset, run, seconds)
        measured = line.get("test", line["validation"])
        console.print(
            f"{says}: exact match {measured['exact_match']:.1%}, NLL {measured['nll']:.4f}"
            f" ({seconds:.0f} s){self.clock.left()}",
            markup=False,
            soft_wrap=True,
        )
        return line

    def scores(self, line: Line, adapter: Path | None, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
        from answers import evaluate, load_model

        task, data = self.tasks[line["dataset"]], self.data[line["dataset"]]
        say("evaluation")
        model = load_model(self.model, adapter, self.device)
        found = {}
        splits = (
            {"validation": data.valid} if line["stage"] == "sweep" else {"validation": data.valid, "test": data.test}
        )
        for split, rows in splits.items():
            pairs = [pair for pair in map(task.example, rows) if pair]
            found[split] = evaluate(
                task.name,
                model,
                self.tokenizer,
                pairs,
                self.plan.eval_batch,
                line["new_tokens"],
                folder / f"{split}.jsonl",
                lambda done, split=split: say(f"{split} {done:.0%}"),
            )
        if "test" in found:
            found |= {name: found["test"][name] for name in ("exact_match", "nll")}
        del model
        if self.device == "cuda":
            import torch

            torch.cuda.empty_cache()  # the next training is another process on the same GPU
        return found

    def show(self, text: str) -> None:
        self.progress.update(self.bar, description=text, left=self.clock.left())

    def count(self, stage: str, dataset: str, run: Run | None, seconds: float | None) -> None:
        self.clock.count((stage_of(self.plan, stage, run), dataset), seconds)
        self.progress.advance(self.bar)


Kind = tuple[str, str]  # stage and dataset


def stage_of(plan: Plan, stage: str, run: Run | None) -> str:
    """The stage, where the final runs that need no training are a stage of their own: the sweep has trained them."""
    return "again" if stage == "final" and run and run.seed == plan.sweep_seed else stage


class Clock:
    """The lines that are still to come, and how long they will take by those of this session."""

    def __init__(self, plan: Plan) -> None:
        self.todo: Counter[Kind] = Counter()
        self.spent: dict[Kind, list[float]] = {}
        for dataset in plan.datasets:
            runs = finals(plan, dataset, dict.fromkeys(plan.losses, 0.0))
            stages = ["untrained", *("sweep" for _ in sweep(plan, dataset))]
            self.todo.update((stage, dataset) for stage in stages)
            self.todo.update((stage_of(plan, "final", run), dataset) for run in runs)

    def count(self, kind: Kind, seconds: float | None) -> None:
        self.todo[kind] -= 1
        if seconds is not None:
            self.spent.setdefault(kind, []).append(seconds)

    def left(self) -> str:
        def mean(kind: Kind) -> float:
            like = [found for other, found in self.spent.items() if other[0] == kind[0]] or list(self.spent.values())
            found = self.spent.get(kind) or [seconds for seconds_of in like for seconds in seconds_of]
            return sum(found) / len(found)

        trained = any(stage in ("sweep", "final") for stage, _ in self.spent)
        if not trained or not self.todo.total():
            return ""
        minutes = sum(count * mean(kind) for kind, count in self.todo.items()) / 60
        return f", about {minutes / 60:.1f} hours left" if minutes > 90 else f", about {minutes:.0f} min left"


def about(device: str) -> dict[str, Any]:
    from report import PACKAGES, machine  # benchmarks/report.py

    known = machine(device)
    versions = {name: known.pop(name) for name in PACKAGES if name in known}
    return {"date": known.pop("date"), "machine": known, "versions": versions}


def main() -> None:
    args = arguments()
    smoke = args.plan == "smoke"
    args.results = args.results or (args.work / "results" if smoke else HERE / "results")
    if not args.report:
        logging.disable(logging.WARNING)  # the libraries warn of GPU kernels that they do not find
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the same command goes on from here"))
        plan = plan_of(args)
        if smoke:
            args.model, args.data = map(str, tiny.make(args.work))
            args.data = Path(args.data)
        if Path(args.model).exists() and args.data:
            os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU, also for Axolotl
        columns = [BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeElapsedColumn()]
        with Progress(
            *columns, TextColumn("{task.description}{task.fields[left]}", markup=False), console=console
        ) as progress:
            try:
                experiment = Experiment(args, plan, progress)
            except OSError as error:  # no such rows, no such model
                sys.exit(str(error))
            experiment.everything()
    print(summarize(args.results))
    console.print(f"in {args.results}: {', '.join(sorted(path.name for path in args.results.iterdir()))}")


if __name__ == "__main__":
    main()
