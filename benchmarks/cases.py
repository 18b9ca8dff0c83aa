"""What is measured: the data, and a table of the ways to get a loss and its gradients from hidden states and a head."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from axolotl_cvloss import Objective, available_losses


@dataclass
class Settings:
    """The shape and the kind of the data of a measurement."""

    rows: int
    hidden: int
    vocab: int
    dtype: str
    device: str
    data: str  # a key of DATA
    document_rows: int

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


@dataclass
class Data:
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (N,), all of them trained
    position_ids: Tensor  # (N,), from 0 in each document
    document_rows: int
    logits: Tensor | None = None  # (N, V), for cases on logits; their hidden and weight are empty

    def inputs(self) -> list[Tensor]:
        return [self.hidden, self.weight] if self.logits is None else [self.logits]


def random_data(
    rows: int, hidden: int, vocab: int, labels: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Hidden states and a head that know nothing of the labels; logits of standard deviation 1.5."""
    normal = {"generator": generator, "device": labels.device}
    return torch.randn(rows, hidden, **normal), 1.5 / hidden**0.5 * torch.randn(vocab, hidden, **normal)


def trained_data(
    rows: int, hidden: int, vocab: int, labels: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Hidden states and a head as of a trained model: many targets are almost certain, some are almost excluded.

    A row is noise plus a multiple of the head's weight for its target, and for two rivals that are frequent labels.
    The multiples let them compete with all other tokens together, such that 1803 rows are much like GSM8K's answers
    under a pretrained model of 135M parameters: mean p of the targets 0.53 (there 0.53), 259 classes (236), and 10
    errors a row that matter to lovasz (6), all rows taken as one set.
    """
    normal = {"generator": generator, "device": labels.device}
    weight = torch.randn(vocab, hidden, **normal) / hidden**0.5
    noise = 1.5
    states = noise * torch.randn(rows, hidden, **normal)
    level = math.log(vocab) + noise**2 / 2  # about the logsumexp of the noise
    for mean, spread, chosen in [(1.0, 4.0, labels), *((-3.0, 3.0, _shuffled(labels, generator)) for _ in range(2))]:
        strength = (level + mean + spread * torch.randn(rows, **normal)).clamp_min(0)
        states += strength[:, None] * weight[chosen]
    return states, weight


def _shuffled(labels: Tensor, generator: torch.Generator) -> Tensor:
    return labels[torch.randperm(len(labels), generator=generator, device=labels.device)]


DATA = {"trained": trained_data, "random": random_data}


def make_data(settings: Settings, frozen: bool = False, on_logits: bool = False) -> Data:
    """The same data at every call, on 300 different labels of which some are much more frequent than others."""
    generator = torch.Generator(settings.device).manual_seed(0)
    pool = torch.randperm(settings.vocab, generator=generator, device=settings.device)[:300]
    frequency = 1 / torch.arange(1, len(pool) + 1, device=settings.device)
    labels = pool[torch.multinomial(frequency, settings.rows, replacement=True, generator=generator)]
    hidden, weight = DATA[settings.data](settings.rows, settings.hidden, settings.vocab, labels, generator)
    dtype = getattr(torch, settings.dtype)
    data = Data(
        hidden=hidden.to(dtype),
        weight=weight.to(dtype),
        labels=labels,
        position_ids=torch.arange(settings.rows, device=settings.device) % settings.document_rows,
        document_rows=settings.document_rows,
    )
    if on_logits:
        data.logits = data.hidden @ data.weight.T
        data.hidden, data.weight = data.hidden[:0], data.weight[:0]
    for tensor in data.inputs():
        tensor.requires_grad_(not (frozen and tensor is data.weight))
    return data


@torch.no_grad()
def describe(settings: Settings) -> dict[str, float]:
    """What of the data decides how much set-level losses cost, and how many products may be skipped."""
    data = make_data(settings)
    p_target, present, matter = [], 0, 0
    parts = zip(data.hidden.split(data.document_rows), data.labels.split(data.document_rows), strict=True)
    for hidden, labels in parts:
        p = (hidden @ data.weight.T).float().softmax(-1)
        classes, index = labels.unique(return_inverse=True)
        target = p.gather(1, labels[:, None]).squeeze(1)
        smallest = p.new_full((len(classes),), math.inf).scatter_reduce(0, index, 1 - target, "amin")
        other = labels[:, None] != classes
        p_target.append(target)
        present += len(classes)
        matter += int((other & (p[:, classes] >= smallest)).sum())
    p = torch.cat(p_target)
    return {
        "mean p of the targets": float(p.mean()),
        "median p of the targets": float(p.median()),
        "classes in a document": present / len(p_target),
        "errors that matter to lovasz, a row": matter / len(p),
    }


# The same losses written plainly on all logits, as one would without this package. ``logits.float()`` is what
# transformers does, and nothing for float32.


def cross_entropy(logits: Tensor, data: Data) -> Tensor:
    return F.cross_entropy(logits.float(), data.labels)


def focal(logits: Tensor, data: Data) -> Tensor:
    logp = logits.float().log_softmax(-1).gather(1, data.labels[:, None])
    return -((1 - logp.exp()) ** 2 * logp).mean()


def generalized_dice(logits: Tensor, data: Data) -> Tensor:
    p = logits.float().softmax(-1)
    values = []
    for part, labels in zip(p.split(data.document_rows), data.labels.split(data.document_rows), strict=True):
        count = torch.bincount(labels, minlength=p.shape[1])
        weight = torch.where(count > 0, 1 / count**2, 0)
        overlap = (weight[labels] * part.gather(1, labels[:, None]).squeeze(1)).sum()
        total = (weight * (part.sum(0) + count)).sum()
        values.append((1 - (2 * overlap + 1e-5) / (total + 1e-5)) * len(part))
    return torch.stack(values).sum() / len(p)


def cross_entropy_and_dice(logits: Tensor, data: Data) -> Tensor:
    logits = logits.float()
    return 0.6 * cross_entropy(logits, data) + 0.4 * generalized_dice(logits, data)


def lovasz_class_loop(logits: Tensor, data: Data) -> Tensor:
    """One sort for each class that occurs, in a loop over the vocabulary, as in public code and the paper's."""
    p = logits.float().softmax(-1)
    values = []
    for c in range(p.shape[1]):
        foreground = (data.labels == c).float()
        if foreground.sum() == 0:
            continue
        errors, order = (foreground - p[:, c]).abs().sort(descending=True)
        hits = foreground[order].cumsum(0)
        misses = (1 - foreground[order]).cumsum(0)
        jaccard = 1 - (hits[-1] - hits) / (hits[-1] + misses)
        values.append(errors @ torch.cat([jaccard[:1], jaccard.diff()]))
    return torch.stack(values).mean()


def matrix_products(count: int) -> Callable[[Data], Callable[[], None]]:
    """The floor: the products that a fused loss cannot do without, in chunks of 256 rows, into buffers at hand.

    2: logits and gradient of hidden states; 3: and of the head; 4: and the logits once more.
    """

    def prepare(data: Data) -> Callable[[], None]:
        hidden, weight = data.hidden.detach(), data.weight.detach()
        buffer = hidden.new_empty(256, len(weight))
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight) if count > 2 else weight[:0]

        def run() -> None:
            for rows, grad in zip(hidden.split(256), hidden_grad.split(256), strict=True):
                logits = buffer[: len(rows)]
                for _ in range(2 if count == 4 else 1):
                    torch.mm(rows, weight.T, out=logits)
                torch.mm(logits, weight, out=grad)
                if count > 2:
                    weight_grad.addmm_(logits.T, rows)

        return run

    return prepare


# Each of these makes, from data, a function that computes the loss to differentiate.


def full_logits(loss: Callable[[Tensor, Data], Tensor]) -> Callable[[Data], Callable[[], Tensor]]:
    return lambda data: lambda: loss(data.hidden @ data.weight.T, data)


def given_logits(loss: Callable[[Tensor | None, Data], Tensor]) -> Callable[[Data], Callable[[], Tensor]]:
    return lambda data: lambda: loss(data.logits, data)


def objective_of_hidden(config: dict[str, float]) -> Callable[[Data], Callable[[], Tensor]]:
    def prepare(data: Data) -> Callable[[], Tensor]:
        objective = Objective.from_config(config)
        keywords = {"shift": False, "position_ids": data.position_ids}
        return lambda: objective.from_hidden(data.hidden, data.weight, data.labels, **keywords).loss

    return prepare


def lovasz_of_logits(data: Data) -> Callable[[], Tensor]:
    objective = Objective.from_config("lovasz")
    return lambda: objective.from_logits(data.logits, data.labels, shift=False).loss


def torch_chunked(data: Data) -> Callable[[], Tensor]:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda: F.linear_cross_entropy(data.hidden, data.weight, data.labels, options=options)


def liger(data: Data) -> Callable[[], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(data.weight, data.hidden, data.labels)


def cut_cross_entropy(data: Data) -> Callable[[], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return lambda: linear_cross_entropy(data.hidden, data.weight, data.labels)


@dataclass(frozen=True)
class Case:
    """A way to get a loss and its gradients, what it is compared with, and the ratios it should stay below."""

    kind: str  # floor, peer, plain (PyTorch), fused (this package)
    prepare: Callable[[Data], Callable[[], Tensor | None]]
    base: str
    frozen: bool = False
    rows: int | None = None  # of logits that are given, in the place of hidden states
    time_limit: float | None = None
    memory_limit: float | None = None


CROSS_ENTROPY = "F.cross_entropy, full logits"
LIGER = "Liger fused linear cross-entropy"
CLASS_LOOP = "lovasz, loop over all classes, on 512 rows of logits"
FROZEN = ", frozen head"

# Ratios of time and memory to the base: of cross_entropy and mixtures of it with a loss of a family.
LIMITS = {
    "cpu": {"token": (0.95, 0.20), "region": (1.25, 0.25), "ranking": (1.35, 0.30), "frozen": (1.00, 0.20)},
    "cuda": {"token": (1.00, 1.00), "region": (1.25, None), "ranking": (1.35, None)},
}
NO_LIMIT = (None, None)


MIXED = ("focal", "self_adjusting_dice", "dice", "generalized_dice", "tversky", "lovasz")


def objectives(alone: Sequence[str]) -> dict[str, dict[str, float]]:
    """Losses alone, the paper's and the usual ones mixed with cross-entropy, and a mixture of three."""
    configs = [{name: 1.0} for name in alone]
    configs += [{"cross_entropy": 0.6, name: 0.4} for name in MIXED]
    configs += [{"cross_entropy": 0.6, "generalized_dice": 0.2, "lovasz": 0.2}]
    return {
        " + ".join(f"{weight:g} {name}" for name, weight in config.items()).removeprefix("1 "): config
        for config in configs
    }


def limits_of(config: dict[str, float], device: str, frozen: bool) -> tuple[float | None, float | None]:
    limits = LIMITS[device]
    if frozen:
        return limits.get("frozen", NO_LIMIT)
    families = {available_losses()[name].family for name in config}
    if families == {"token"}:
        return limits["token"]
    if "cross_entropy" in config and len(config) == 2:
        return limits.get((families - {"token"}).pop(), NO_LIMIT)
    return NO_LIMIT


def all_cases(device: str) -> dict[str, Case]:
    """The cases by name; what is compared with comes first."""
    on_gpu = device == "cuda"
    has_liger = on_gpu and importlib.util.find_spec("liger_kernel") is not None
    base = LIGER if has_liger else CROSS_ENTROPY
    peers = {CROSS_ENTROPY: full_logits(cross_entropy)}
    if has_liger:
        peers[LIGER] = liger
    if on_gpu and importlib.util.find_spec("cut_cross_entropy") is not None:
        peers["cut cross-entropy"] = cut_cross_entropy
    if hasattr(F, "linear_cross_entropy"):
        peers["F.linear_cross_entropy, chunked"] = torch_chunked
    plain = {
        "focal, full logits": focal,
        "generalized_dice, full logits": generalized_dice,
        "0.6 cross_entropy + 0.4 generalized_dice, full logits": cross_entropy_and_dice,
    }
    cases = {}
    for frozen, end in (False, ""), (True, FROZEN):
        to = base + end
        cases.update({name + end: Case("peer", prepare, to, frozen) for name, prepare in peers.items()})
        for count in (2,) if frozen else (3, 4):
            cases[f"floor: {count} matrix products{end}"] = Case("floor", matrix_products(count), to, frozen)
        if not frozen:
            cases.update({name: Case("plain", full_logits(loss), to) for name, loss in plain.items()})
        losses = [name for name, loss in available_losses().items() if not loss.needs_more]
        alone = ["cross_entropy"] if frozen else losses
        for name, config in objectives(alone).items():
            limits = limits_of(config, device, frozen)
            cases[name + end] = Case("fused", objective_of_hidden(config), to, frozen, None, *limits)
    cases[CLASS_LOOP] = Case("plain", given_logits(lovasz_class_loop), CLASS_LOOP, rows=512)
    cases["F.cross_entropy, on 512 rows of logits"] = Case("peer", given_logits(cross_entropy), CLASS_LOOP, rows=512)
    cases["lovasz, on 512 rows of logits"] = Case("fused", lovasz_of_logits, CLASS_LOOP, rows=512, time_limit=1 / 50)
    return cases
