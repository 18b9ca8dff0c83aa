"""What each term of an objective does to the training of a config, before the training.

    python -m axolotl_cvloss.command.probing axolotl|trl CONFIG.yaml OUT.json --batches N [--share X]

The host makes model, data and trainer of the config, and its training loop draws the first micro-batches. Nothing is
trained or saved. It runs in a process of its own, as a host changes much of the process that it is loaded into.
"""

import argparse
import ctypes
import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts.transformers import ObjectiveTrainer
from ..model.installation import DOCUMENT_WEIGHTS, NUMBER, uninstall
from ..objective.config import KEY, CVLossConfig
from ..objective.objective import Objective, ObjectiveResult

LITTLE = 0.01  # a share that changes next to nothing
END = 1.0  # what follows a schedule counts as it is at the end of training


class Drawn(Exception):
    """The micro-batches, and the trained rows of all; thrown to leave the host's training loop."""


class Drawing(ObjectiveTrainer):
    """Its loop draws as many micro-batches as are wanted, as those of one step, and ends before it trains."""

    probe_batches: int

    def _cv_progress(self) -> float:
        return END

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        raise Drawn(*super().get_batch_samples(epoch_iterator, self.probe_batches, device))


class Probe(Objective):
    """An objective that takes the gradient of each of its terms, and of cross-entropy, whenever it is evaluated.

    value, rows, masses, sets, classes: sums over what was evaluated, one a term, cross-entropy last.
    inner: (terms, terms), the inner products of the gradients of the unweighted terms in the hidden states.
    head: for each term the gradient in each weight of the head, summed, in main memory.
    """

    def __init__(self, objective: Objective, head: nn.Module, scale: float = 1.0) -> None:
        """
        Args:
            head: The module whose input the hidden states are.
            scale: What the loss is multiplied by while its gradient is in float16.
        """
        more: Any = {"tokenizer": objective.tokenizer, "label_counts": objective.label_counts}
        super().__init__(objective.config, **more, diagnose=objective.diagnose)
        self.scale = scale
        self.alone = [Objective(config, **more) for config in _alone(objective.config)]
        plain = CVLossConfig.parse("cross_entropy").model_copy(update={"examples": objective.config.examples})
        self.alone.append(Objective(plain))
        self.parameters = [p for p in head.parameters() if p.requires_grad]
        count = len(self.alone)
        self.value, self.rows, self.masses, self.sets, self.classes = torch.zeros(5, count, dtype=torch.float64)
        self.inner = torch.zeros(count, count, dtype=torch.float64)
        self.head = [[torch.zeros(p.shape) for p in self.parameters] for _ in self.alone]
        self._hidden: Tensor | None = None
        self.handle = head.register_forward_pre_hook(self._cut)

    def _cut(self, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients end here: a head may share its weights with the embedding, far behind the hidden states."""
        self._hidden = given[0].detach().requires_grad_()
        return self._hidden, *given[1:]

    def from_hidden(self, *given: Any, **inputs: Any) -> ObjectiveResult:
        inputs["progress"] = END
        self._take(lambda objective: objective.from_hidden(*given, **inputs))
        return super().from_hidden(*given, **inputs)

    def from_logits(self, *given: Any, **inputs: Any) -> ObjectiveResult:
        inputs["progress"] = END
        self._take(lambda objective: objective.from_logits(*given, **inputs))
        return super().from_logits(*given, **inputs)

    def _take(self, evaluate: Callable[[Objective], ObjectiveResult]) -> None:
        assert self._hidden is not None
        found = []
        for number, objective in enumerate(self.alone):
            result = evaluate(objective)
            (term,) = objective.terms
            mass = result.masses[term.name]
            self.value[number] += float(result.terms[term.name]) * mass
            self.rows[number] += result.counts[term.name]
            self.masses[number] += mass
            if (sets := result.sets.get(term.name)) is not None:
                self.sets[number] += sets.sets
                self.classes[number] += sets.classes
            wanted = [self._hidden, *self.parameters]
            factor = torch.full_like(result.loss, self.scale)
            # Where the logits are the model's own, the next term comes by the same graph.
            gradients = torch.autograd.grad(result.loss, wanted, factor, retain_graph=True, allow_unused=True)
            hidden, *head = (
                torch.zeros_like(t, dtype=torch.float32) if g is None else g.float() / self.scale
                for g, t in zip(gradients, wanted, strict=True)
            )
            found.append(hidden.flatten())
            for total, gradient in zip(self.head[number], head, strict=True):
                total += gradient.cpu()
        both = torch.stack(found)
        self.inner += (both @ both.T).cpu()


def _alone(config: CVLossConfig) -> list[CVLossConfig]:
    """For each term an objective that is this term alone, with weight 1."""
    found = []
    for term in config.terms:
        schedules = {name: schedule for name, schedule in term.schedules.items() if name != "weight"}
        term = term.model_copy(update={"weight": 1.0, "schedules": schedules})
        found.append(config.model_copy(update={"terms": [term]}))
    return found


def probe(trainer: ObjectiveTrainer, batches: int, share: float | None = None) -> dict[str, Any]:
    """What is known of each term from the first micro-batches of a trainer, and the memory of a step.

    The gradient is that of one step whose micro-batches these are. Training was not begun before, and cannot be after.

    Args:
        share: Also the weight that would give each term this share of the gradient.
    """
    drawing = type(trainer.__class__.__name__, (Drawing, type(trainer)), {"probe_batches": batches})
    trainer.__class__ = drawing
    trainer.callback_handler.callbacks = []  # nothing is logged or saved
    try:
        trainer.train()
        raise RuntimeError(f"{KEY}: the training set has no batch")
    except Drawn as drawn:
        samples, count = drawn.args
    installed, model = trainer.cv_loss, trainer.model_wrapped
    longest = max(samples, key=lambda sample: sample["labels"].numel())

    def step() -> None:
        trainer.training_step(model, dict(longest), count)
        model.zero_grad()

    step()  # the model is looked at here, and libraries are loaded
    memory: dict[str, int | None] = {"with_objective": _peak(step, trainer.args.device)}
    head = installed._tap.find()
    if head is None:
        raise RuntimeError(f"{KEY}: {type(installed.model).__name__} has no head that get_output_embeddings() gives")
    objective, scaler = installed.objective, trainer.accelerator.scaler
    found = Probe(objective, head, 1.0 if scaler is None else scaler.get_scale())
    installed.objective = found
    try:
        for sample in samples:
            with trainer.compute_loss_context_manager():
                trainer.compute_loss(model, trainer._prepare_inputs(dict(sample)), num_items_in_batch=count)
    finally:
        installed.objective = objective
        found.handle.remove()
    uninstall(trainer.model)

    ours = (*objective.config.columns, NUMBER, DOCUMENT_WEIGHTS)

    def own() -> None:
        inputs = trainer._prepare_inputs({k: v for k, v in longest.items() if k not in ours})
        with trainer.compute_loss_context_manager():
            loss = model(**inputs).loss
        trainer.accelerator.backward(loss)
        model.zero_grad()

    try:
        memory["without_objective"] = _peak(own, trainer.args.device)
    except torch.OutOfMemoryError:
        memory["without_objective"] = None
    said = {"batches": len(samples), "rows": int(found.rows[-1]), "device": str(trainer.args.device)}
    return {**said, **summary(found, share), "memory": memory}


def summary(found: Probe, share: float | None = None) -> dict[str, Any]:
    """The terms and the warnings, from what a probe has summed up."""
    weights = [term.at(END).weight for term in found.terms]
    norms = found.inner.diagonal().clamp_min(0).sqrt().tolist()
    parts = [weight * norm for weight, norm in zip(weights, norms, strict=False)]
    terms: list[dict[str, Any]] = []
    for number, (term, weight) in enumerate(zip(found.terms, weights, strict=True)):
        rows, sets = int(found.rows[number]), int(found.sets[number])
        terms.append(
            {
                "name": term.name,
                "weight": weight,
                "value": _finite(float(found.value[number]) / max(1.0, float(found.masses[number]))),
                "rows": rows,
                "sets": sets if term.loss.per_set else None,
                "classes": float(found.classes[number]) / sets if sets else None,
                "gradient_norm": _finite(norms[number]),
                "head_gradient_norm": _finite(_norm(found.head[number])) if found.parameters else None,
                "share": _finite(_ratio(parts[number], sum(parts))),
                "cosine": _finite(_ratio(float(found.inner[number, -1]), norms[number] * norms[-1])),
            }
        )
    if share is not None:
        for number, said in enumerate(terms):
            said["weight_for_share"] = weight_for(share, terms, number)
    return {"terms": terms, "warnings": warnings(terms, found.inner)}


def warnings(terms: Sequence[Mapping[str, Any]], inner: Tensor) -> list[str]:
    """What in the numbers is seldom meant. ``inner`` has the inner products of the unweighted terms."""
    found = []
    for term in terms:
        name, share = term["name"], term["share"]
        if not term["rows"]:
            found.append(f"{name}: it has no rows in these batches, so it trains nothing")
        elif term["value"] is None or term["gradient_norm"] is None:
            found.append(f"{name}: its value or its gradient is NaN or infinite")
        elif not term["gradient_norm"]:
            found.append(f"{name}: it has no gradient, so it trains nothing")
        elif share is not None and share < LITTLE:
            found.append(f"{name}: its share of the gradient is {share:.2%}, so it changes next to nothing")
        if term["rows"] and term["sets"] == term["rows"]:
            found.append(
                f"{name}: each of its sets is one token, so it is a loss of single tokens here; see per: batch"
            )
    for i, one in enumerate(terms):
        for j, other in enumerate(terms[:i]):
            a, b = one["weight"] ** 2 * float(inner[i, i]), other["weight"] ** 2 * float(inner[j, j])
            both = a + b + 2 * one["weight"] * other["weight"] * float(inner[i, j])
            if 4 * both < max(a, b):
                left = math.sqrt(max(0.0, both) / max(a, b))
                found.append(
                    f"{other['name']} and {one['name']} cancel: together their gradient is {left:.0%} of the larger one"
                )
    return found


def weight_for(share: float, terms: Sequence[Mapping[str, Any]], number: int) -> float | None:
    """The weight that gives a term this share, the other weights as they are; None where there is none."""
    norm = terms[number]["gradient_norm"]
    others = [t["weight"] * (t["gradient_norm"] or 0.0) for i, t in enumerate(terms) if i != number]
    return share / (1 - share) * sum(others) / norm if norm and sum(others) else None


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _peak(step: Callable[[], None], device: torch.device) -> int | None:
    """The most memory in use during a step, in bytes: of the accelerator, or resident where Linux tells that."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        step()
        return torch.accelerator.max_memory_allocated()
    try:
        with suppress(AttributeError):  # a C library other than GNU's
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        step()
        peak = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(peak[1]) if peak else None


def of_axolotl(config: Path, folder: str) -> ObjectiveTrainer:
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import setup_model_and_trainer

    cfg = load_cfg(str(config), output_dir=folder, use_wandb=False, use_mlflow=False, use_comet=False)
    trainer: Any = setup_model_and_trainer(cfg, load_datasets(cfg=cfg))[0]
    return trainer


def of_trl(config: Path, folder: str) -> ObjectiveTrainer:
    from ..hosts.trl_cli import built

    trainer: Any = built(config, folder, {"report_to": "none"})
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("host", "config", "out"):
        parser.add_argument(name)
    parser.add_argument("--batches", type=int, required=True)
    parser.add_argument("--share", type=float)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = {"axolotl": of_axolotl, "trl": of_trl}[args.host](Path(args.config), folder)
        found = probe(trainer, args.batches, args.share)
    Path(args.out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
