"""`make demo`: a small model learns arithmetic word problems with Axolotl, by cross-entropy and by the mix.

Needs no network and no GPU. Everything it makes is in demo-output/, which every run starts anew.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

# The demo is the same on every machine: nothing from the network, and no GPU, which three minutes of a small model
# do not need.
os.environ.update(HF_HUB_OFFLINE="1", AXOLOTL_DO_NOT_TRACK="1", CUDA_VISIBLE_DEVICES="", MPLBACKEND="Agg")
logging.disable(logging.WARNING)  # the libraries warn of GPU kernels that they do not find

import yaml
from model import build_model, build_tokenizer, losses, write_answers
from problems import Problem, exact_match, make_problems
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from axolotl_cvloss import Objective

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Path("example_configs/quickstart.yaml")
OUTPUT = Path("demo-output")
UNTRAINED, CROSS_ENTROPY, MIX = "untrained", "cross-entropy", "the mix"

console = Console(highlight=False)
Result = dict[str, float]


def prepare() -> list[Problem]:
    """The problems, the tokenizer and the untrained model, where quickstart.yaml looks for them."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir()
    training, held_out = make_problems(8000, held_out=False), make_problems(200, held_out=True)
    for name, problems in ("train", training), ("held_out", held_out):
        (OUTPUT / f"{name}.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    tokenizer = build_tokenizer(training)
    model = build_model(tokenizer)
    tokenizer.save_pretrained(OUTPUT / "model")
    model.save_pretrained(OUTPUT / "model")
    console.print(f"  {len(training)} training and {len(held_out)} held-out problems, such as")
    console.print(f"    {held_out[0]['question']}", style="italic", markup=False)
    console.print(f"    {' '.join(held_out[0]['answer'].split())}", style="italic", markup=False)
    console.print(f"  a Llama of {model.num_parameters():,} random weights, and a tokenizer of {len(tokenizer)} tokens")
    return held_out


def train(name: str, config: Path, steps: int) -> None:
    """`axolotl train CONFIG` with its output in a log file and its steps on the screen."""
    axolotl = shutil.which("axolotl", path=Path(sys.executable).parent)
    if axolotl is None:
        sys.exit("axolotl is not installed beside this Python; install the project with the extra: .[axolotl,dev]")
    log = OUTPUT / f"{config.stem}.log"
    console.print(f"  axolotl train {config} --launcher python   (log: {log})", markup=False)
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()]
    with (
        Progress(*columns, console=console) as progress,
        log.open("w") as out,
        subprocess.Popen([axolotl, "train", config, "--launcher", "python"], stdout=out, stderr=out) as process,
    ):
        task = progress.add_task(f"{name}: starting Axolotl", total=steps)
        while process.poll() is None:
            time.sleep(0.5)
            done = re.findall(rf"(\d+)/{steps} \[", log.read_text(errors="replace"))
            if done:
                progress.update(task, completed=int(done[-1]), description=f"{name}: step {done[-1]} of {steps}")
    if process.returncode:
        tail = log.read_text(errors="replace").replace("\r", "\n").splitlines()[-40:]
        console.print("\n".join(tail), markup=False)
        sys.exit(f"axolotl train ended with code {process.returncode}; the end of {log} is above")


def measure(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[Problem],
    objective: Objective,
) -> Result:
    texts = write_answers(model, tokenizer, problems)
    console.print(f"  {name} writes: {texts[0][:60]!r}", markup=False)
    return {**losses(model, tokenizer, problems, objective), "exact match": exact_match(texts, problems)}


def plot(histories: dict[str, list[dict[str, float]]], terms: list[str]) -> Path:
    """Each term while the two models trained, on the batches and on the held-out problems."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(terms), figsize=(5 * len(terms), 4), layout="constrained")
    for axis, term in zip(axes, terms, strict=True):
        for color, (name, history) in enumerate(histories.items()):
            for key, style, what in (f"cv_loss/{term}", "-", "training"), (f"eval_cv_loss/{term}", "o--", "held-out"):
                points = [(entry["step"], entry[key]) for entry in history if key in entry]
                axis.plot(*zip(*points, strict=True), style, color=f"C{color}", ms=4, label=f"{name}, {what}")
        axis.set(title=term, xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle("Terms of two runs that differ in the key cv_loss alone")
    path = OUTPUT / "terms.png"
    figure.savefig(path, dpi=120)
    return path


def show(results: dict[str, Result]) -> None:
    table = Table(title="On the held-out problems", title_justify="left")
    table.add_column("model")
    for name in results[UNTRAINED]:
        table.add_column("NLL" if name == "nll" else name, justify="right")
    for name, result in results.items():
        table.add_row(name, *(f"{v:.1%}" if key == "exact match" else f"{v:.4f}" for key, v in result.items()))
    console.print(table)


def main() -> None:
    start = time.monotonic()
    os.chdir(ROOT)
    disable_progress_bar()
    quickstart = yaml.safe_load(CONFIG.read_text())
    objective = Objective.from_config(quickstart["cv_loss"])

    console.rule("1. Problems, tokenizer and model", align="left")
    held_out = prepare()
    # The same config with another objective. A term of weight 0 is logged and changes nothing.
    cross_entropy = {
        **quickstart,
        "cv_loss": {
            name: float(name == "cross_entropy") if isinstance(value, float) else {**value, "weight": 0.0}
            for name, value in quickstart["cv_loss"].items()
        },
        "output_dir": str(OUTPUT / "cross_entropy"),
    }
    other = OUTPUT / "cross_entropy.yaml"
    other.write_text(yaml.safe_dump(cross_entropy, sort_keys=False))
    tokenizer = AutoTokenizer.from_pretrained(OUTPUT / "model")
    untrained = LlamaForCausalLM.from_pretrained(OUTPUT / "model")
    results = {UNTRAINED: measure(UNTRAINED, untrained, tokenizer, held_out, objective)}

    histories = {}
    for number, (name, path, config) in enumerate(
        [(CROSS_ENTROPY, other, cross_entropy), (MIX, CONFIG, quickstart)], start=2
    ):
        key = yaml.safe_dump(config["cv_loss"], default_flow_style=True, sort_keys=False).strip()
        console.rule(f"{number}. Training with {name}", align="left")
        console.print(f"  cv_loss: {key}", markup=False)
        train(name, path, config["max_steps"])
        trained = LlamaForCausalLM.from_pretrained(config["output_dir"])
        results[name] = measure(name, trained, tokenizer, held_out, objective)
        checkpoint = Path(config["output_dir"]) / f"checkpoint-{config['max_steps']}"
        histories[name] = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]

    console.rule("4. What they learned", align="left")
    show(results)
    console.print(f"Curves of the terms: {plot(histories, list(quickstart['cv_loss']))}")
    console.print(
        "This shows that both objectives train a model. One seed does not show which is better: docs/evidence.md has "
        "eight of them, and more objectives."
    )
    console.print(f"{time.monotonic() - start:.0f} seconds")


if __name__ == "__main__":
    main()
