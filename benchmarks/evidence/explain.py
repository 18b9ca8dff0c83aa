"""Where in a training with cross_entropy does each loss pull, on easy tokens or on hard ones, and which way?

python benchmarks/evidence/explain.py slots|slots_further|problems

Trains the task's config once with cross_entropy. On the last steps before some points of the training, the micro-batch
of the step is also given to each loss alone, whose gradients are taken in the hidden states before the head and in the
weights. results/explain.jsonl has a line a task, point of the training and loss; page.py makes tables of it.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from axolotl_cvloss import Objective
from axolotl_cvloss.engine.vocabulary import count_labels
from axolotl_cvloss.hosts.trl_cli import built

HERE = Path(__file__).resolve().parent
FILE = HERE / "results" / "explain.jsonl"
POINTS = (0.05, 0.1, 0.25, 0.5, 1.0)  # of the training
STEPS = 4  # before each point, whose micro-batches are measured
EASY, EASIEST, HARD = 0.9, 0.99, 0.5  # p of the target
RATE = 3e-3


def objectives(task: str, label_counts: Tensor) -> dict[str, Objective]:
    """cross_entropy, then of each mix that was compared with it the other term alone."""
    found = {"cross_entropy": Objective.from_config("cross_entropy")}
    files = [HERE / f"objectives{end}.yaml" for end in ("", f"_{task}", f"_{task}_chosen")]
    mixes = {name: mix for file in files if file.exists() for name, mix in yaml.safe_load(file.read_text()).items()}
    for name, mix in mixes.items():
        _, (loss, value) = mix.items()
        parameters = {key: v for key, v in value.items() if key != "weight"} if isinstance(value, dict) else {}
        found[name] = Objective.from_config({loss: {"weight": 1.0, **parameters}}, label_counts=label_counts)
    return found


class Sums:
    """Over the micro-batches of one point: tokens, and for each loss its gradients."""

    def __init__(self, losses: dict[str, Objective]) -> None:
        self.losses = losses
        self.p: list[Tensor] = []
        self.pull: dict[str, list[Tensor]] = {name: [] for name in losses}  # norm of each token's gradient
        self.inner = torch.zeros(len(losses), 2, len(losses), dtype=torch.float64)  # hidden states; weights

    def add(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        body: Any = model.model
        head: nn.Module = model.lm_head
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        hidden = body(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        labels = inputs["labels"]
        before = labels[:, 1:] != -100  # the rows that predict a label
        with torch.no_grad():
            logp = head(hidden[:, :-1][before]).log_softmax(-1)
            self.p.append(logp.gather(1, labels[:, 1:][before][:, None]).squeeze(1).exp())
        flat: list[list[Tensor]] = [[], []]
        for name, loss in self.losses.items():
            value = loss.from_hidden(hidden, head, labels).loss
            of_hidden, *of_weights = torch.autograd.grad(value, [hidden, *weights], retain_graph=True)
            self.pull[name].append(of_hidden[:, :-1][before].norm(dim=-1))
            flat[0].append(of_hidden.flatten())
            flat[1].append(torch.cat([gradient.flatten() for gradient in of_weights]))
        for place, gradients in enumerate(flat):
            both = torch.stack(gradients).double()
            self.inner[:, place] += both @ both.T

    def lines(self) -> list[dict[str, Any]]:
        p = torch.cat(self.p)
        tokens = {
            "tokens": len(p),
            "nll": float(-p.log().mean()),
            "easy": float((p > EASY).double().mean()),
            "easiest": float((p > EASIEST).double().mean()),
            "hard": float((p < HARD).double().mean()),
        }
        found = []
        for number, name in enumerate(self.losses):
            pull = torch.cat(self.pull[name])
            line = {"loss": name, **tokens}
            line["pull_on_easy"] = float(pull[p > EASY].sum() / pull.sum())
            line["pull_on_hard"] = float(pull[p < HARD].sum() / pull.sum())
            line["gradient_norm"] = math.sqrt(float(self.inner[number, 1, number]) / len(self.p))
            for place, where in enumerate(("hidden", "weights")):
                own, plain, both = (float(self.inner[i, place, j]) for i, j in ((number,) * 2, (0, 0), (number, 0)))
                line[f"norm_{where}"] = math.sqrt(own / plain)
                line[f"cosine_{where}"] = both / math.sqrt(own * plain)
            found.append(line)
        return found


def measure(task: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        changes = {"cv_loss": "cross_entropy", "learning_rate": RATE, "save_strategy": "no", "report_to": "none"}
        trainer: Any = built(HERE / f"{task}.yaml", folder, changes)
        steps = trainer.args.max_steps
        ends = [round(point * steps) for point in POINTS]
        counts = count_labels(trainer.data_collator([row])["labels"] for row in trainer.train_dataset)
        sums = {end: Sums(objectives(task, counts)) for end in ends}
        train = trainer.training_step

        def training_step(model: nn.Module, inputs: dict[str, Tensor], *more: Any) -> Tensor:
            for end in ends:
                if 0 <= end - 1 - trainer.state.global_step < STEPS:
                    sums[end].add(model, inputs)
            loss: Tensor = train(model, inputs, *more)
            return loss

        trainer.training_step = training_step
        trainer.train()
    return [{"task": task, "step": end, "steps": steps, **line} for end in ends for line in sums[end].lines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["slots", "slots_further", "problems"])
    task = parser.parse_args().task
    lines = [json.loads(text) for text in FILE.read_text().splitlines()] if FILE.exists() else []
    lines = [line for line in lines if line["task"] != task] + measure(task)
    FILE.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
