"""Batches whose documents and padding are known without asking the package, and the naive objective of a batch."""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from naive import COUNTS, NAIVE, REFERENCE

from axolotl_cvloss.losses import registry

IGNORE = -100
DEVICE = torch.zeros(()).device  # where tensors of tests are; see conftest.py
HOSTS_PAGE = Path(__file__).parents[1] / "docs" / "hosts.md"


class Tokenizer:
    """As much of a tokenizer as is asked for: its vocabulary. Real ones are used in tests/hosts."""

    def __init__(self, *tokens):
        self.tokens = tokens

    def get_vocab(self):
        return {token: number for number, token in enumerate(self.tokens)}


# Those of naive.NUMBERS are numbers of one digit.
DIGITS = Tokenizer("the", "3", "\u01207", "12", "\u25810", "a1", "-4", "1.5", "five", "²", "٣", "²3")
NUMBER_LOSSES = ["number_token_wasserstein", "number_token_mse", "number_token_gaussian"]
# What an objective is told so that every loss has all that it needs.
KNOWN = {"tokenizer": DIGITS, "label_counts": torch.tensor(COUNTS)}


# The losses of tests/guest.
GUEST_MIX = {"huberised": {"weight": 0.6, "tau": 5.0}, "fowlkes_mallows": 0.4}

# An objective that no batch alone is enough for.
NEEDS_MORE = {
    "cross_entropy": {"weight": 0.4, "goldfish": {"k": 3, "h": 3}},
    "ldam": {"weight": 0.3},
    "number_token_wasserstein": {"weight": 0.2},
    "number_token_mse": {"weight": 0.1},
}


@dataclass
class Batch:
    """A batch as a host makes it. ``documents`` (B, T) says what is what: the document of a token, -1 for padding."""

    logits: torch.Tensor
    labels: torch.Tensor
    documents: torch.Tensor
    inputs: dict = field(default_factory=dict)  # position_ids, attention_mask, input_ids, shift

    def result(self, objective, logits=None, **more):
        inputs = dict(self.inputs)
        if objective.needs_reference:
            inputs["reference_logps"] = self.reference_logps()
        return objective.from_logits(self.logits if logits is None else logits, self.labels, **inputs, **more)

    def reference_logps(self):
        """Of each token as ``naive.REFERENCE`` has it; also of those without a label, where the tokens are known."""
        tokens = self.labels.where(self.labels != IGNORE, self.inputs.get("input_ids", torch.zeros_like(self.labels)))
        return torch.tensor(REFERENCE, dtype=torch.float64).log()[tokens.long()]

    def to(self, dtype):
        return replace(self, logits=self.logits.to(dtype))

    def rows(self, scope="completion"):
        """Every trained row as ((b, t), target, document), by the definition, one position after the other.

        A row next to padding is of the document of its other token.
        """
        documents, labels = torch.atleast_2d(self.documents), torch.atleast_2d(self.labels)
        shift = self.inputs.get("shift", True)
        found = []
        for b, line in enumerate(documents.tolist()):
            for t, document in enumerate(line):
                following = line[t + 1] if t + 1 < len(line) else document
                inside = t + 1 < len(line) and following == document >= 0
                edge = "attention_mask" in self.inputs and (document == -1) != (following == -1)
                target = IGNORE if shift and not (inside or edge) else int(labels[b, t + 1 if shift else t])
                if scope == "sequence" and target == IGNORE and inside:
                    target = int(torch.atleast_2d(self.inputs["input_ids"])[b, t + 1])
                if target != IGNORE:
                    found.append(((b, t), target, following if edge and document == -1 else document))
        return found

    def unused(self):
        """Where the logits predict nothing that is trained, in the shape of the labels."""
        mask = torch.ones_like(torch.atleast_2d(self.labels), dtype=torch.bool)
        for at, _, _ in self.rows():
            mask[at] = False
        return mask.view_as(self.labels)


def naive_loss(batch, logits, terms):
    """The weighted sum of the naive losses; terms as in the long form of the key, but ``where`` is a column."""
    logits = logits.view(*torch.atleast_2d(batch.labels).shape, -1)
    total = logits.sum() * 0
    for term in terms:
        fields = {"weight": 1.0, "scope": "completion", "per": "document", "goldfish": None, "where": None, **term}
        own = ("loss", "weight", "scope", "per", "goldfish", "where")
        name, weight, scope, per, fish, acts = (fields.pop(f) for f in own)
        rows = batch.rows(scope)
        if acts is not None:
            ahead = 1 if batch.inputs.get("shift", True) else 0
            acts = torch.atleast_2d(acts)
            rows = [((b, t), *rest) for (b, t), *rest in rows if acts[b, t + ahead] == 1]
        if fish:
            dropped = dropped_naive(batch.inputs["input_ids"], batch.documents, **fish)
            rows = [row for row in rows if not dropped[row[0]]]
        if rows:
            places, targets, documents = zip(*rows, strict=True)
            chosen = torch.stack([logits[at] for at in places])
            sets = torch.tensor(documents) if per == "document" else None
            total = total + weight * NAIVE[name](chosen, torch.tensor(targets), sets, **fields)
    return total


def naive_documents(batch, logits, terms, power, weights=None):
    """The same, each term by document: the mean of the values that they have alone, by n^(1 - power) of n rows of the
    term; ``weights`` by document multiply this, and not what it is divided by."""
    total = logits.sum() * 0
    for term in terms:
        value, mass = logits.sum() * 0, 0.0
        for document in {d for _, _, d in batch.rows(term.get("scope", "completion"))}:
            alone = _Alone(batch, document)
            rows = alone.rows(term.get("scope", "completion"))
            if fish := term.get("goldfish"):
                dropped = dropped_naive(batch.inputs["input_ids"], batch.documents, **fish)
                rows = [row for row in rows if not dropped[row[0]]]
            if rows:
                own = len(rows) ** (1 - power)
                mass += own
                weight = 1.0 if weights is None else float(weights[document])
                value = value + weight * own * naive_loss(alone, logits, [term])
        total = total + value / max(mass, 1)
    return total


def nlls(batch, logits):
    """The mean NLL and the number of trained rows of each document, by its number."""
    found = {}
    for (b, t), target, document in batch.rows():
        logp = torch.atleast_3d(logits).detach()[b, t].double().log_softmax(-1)[target]
        found.setdefault(document, []).append(-float(logp))
    return {document: (sum(each) / len(each), len(each)) for document, each in found.items()}


def naive_weights(losses, masses, examples):
    """Document after document, in Python's own numbers; the smooth form by bisection."""
    losses, total = [float(x) for x in losses], float(sum(masses))
    masses = [float(x) / total for x in masses]
    if (by := examples.get("reweight")) is not None:
        low, high = min(losses), max(losses)
        forms = {"linear": lambda h: min(h + 1, 1), "quadratic": lambda h: 1 - h * h, "extremes": abs}
        raw = [math.exp(forms[by["by"]]((2 * x - high - low) / (high - low)) / by["r"]) for x in losses]
        mean = sum(m * w for m, w in zip(masses, raw, strict=True))
        return torch.tensor([w / mean for w in raw], dtype=torch.float64)
    share, reg = examples["cvar"]["share"], examples["cvar"].get("reg", 0)
    if reg:
        low, high = min(losses) - 100 * reg, max(losses) + 100 * reg
        for _ in range(200):
            eta = (low + high) / 2
            weights = [min(math.exp(min((x - eta) / reg, 100)), 1 / share) for x in losses]
            if sum(m * w for m, w in zip(masses, weights, strict=True)) > 1:
                low = eta
            else:
                high = eta
        return torch.tensor(weights, dtype=torch.float64)
    weights, left = [0.0] * len(losses), share
    for i in sorted(range(len(losses)), key=lambda i: -losses[i]):
        taken = min(left, masses[i])
        weights[i], left = taken / masses[i] / share, left - taken
    return torch.tensor(weights, dtype=torch.float64)


class _Alone:
    """A batch of which one document counts."""

    def __init__(self, batch, document):
        self.batch, self.document = batch, document
        self.labels, self.documents, self.inputs = batch.labels, batch.documents, batch.inputs

    def rows(self, scope="completion"):
        return [row for row in self.batch.rows(scope) if row[2] == self.document]


def dropped_naive(input_ids, documents, k, h):
    """For each row whether goldfish leaves out the token it predicts, one row at a time in Python's own numbers."""
    found = []
    for line, own in zip(input_ids.tolist(), documents.tolist(), strict=True):
        drops = []
        for t in range(len(line)):
            if t + 1 < h or own[t - h + 1] != own[t]:
                drops.append(False)
                continue
            value = 0
            for token in line[t - h + 1 : t + 1]:
                value = (value * 31 + token + 1) % (2**31 - 1)
            for factor in (48271, 69621, 16807):
                value = (value * factor + 11) % (2**31 - 1)
            drops.append(value < (2**31 - 1) // k)
        found.append(drops)
    return torch.tensor(found)


# How batches come. V is small, as the naive losses are slow; the last two tokens are never labels.
VOCAB = 7


def make_batch(kind, seed=0, dtype=torch.float64, vocab=VOCAB, temperature=1.5):
    """A random batch of one of the kinds of ``BATCHES``."""
    generator = torch.Generator().manual_seed(1000 * seed + sorted(BATCHES).index(kind))
    documents = BATCHES[kind][0].clone()
    tokens = torch.randint(0, vocab - 2, documents.shape, generator=generator)
    labels = tokens.clone()
    labels[documents < 0] = IGNORE
    prompt = torch.rand(documents.shape, generator=generator) < 0.3  # anywhere, but for the end of a document
    last = documents != documents.roll(-1, dims=-1)
    last[..., -1] = True
    labels[prompt & ~last] = IGNORE
    logits = temperature * torch.randn(*documents.shape, vocab, generator=generator, dtype=dtype)
    inputs = dict(BATCHES[kind][1])
    if inputs.get("shift", True):
        inputs["input_ids"] = tokens
    return Batch(logits, labels, documents, inputs)


def _documents(*lines):
    """Lines such as "aaab--": one letter a token, - for padding; a letter is one document of its line."""
    return torch.tensor([[-1 if c == "-" else 100 * b + ord(c) for c in line] for b, line in enumerate(lines)])


def _positions(*lines):
    """The same lines: 0, 1, ... in each run of a letter, as Axolotl's collators number tokens and padding."""
    numbers = []
    for line in lines:
        position = []
        for i, c in enumerate(line):
            position.append(position[-1] + 1 if i and line[i - 1] == c else 0)
        numbers.append(position)
    return torch.tensor(numbers)


_PADDED = "aaaaaaaaa", "aaaaaa---", "aaaa-----"
_LEFT = "aaaaaaaa", "--aaaaaa", "-----aaa"
_PACKED = "aaaaabbcccccc-", "aaabbbbbbbbb--"
_NUMBERS = {"a": 1, "b": 2, "c": 3, "-": 0}

BATCHES = {
    "padded": (_documents(*_PADDED), {"attention_mask": (_documents(*_PADDED) >= 0).long()}),
    "padded left": (_documents(*_LEFT), {"attention_mask": (_documents(*_LEFT) >= 0).long()}),
    "packed": (_documents(*_PACKED), {"position_ids": _positions(*_PACKED)}),
    "packed, one mask": (
        _documents(*_PACKED),
        {"position_ids": _positions(*_PACKED), "attention_mask": (_documents(*_PACKED) >= 0).long()},
    ),
    "packed, numbered mask": (
        _documents(*_PACKED),
        {"attention_mask": torch.tensor([[_NUMBERS[c] for c in line] for line in _PACKED])},
    ),
    "rows": (torch.zeros(13, dtype=torch.long), {"shift": False}),
}


def check_slope(loss, hidden):
    """The gradient of a loss in hidden states (float64) is that of its value, by differences under the same seed."""

    def seeded(hidden):
        torch.manual_seed(7)
        return loss(hidden)

    leaf = hidden.clone().requires_grad_()
    (grad,) = torch.autograd.grad(seeded(leaf), leaf)
    direction = torch.randn_like(hidden)
    with torch.no_grad():
        slope = (seeded(hidden + 1e-6 * direction) - seeded(hidden - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-5, atol=1e-8)


@contextmanager
def temporary_losses():
    """Losses registered inside are forgotten afterwards; there is no public way to do so."""
    registry.plugin_manager()
    saved = dict(registry._losses)
    try:
        yield
    finally:
        registry._losses.clear()
        registry._losses.update(saved)


def nll_of(model, tokenizer, rows):
    """Mean NLL of the completions, one row at a time, with nothing of ours."""
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = prompt + tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for i in range(len(prompt), len(ids)):
            total -= float(logp[i - 1, ids[i]])
            count += 1
    return total / count


def snippets():
    """Those of the page on TRL, transformers and plain loops."""
    return [part.split("```")[0] for part in HOSTS_PAGE.read_text(encoding="utf-8").split("```python\n")[1:]]


def snippet(word, *replacements):
    """The one with that word, with each (old, new) replaced."""
    (code,) = [code for code in snippets() if word in code]
    for old, new in replacements:
        assert code.count(old) == 1
        code = code.replace(old, new)
    return code
