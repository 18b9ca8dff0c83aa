"""Tokens a second of two processes with DDP: the objective against the model's own cross-entropy.

    python benchmarks/two_processes.py --rounds 5

transformers' Trainer on the same batches, one objective after the other and round after round in the same processes, so
that what slows the machine down for a while hits all of them. Give each process its own core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OBJECTIVES: dict[str, Any] = {
    "the model's own cross-entropy": None,
    "cross_entropy": "cross_entropy",
    "0.6 cross_entropy + 0.4 lovasz": {"cross_entropy": 0.6, "lovasz": 0.4},
}
SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
WARM_UP = 2  # steps


def train(objective: Any, args: argparse.Namespace, folder: str) -> list[float]:
    """Seconds of each step after the first ones."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

    from axolotl_cvloss import Objective, attach, install

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter())

    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=args.vocab, tie_word_embeddings=True, **SHAPE))
    rows = torch.randint(args.vocab, (2 * args.batch * (args.steps + WARM_UP), args.length))
    clock = Clock()
    arguments = TrainingArguments(
        output_dir=folder,
        use_cpu=True,
        max_steps=args.steps + WARM_UP,
        per_device_train_batch_size=args.batch,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    if objective is not None:
        install(model, Objective.from_config(objective))
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[clock])
    if objective is not None:
        attach(trainer)
    trainer.train()
    assert arguments.world_size == 2
    times = clock.ends[WARM_UP - 1 :]
    return [end - start for start, end in itertools.pairwise(times)]


def worker(args: argparse.Namespace) -> None:
    from accelerate import PartialState

    seconds: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
    state = PartialState(cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for name, objective in OBJECTIVES.items():
                seconds[name].append(statistics.median(train(objective, args, folder)))
    if state.is_main_process:
        Path(args.worker).write_text(json.dumps(seconds))
    state.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="rows of a process")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "seconds.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "ACCELERATE_USE_CPU": "true"}
        subprocess.run([*launcher, __file__, *sys.argv[1:], "--worker", str(output)], env=environment, check=True)
        seconds = json.loads(output.read_text())
    tokens = 2 * args.batch * args.length
    own = next(iter(seconds.values()))
    for name, found in seconds.items():
        ratio = statistics.median(f / o for f, o in zip(found, own, strict=True))
        print(f"{tokens / statistics.median(found):9.0f} tokens/s  {ratio:5.3f} x the time of the host's own  {name}")


if __name__ == "__main__":
    main()
