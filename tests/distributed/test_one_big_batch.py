"""The gradient of a step, however it is cut up and sharded, against one big batch in one process, computed plainly."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import Batch, naive_documents, naive_loss, naive_weights, nlls
from one_step import ROWS, make_model, make_rows, padded

from axolotl_cvloss.engine.vocabulary import count_labels

MIX = [{"loss": "cross_entropy", "weight": 0.6}, {"loss": "lovasz", "weight": 0.4}]
BESIDE_A_REFERENCE = [{"loss": "importance_weighted"}, {"loss": "anchored", "weight": 0.5, "coefficient": 0.3}]
GLOBAL = {"per": "batch", "reduce": "global"}
# Losses of every family, mixtures of them, and what needs more than a batch.
OBJECTIVES = {
    "cross_entropy": [{"loss": "cross_entropy"}],
    "focal": [{"loss": "focal"}],
    "dice": [{"loss": "dice"}],
    "lovasz": [{"loss": "lovasz"}],
    "topk_cross_entropy": [{"loss": "topk_cross_entropy"}],
    "rows": [  # of number tokens, and of what is collected from all logits of a row
        {"loss": "number_token_wasserstein"},
        {"loss": "number_token_gaussian", "weight": 0.2, "sigma": 4.0},
        {"loss": "weighted_cross_entropy", "weight": 0.1},
        {"loss": "confidence_penalty", "weight": 0.2, "coefficient": 0.5},
        {"loss": "brier", "weight": 0.3},
        {"loss": "squentropy", "weight": 0.01},
        {"loss": "spherical_z", "weight": 0.1},
        {"loss": "asymmetric", "weight": 0.1},
        {"loss": "tofu", "weight": 0.1},
        {"loss": "aldr", "weight": 0.1},
        {"loss": "gem", "weight": 0.1},
    ],
    "ldam": [{"loss": "ldam"}],
    "goldfish": [{"loss": "cross_entropy", "goldfish": {"k": 3, "h": 2}}, {"loss": "dice", "weight": 0.4}],
    "where": [
        {"loss": "cross_entropy"},
        {"loss": "unlikelihood", "weight": 0.5, "where": "acts"},
        {"loss": "dice", "weight": 0.4, "where": "acts", "scope": "sequence"},
    ],
    "reference": BESIDE_A_REFERENCE,
    "mix": MIX,
    "weighted": MIX,
    "examples": MIX,
    "worst": MIX,
    "reweighted": [{"loss": "cross_entropy"}, {"loss": "focal", "scope": "sequence"}],
    "square roots": [{"loss": "cross_entropy", "scope": "sequence"}, {"loss": "dice", "weight": 0.4}],
    "sequence": [{"loss": "cross_entropy", "weight": 0.6, "scope": "sequence"}, {"loss": "dice", "weight": 0.4}],
}
# Their sets are those of one micro-batch of all processes, so they come without accumulation.
OVER_RANKS = {f"global {name}": [{"loss": name, **GLOBAL}] for name in ("dice", "lovasz")}
# The reference is the model without its adapters, so they come where there are some.
WITHOUT_ADAPTERS = {"adapter off": BESIDE_A_REFERENCE}
EVERYTHING = {**OBJECTIVES, **OVER_RANKS, **WITHOUT_ADAPTERS}
MORE = {  # of the key beside the terms
    "weighted": {"example_weights": "importance"},
    "examples": {"examples": {"normalize": "examples"}},
    "square roots": {"examples": {"normalize": "square_root"}},
    "worst": {"examples": {"cvar": 0.4}},
    "reweighted": {"examples": {"normalize": "square_root", "reweight": {"by": "extremes", "warmup": 0}}},
    "reference": {"reference_logps": "reference"},
    "adapter off": {"reference": "adapter_off"},
}

# What each launch of processes runs: that of transformers' Trainer.
PLAIN = {"processes": 1, "sharding": "none", "reshard": True, "head_unit": False, "adapter": "full"}
PLAIN |= {"dtype": "float64", "bf16": False}
DDP = {**PLAIN, "processes": 2, "sharding": "ddp"}
FSDP2 = {**PLAIN, "processes": 2, "sharding": "fsdp2"}
BF16 = {"dtype": "float32", "bf16": True}
ZERO = {**PLAIN, "processes": 2, "dtype": "float32"}  # DeepSpeed knows no float64
LAUNCHES = {
    "1 process": PLAIN,
    "DDP": DDP,
    "DDP, LoRA": {**DDP, "adapter": "LoRA"},
    "FSDP2": FSDP2,
    "FSDP2, LoRA": {**FSDP2, "adapter": "LoRA"},
    "FSDP2, LoRA with head": {**FSDP2, "adapter": "LoRA with head"},
    "FSDP2, no reshard": {**FSDP2, "reshard": False},
    "FSDP2, head unit": {**FSDP2, "head_unit": True},
    "FSDP2, head unit, no reshard": {**FSDP2, "head_unit": True, "reshard": False},
    "FSDP2, bf16": {**FSDP2, **BF16},
    "FSDP2, head unit, bf16": {**FSDP2, "head_unit": True, **BF16},
    "ZeRO-2": {**ZERO, "sharding": "ZeRO-2"},
    "ZeRO-3": {**ZERO, "sharding": "ZeRO-3"},
    "ZeRO-3, LoRA": {**ZERO, "sharding": "ZeRO-3", "adapter": "LoRA"},
    "ZeRO-3, LoRA with head": {**ZERO, "sharding": "ZeRO-3", "adapter": "LoRA with head"},
}
# Those that `make test` runs too, with these objectives only.
QUICK = ("DDP", "FSDP2, head unit")
QUICK_OBJECTIVES = ("mix", "sequence", "rows", "weighted", "where", "examples", "worst", "global dice")
UNTRAINED = {1: ("none", "rank"), 2: ("none", "micro-batch", "rank"), 4: ("none",)}  # by accumulation


def untrained_rows(which, processes, accumulation):
    """Rows without labels: those of the first micro-batch, or those of the last process."""
    size = ROWS // (processes * accumulation)
    part = [number // size for number in range(ROWS)]  # accelerate deals micro-batches out in turn
    if which == "micro-batch":
        return [number for number in range(ROWS) if part[number] == 0]
    return [number for number in range(ROWS) if which == "rank" and part[number] % processes == processes - 1]


def make_cases(launch, objectives=EVERYTHING):
    processes, cases = LAUNCHES[launch]["processes"], []
    for name in objectives:
        if name in WITHOUT_ADAPTERS and LAUNCHES[launch]["adapter"] == "full":
            continue
        for accumulation in (1,) if name in OVER_RANKS else (1, 2, 4):
            for which in UNTRAINED[accumulation]:
                if processes == 1 and which == "rank":
                    continue  # nothing would be trained
                cases.append(
                    {
                        "name": name,
                        "cv_loss": {"terms": EVERYTHING[name], **MORE.get(name, {})},
                        "accumulation": accumulation,
                        "untrained": untrained_rows(which, processes, accumulation),
                        **LAUNCHES[launch],
                    }
                )
    return [{**case, "packed": packing} for case in cases for packing in (False, True)]


_references = {}


def big_batch(case, autocast=False):
    """Gradient and loss of all rows at once, from logits, by the naive losses and autograd."""
    key = case["name"], tuple(case["untrained"]), case["dtype"], case["adapter"], case["packed"], autocast
    if key not in _references:
        model = make_model(getattr(torch, case["dtype"]), adapter=case["adapter"])
        rows = make_rows(case["untrained"])
        inputs = padded(rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits
        documents = torch.arange(ROWS)[:, None].where(inputs["attention_mask"] == 1, -1)
        if case["packed"]:  # there is no mask, and padding is told by this: a run of positions without a label
            documents[case["untrained"]] = -1
        batch = Batch(logits, inputs["labels"], documents, {"input_ids": inputs["input_ids"]})
        terms = [{k: v for k, v in term.items() if k != "reduce"} for term in case["cv_loss"]["terms"]]
        for term in terms:
            if term["loss"] in ("ldam", "weighted_cross_entropy"):
                term["counts"] = count_labels(row["labels"] for row in rows).tolist()
            elif "where" in term:
                acts = [torch.tensor(row["acts"]) for row in rows]
                term["where"] = torch.nn.utils.rnn.pad_sequence(acts, batch_first=True)
            elif term["loss"].startswith("number"):
                term["numbers"] = {number: float(number) for number in range(10)}
            if term["loss"] == "number_token_gaussian":
                term["forms"] = dict.fromkeys(range(10), "")
        of_batch = weighted_loss if case["name"] == "weighted" else naive_loss
        if "examples" in case["cv_loss"]:
            of_batch = partial(of_examples, case["cv_loss"]["examples"])
        if case["name"] == "reference":
            columns = [torch.tensor(row["reference"], dtype=torch.float64) for row in rows]
            of_batch = partial(loss_beside, torch.nn.utils.rnn.pad_sequence(columns, batch_first=True))
        if case["name"] in WITHOUT_ADAPTERS:
            with torch.no_grad(), model.disable_adapter():
                base = model(**{name: inputs[name] for name in ("input_ids", "attention_mask")}).logits
            said = base[:, :-1].log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None]).squeeze(2)
            of_batch = partial(loss_beside, torch.nn.functional.pad(said, (1, 0)))
        loss = of_batch(batch, logits.to(torch.float64), terms)
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        _references[key] = grads, loss.item()
    return _references[key]


def of_examples(examples, batch, logits, terms):
    """Each document by what it counts, and its weight by its loss."""
    power, weights = {"examples": 1, "square_root": 0.5}[examples.get("normalize", "examples")], None
    if examples.keys() & {"reweight", "cvar"}:
        known = nlls(batch, logits)
        losses, sizes = (torch.tensor(x, dtype=torch.float64) for x in zip(*known.values(), strict=True))
        plain = {
            name: {"share": x} if name == "cvar" else {"r": 0.4, **x} for name, x in examples.items() if name[0] in "rc"
        }
        found = naive_weights(losses, sizes ** (1 - power), plain).tolist()
        weights = {**dict.fromkeys(range(ROWS), 1.0), **dict(zip(known, found, strict=True))}  # 1 without a label
    return naive_documents(batch, logits, terms, power, weights)


def weighted_loss(batch, logits, terms):
    """Each document's own loss, times its weight and its part of all trained tokens."""
    total, trained = 0.0, len(batch.rows())
    for number, row in enumerate(make_rows()):
        labels = batch.labels.where(batch.documents == number, -100)
        alone = replace(batch, labels=labels)
        total = total + row["importance"] * len(alone.rows()) / trained * naive_loss(alone, logits, terms)
    return total


def loss_beside(reference, batch, logits, terms):
    """importance_weighted and anchored, one document after the other; the reference says a number of each token."""
    weights, coefficient = [term.get("weight", 1.0) for term in terms], terms[1]["coefficient"]
    rows, total = batch.rows(), 0.0
    for number in sorted({document for _, _, document in rows}):
        both = zip(*((at, y) for at, y, document in rows if document == number), strict=True)
        places, targets = (torch.tensor(x) for x in both)
        logp = logits[tuple(places.T)].log_softmax(1)[range(len(targets)), targets]
        ratio = reference[places[:, 0], places[:, 1] + 1] - logp
        weighted = -min(16.0, float((-ratio.detach()).mean().exp())) * logp.sum()
        anchored = -logp.exp().detach() * logp + coefficient * (ratio.exp() - 1 - ratio)
        total = total + weights[0] * weighted + weights[1] * anchored.sum()
    return total / len(rows)


def distance(one, other):
    """Over all parameters, relative to the length of the other."""
    assert one.keys() == other.keys()
    square = sum(float((one[name] - other[name]).double().square().sum()) for name in other)
    return (square / sum(float(other[name].double().square().sum()) for name in other)) ** 0.5


@pytest.mark.hosts
@pytest.mark.parametrize("launch", QUICK)
def test_a_cut_of_the_matrix(launch, steps_of, record_property):
    check(launch, padded_or_packed(make_cases(launch, QUICK_OBJECTIVES)), steps_of, record_property)


def padded_or_packed(cases):
    """One of each two, in turn: every objective, and every way to accumulate, comes in both."""
    pairs = zip(cases[::2], cases[1::2], strict=True)
    return [pair[(n + QUICK_OBJECTIVES.index(pair[0]["name"])) % 2] for n, pair in enumerate(pairs)]


@pytest.mark.hosts
def test_the_model_without_its_adapters_is_the_reference(steps_of, record_property):
    launch = "FSDP2, LoRA with head"
    check(launch, make_cases(launch, WITHOUT_ADAPTERS)[::4], steps_of, record_property)


@pytest.mark.hosts
@pytest.mark.matrix
@pytest.mark.parametrize("launch", LAUNCHES)
def test_one_step_is_one_big_batch(launch, steps_of, record_property):
    check(launch, make_cases(launch), steps_of, record_property)


def check(launch, cases, steps_of, record_property):
    adapter = LAUNCHES[launch]["adapter"]
    for packing in ("padded", "packed"):
        way = {"sharding": launch.removesuffix(f", {adapter}"), "packing": packing, "adapter": adapter}
        record_property("setup", {"host": "transformers Trainer", **way})
    processes, bf16 = LAUNCHES[launch]["processes"], LAUNCHES[launch]["bf16"]
    wrong = []
    for case, found in zip(cases, steps_of(cases, processes), strict=True):
        gradient, loss = big_batch(case)
        error, tolerance = distance(found["gradient"], gradient), 1e-5 if case["dtype"] == "float64" else 1e-4
        if bf16:  # near what autocast does to the whole batch; FSDP also adds up gradients in bfloat16
            # Where two errors are almost equal, rounding changes their order, and with it Lovász's gradient by a jump.
            factor = 6 if "lovasz" in case["name"] else 3
            tolerance = factor * distance(big_batch(case, autocast=True)[0], gradient)
        if not error <= tolerance:
            wrong.append(f"gradient off by {error:.1e}, allowed {tolerance:.1e}: {json.dumps(case)}")
        if found["loss"] != pytest.approx(loss, rel=0.03 if bf16 else 1e-5, abs=1e-6):
            wrong.append(f"loss {found['loss']} for {loss}: {json.dumps(case)}")
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong[:12])


def test_the_rows_tell_something():
    """Unequal counts of tokens, and a gradient that is not near zero, or equal gradients would prove little."""
    counts = [int((row["labels"][1:] != -100).sum()) for row in make_rows()]
    assert len(set(counts)) > 3
    case = make_cases("DDP")[0]
    gradient, _ = big_batch(case)
    assert sum(float(grad.square().sum()) for grad in gradient.values()) > 1e-2
