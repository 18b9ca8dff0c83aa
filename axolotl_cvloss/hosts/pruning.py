"""``prune``: epochs without a share of the examples that are learnt well, whose place the others of them take.

The number of an example goes with it into its batch (``numbered``, ``NumberCollator``), so that neither processes nor
workers nor the order of batches can give its loss or its weight to another one. ``PrunedSampler`` stands between the
sampler of the host and its batches. ``Pruning`` has the losses, draws, and keeps the clock.
"""

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.utils import broadcast, reduce
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, Sampler
from transformers import TrainerCallback

from ..model.installation import NUMBER
from ..objective.config import PruneConfig
from . import prune_keys
from .prune_keys import FEWEST
from .sums import FEW

try:
    from datasets import Dataset as Rows
except ImportError:
    Rows = None

FILE = "cv_loss_prune.pt"  # in a checkpoint


def weights_of_epoch(losses: Tensor, share: float, multiple: int, generator: torch.Generator) -> Tensor:
    """(N,) float32: the weight of each example in an epoch; 0: it is left out.

    Of the m examples whose loss is below the mean, k are drawn and weigh m / k; all others weigh 1. So whatever the
    examples are multiplied by, the sum over the epoch is in expectation that of all of them. k is the (1 - share) of m,
    and as many more as are needed to make the number of all a multiple of ``multiple``.

    Args:
        losses: (N,), NaN where none is known.
        share: Of the m examples, that which is left out.
        multiple: The examples of a step.
        generator: What is drawn from.
    """
    losses = losses.double()
    weights = torch.ones(len(losses))
    well = (losses < losses.nanmean()).nonzero().squeeze(1)
    others, m = len(losses) - len(well), len(well)
    kept = -(-(others + m - int(share * m)) // multiple) * multiple
    if m and kept < len(losses):
        k = kept - others
        weights[well] = 0.0
        weights[well[torch.randperm(m, generator=generator)[:k]]] = m / k
    return weights


class Pruning(TrainerCallback):
    """The losses of the examples, which of them an epoch has, and how far training is.

    The clock counts the steps of whole epochs: learning rates, schedules and the end of training go by it, so that each
    epoch is the same part of training, however many steps it has. All processes hold the same.
    """

    def __init__(self, config: PruneConfig) -> None:
        self.config = config
        self.weights: Tensor | None = None  # of the examples in this epoch; None: all weigh 1

    def start(self, count: int, max_steps: int, whole: int, multiple: int, seed: int) -> None:
        """Before training.

        Args:
            count: The examples.
            max_steps: The steps of training if all epochs were whole.
            whole: The steps of a whole epoch.
            multiple: The examples of a step.
            seed: For the draws.

        Raises:
            RuntimeError: There are too few epochs.
        """
        self.count, self.max_steps, self.whole, self.multiple, self.seed = count, max_steps, whole, multiple, seed
        epochs = max_steps / whole
        if math.ceil(epochs) < FEWEST:
            raise RuntimeError(f"cv_loss.prune: needs {FEWEST} epochs or more, and {max_steps} steps are {epochs:.3g}")
        if self.config.until * epochs < 2:
            raise RuntimeError(
                f"cv_loss.prune.until: {self.config.until:g} of {epochs:.3g} epochs leaves none to prune, as the first "
                f"is whole; allowed: {2 / epochs:.3g} to 1"
            )
        self.losses = torch.full((count,), math.nan)
        self.weights = torch.ones(count)
        self._seen = torch.zeros(2, count, dtype=torch.float64)  # in this epoch, here: sums of losses, and how many
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._on: Tensor | None = None
        self.epoch, self.step, self.steps, self.before = -1, 0, whole, 0
        self._within = False  # an epoch that a checkpoint was made in goes on

    # The clock

    @property
    def position(self) -> int:
        """How many steps training would have made if all epochs were whole."""
        return min(self.max_steps, max(self.epoch, 0) * self.whole + self.step * self.whole // self.steps)

    @property
    def progress(self) -> float:
        return self.position / self.max_steps

    @property
    def left_out(self) -> float:
        """The share of the examples of whole epochs that were left out so far."""
        return 1 - (self.before + self.step) / self.position if self.position else 0.0

    @property
    def last_step(self) -> int:
        """The step that training ends with, if no epoch after this one is pruned; the last never is."""
        rest = self.max_steps - self.epoch * self.whole
        here = -(-min(rest, self.whole) * self.steps // self.whole)
        return self.before + here + max(0, rest - self.whole)

    # The callback

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._within:
            self._within = False
        else:
            self.before, self.step, self.epoch = self.before + self.step, 0, self.epoch + 1
            self._draw(args.device)
        state.max_steps = self.last_step

    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        behind = self.position + 1  # Trainer has taken one step of it
        self.step += 1
        if self.steps != self.whole:
            state.epoch = self.epoch + self.step / self.steps
        if lr_scheduler is not None and "metrics" not in inspect.signature(lr_scheduler.step).parameters:
            for _ in range(self.position - behind):
                lr_scheduler.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seen = self._seen_by_all(args.device)
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if args.should_save and folder.is_dir():
            names = ("losses", "weights", "epoch", "step", "steps", "before", "count", "whole", "multiple")
            torch.save({"seen": seen, **{name: getattr(self, name) for name in names}}, folder / FILE)

    def resume(self, checkpoint: str, first: bool) -> tuple[int, int]:
        """Go on from a checkpoint; ``first`` is whether this is the first process. The epoch, and its steps so far."""
        file = Path(checkpoint, FILE)
        if not file.is_file():
            raise RuntimeError(
                f"cv_loss.prune: {checkpoint} has no {FILE}, so it was not trained with prune; start anew, or leave "
                "prune out"
            )
        saved = torch.load(file, map_location="cpu", weights_only=True)
        for name, what in (("count", "examples"), ("whole", "steps an epoch"), ("multiple", "examples a step")):
            if (was := saved.pop(name)) != (now := getattr(self, name)):
                raise RuntimeError(
                    f"cv_loss.prune: {checkpoint} was trained with {was} {what}, and now there are {now}"
                )
        seen = saved.pop("seen").double()
        for name, value in saved.items():
            setattr(self, name, value)
        if first:  # what all have seen is the sum of what each has
            self._seen = seen
        self._within = self.step < self.steps
        return (self.epoch, self.step) if self._within else (self.epoch + 1, 0)

    # Losses and weights

    def weights_of(self, numbers: Tensor) -> Tensor | None:
        """The weights of examples, on the device of their numbers; None: all weigh 1."""
        if self.weights is None:
            return None
        if self._on is None or self._on.device != numbers.device:
            self._on = self.weights.to(numbers.device)
        return self._on[numbers]

    def add(self, numbers: Tensor, logp: Tensor) -> None:
        """Of a micro-batch: the example of each trained row, and its log p."""
        if self.weights is None:
            return
        self._waiting.append((numbers, logp.detach()))
        if len(self._waiting) == FEW:
            self._fold()

    def _fold(self) -> None:
        waiting, self._waiting = self._waiting, []
        for numbers, logp in waiting:
            own, row = numbers.cpu().unique(return_inverse=True)
            sums = torch.zeros(len(own), dtype=torch.float64).index_add_(0, row, -logp.cpu().double())
            # As float32, in which it comes to the other processes and into checkpoints.
            means = (sums / row.bincount(minlength=len(own))).float().double()
            self._seen.index_add_(1, own, torch.stack([means, torch.ones_like(means)]))

    def _seen_by_all(self, device: torch.device) -> Tensor:
        """Also on the other processes."""
        self._fold()
        return reduce(self._seen.float().to(device), "sum").cpu()

    def _draw(self, device: torch.device) -> None:
        """The weights of this epoch. The first process draws for all."""
        sums, times = self._seen_by_all(device)
        self._seen.zero_()
        self.losses = torch.where(times > 0, sums / times, self.losses)
        weights = torch.ones(self.count)
        if self.epoch + 1 <= self.config.until * self.max_steps / self.whole:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            drawn = weights_of_epoch(self.losses, self.config.share, self.multiple, generator)
            # Where a whole epoch drops its last examples, another may have no fewer steps.
            weights = drawn if int(drawn.count_nonzero()) < self.whole * self.multiple else weights
        self.weights, self._on = broadcast(weights.to(device)).cpu(), None
        kept = int(self.weights.count_nonzero())
        self.steps = self.whole if kept == self.count else kept // self.multiple


# The number of an example, on its way to the objective


class PrunedSampler(Sampler[int]):
    """The order of another sampler, without what an epoch leaves out. Its length is that of a whole epoch."""

    def __init__(self, sampler: Any, pruning: Pruning) -> None:
        self.sampler, self.pruning = sampler, pruning

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        assert self.pruning.weights is not None
        kept = (self.pruning.weights > 0).tolist()
        return (number for number in self.sampler if kept[number])

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def place(loader: Any, pruning: Pruning) -> Any:
    """Put the sampler into what accelerate has made of a DataLoader."""
    batches: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):  # that of one process, made from that of all
        batches = batches.batch_sampler
    sampler = getattr(batches, "sampler", None)
    if isinstance(loader, DataLoaderDispatcher) or not hasattr(loader, "set_sampler") or sampler is None:
        raise RuntimeError(
            f"cv_loss.prune: cannot leave examples out of a {type(loader).__name__}; leave dispatch_batches and a "
            "get_train_dataloader of your own out"
        )
    loader.set_sampler(PrunedSampler(sampler, pruning))
    return loader


class Numbered(Dataset[Any]):
    """Examples that know their number."""

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> Any:
        return {**self.examples[number], NUMBER: number}


if Rows is not None:

    class NumberedRows(Rows):
        """The same of a dataset of the library ``datasets``, which hosts ask for its columns."""

        def __getitem__(self, key: Any) -> Any:
            found = super().__getitem__(key)
            return {**found, NUMBER: key} if isinstance(key, int) else found

        def __getitems__(self, keys: list[int]) -> list[Any]:
            return [{**found, NUMBER: number} for found, number in zip(super().__getitems__(keys), keys, strict=True)]


def numbered(examples: Any) -> Any:
    """The dataset with the number of each example in it; it is no column that a host could drop."""
    if Rows is None or not isinstance(examples, Rows):
        return Numbered(examples)
    examples = copy.copy(examples)
    examples.__class__ = NumberedRows
    return examples


class NumberCollator:
    """A data collator that adds the numbers of the examples to each batch: (B,), or (1, T) where all are one line."""

    def __init__(self, collator: Callable[..., Any]) -> None:
        self.collator = collator

    def __call__(self, features: list[Any], *args: Any, **kwargs: Any) -> Any:
        numbers = torch.tensor([feature[NUMBER] for feature in features])
        features = [{name: value for name, value in each.items() if name != NUMBER} for each in features]
        lengths = [len(each["input_ids"]) for each in features if "input_ids" in each]
        batch = self.collator(features, *args, **kwargs)
        shape = batch["labels"].shape
        if len(numbers) != shape[0]:
            if shape != (1, sum(lengths)):
                raise ValueError(
                    f"cv_loss.prune: {type(self.collator).__name__} makes labels of shape {tuple(shape)} from "
                    f"{len(features)} examples; one line an example is allowed, or one line of all and nothing else"
                )
            numbers = numbers.repeat_interleave(torch.tensor(lengths))[None]
        batch[NUMBER] = numbers
        return batch


def conflicts(trainer: Any) -> list[str]:
    """What of a trainer cannot be had with ``prune``."""
    args = trainer.args
    found = prune_keys.conflicts(
        packed=next((name for name in ("packing", "sample_packing") if getattr(args, name, False)), None),
        streamed="a streamed dataset" if streamed(trainer.train_dataset) else None,
        epochs=("num_train_epochs", args.num_train_epochs) if args.max_steps <= 0 else None,
    )
    if args.ignore_data_skip:
        found.append(
            "cv_loss.prune cannot be used with ignore_data_skip: an epoch has to go on where its checkpoint was made"
        )
    if not hasattr(trainer, "_init_training_state"):
        found.append(
            "cv_loss.prune cannot be used with this version of transformers: its Trainer cannot be told where an epoch "
            "of another length goes on; 5.16 can"
        )
    return found


def streamed(data: Any) -> bool:
    """Whether a training set has no length."""
    return data is not None and (isinstance(data, IterableDataset) or not hasattr(data, "__len__"))
