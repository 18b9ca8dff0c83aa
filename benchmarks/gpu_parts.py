"""What gpu.py measures: each part is a function that yields lines, and a call of it a job, in a process of its own."""

import itertools
import os
import statistics
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from cases import trained_data

from axolotl_cvloss import Objective, install
from axolotl_cvloss.engine.sources import LinearSource
from axolotl_cvloss.engine.views import ENVIRONMENT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DOCUMENT = 512  # rows; a set of the terms on sets
HEADS = {"llama": (4096, 128256), "qwen": (1024, 151936), "smoke": (16, 301)}  # H, V of Llama-3-8B and of Qwen3-0.6B
MIXES = {
    "token": {"focal": 1.0},
    "region": {"cross_entropy": 0.5, "generalized_dice": 0.5},
    "lovasz": {"cross_entropy": 0.6, "lovasz": 0.4},
}
FAMILIES = MIXES | {
    "smoothed": {"cross_entropy": {"weight": 1.0, "label_smoothing": 0.1}},
    "document": {"focal_tversky": 0.5, "topk_cross_entropy": 0.5},
    "gem": {"gem": 1.0},
}
LLAMA_1B = {  # of the shape of Llama-3.2-1B
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
MODELS = {
    "1b": LLAMA_1B,
    "3b": LLAMA_1B | {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128},
    "smoke": {
        "vocab_size": 301,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
}
FULL, PRODUCTS = "full-logits cross_entropy", "products alone"
PYTORCH = "ours, PyTorch path"
WRONG = "WRONG"


@dataclass
class Size:
    """rows: of a head. rounds: measured, after two to warm up. batch, length: of a training step."""

    rows: int = 8192
    rounds: int = 15
    batch: int = 4
    length: int = 2048


def made(head, rows, trained=True, dtype=torch.bfloat16):
    """Hidden states, weight, labels and positions as of a trained model; some thousand labels of unequal frequency."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    width, vocab = HEADS[head]
    pool = torch.randperm(vocab, generator=generator, device=DEVICE)[:3000]
    frequency = 1 / torch.arange(1, len(pool) + 1, device=DEVICE)
    labels = pool[torch.multinomial(frequency, rows, replacement=True, generator=generator)]
    hidden, weight = trained_data(rows, width, vocab, labels, generator)
    positions = torch.arange(rows, device=DEVICE) % DOCUMENT
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(trained), labels, positions


@contextmanager
def wish(value):
    """With another choice of the path."""
    before = os.environ.get(ENVIRONMENT)
    os.environ[ENVIRONMENT] = value
    try:
        yield
    finally:
        os.environ.pop(ENVIRONMENT) if before is None else os.environ.update({ENVIRONMENT: before})


@contextmanager
def at_once(rows):
    """With at most so many rows in a chunk, where the kernels serve it."""
    before = LinearSource.at_once
    LinearSource.at_once = lambda self: (rows, 1)
    try:
        yield
    finally:
        LinearSource.at_once = before


def ours(mix):
    objective = Objective.from_config(FAMILIES[mix])

    def loss(hidden, weight, labels, positions):
        return objective.from_hidden(hidden, weight, labels, shift=False, position_ids=positions).loss

    return loss


def off(function):
    def loss(*given):
        with wish("off"):
            return function(*given)

    return loss


def full(hidden, weight, labels, _):
    return F.cross_entropy((hidden @ weight.T).float(), labels)


@torch.no_grad()
def products(hidden, weight, labels, _):
    """The matrix products of the head and nothing else, with their rounding: the floor."""
    logits = hidden @ weight.T
    return logits @ weight, (logits.T @ hidden if weight.requires_grad else None)


def torch_plain():
    return lambda hidden, weight, labels, _: F.linear_cross_entropy(hidden, weight, labels)


def torch_chunked():
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, labels, _: F.linear_cross_entropy(hidden, weight, labels, options=options)


def liger(**more):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda hidden, weight, labels, _: liger_fused_linear_cross_entropy(hidden, weight, labels, **more)


def cut():
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, labels, _: linear_cross_entropy(hidden, weight, labels)


def trl():
    from trl.trainer.sft_trainer import _CHUNKED_LM_HEAD_CHUNK_SIZE, _chunked_cross_entropy_loss

    size = _CHUNKED_LM_HEAD_CHUNK_SIZE
    return lambda h, w, labels, _: _chunked_cross_entropy_loss(h, w, size, shift_labels=labels)[0]


# Other ways to a cross-entropy of hidden states and a head: by name the package it takes, and what gives the function.
PEERS = {
    FULL: ("torch", lambda: full),
    PRODUCTS: ("torch", lambda: products),
    "Liger": ("liger_kernel", liger),
    "Liger, larger chunks": ("liger_kernel", partial(liger, chunk_mem_const=8)),  # of its newer versions
    "F.linear_cross_entropy": ("torch", torch_plain),
    "F.linear_cross_entropy, chunked": ("torch", torch_chunked),
    "cut_cross_entropy": ("cut_cross_entropy", cut),
    "TRL, chunked": ("trl", trl),
}


def ways(mix):
    """The names of ours, and of peers that are installed: all beside losses of tokens, else those most people have."""
    installed = [name for name, (package, _) in PEERS.items() if find_spec(package)]
    return ["ours", PYTORCH, *(name for name in installed if mix == "token" or name in (FULL, PRODUCTS, "Liger"))]


def way_of(name, mix):
    """A function of hidden states, weight, labels and positions; or one that raises what is wrong with a peer."""
    if name in ("ours", PYTORCH):
        return ours(mix) if name == "ours" else off(ours(mix))
    try:
        return PEERS[name][1]()
    except (ImportError, AttributeError) as error:
        return partial(_raise, error)


def _raise(error, *_):
    raise error


def backward(function, given):
    for leaf in given[:2]:
        leaf.grad = None
    value = function(*given)
    if isinstance(value, torch.Tensor):
        value.backward()


def milliseconds(work):
    """Of one call, by the device's own clock."""
    if DEVICE == "cpu":
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak(work):
    """MiB that a call takes at most above what there was."""
    if DEVICE == "cpu":
        work()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def spread(found):
    """Median and quartiles."""
    low, _, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
    return {"ms": round(statistics.median(found), 3), "low": round(low, 3), "high": round(high, 3)}


def interleaved(works, rounds):
    """Lines of named pieces of work that take turns; each round begins with another. A peer that fails says why."""
    found, failed, names = {name: [] for name in works}, {}, list(works)
    for turn in range(rounds + 2):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name in failed:
                continue
            try:
                took = milliseconds(works[name])
            except Exception as error:
                if name.startswith("ours"):
                    raise
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                continue
            if turn >= 2:
                found[name].append(took)
    for name in works:
        yield {"way": name, "note": failed[name]} if name in failed else {"way": name, **spread(found[name])}


# The parts


def check(size, head, dtype, trained):
    """The error of ours against float64, in that of the same objective on full logits by autograd's own products."""
    given = made(head, min(size.rows, 1024), trained, getattr(torch, dtype))
    leaves = [leaf for leaf in given[:2] if leaf.requires_grad]
    exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in given[:2]]
    chunks = {"ours": None, "ours, in chunks": max(1, len(given[2]) // 4)}
    for mix, (way, rows) in itertools.product(MIXES, chunks.items()):
        loss, objective = ours(mix), Objective.from_config(MIXES[mix])
        right = loss(*exact, *given[2:])
        right_gradients = torch.autograd.grad(right, [leaf for leaf in exact if leaf.requires_grad])
        logits = given[0] @ given[1].T
        plain = objective.from_logits(logits, given[2], shift=False, position_ids=given[3]).loss
        lost = [_error(*pair) for pair in zip(torch.autograd.grad(plain, leaves), right_gradients, strict=True)]
        with at_once(rows) if rows else nullcontext():
            found = loss(*given)
        errors = [_error(*pair) for pair in zip(torch.autograd.grad(found, leaves), right_gradients, strict=True)]
        eps = torch.finfo(given[0].dtype).eps
        ratio = max(error / (other + eps / 8) for error, other in zip(errors, lost, strict=True))
        far = abs(float(found.detach()) - float(right.detach())) / (1 + abs(float(right.detach())))
        line = {"mix": mix, "way": way, "figure": round(ratio, 3), "unit": "error / that of full logits"}
        yield line | {
            "note": "" if ratio <= 3 and far <= 4 * eps else f"{WRONG}: errors {errors}, {lost}, value {far:.1e}"
        }


def _error(gradient, exact):
    return float((gradient.double() - exact).norm() / exact.norm())


def kernels(size, head):
    """The two kernels alone, over entries of a row at a time and warps."""
    from axolotl_cvloss.engine import kernels as engine

    _, vocab = HEADS[head]
    width = -(-vocab // 64) * 64
    buffer = torch.randn(size.rows, width, device=DEVICE).to(torch.bfloat16)
    raw, labels = buffer[:, :vocab], torch.randint(0, vocab, (size.rows,), device=DEVICE)
    zeros = torch.zeros(size.rows, device=DEVICE)
    sweep = list(itertools.product((1024, 2048, 4096, 8192, 16384), (4, 8, 16)))
    for engine.BLOCK, engine.WARPS in sweep[:2] if DEVICE == "cpu" else sweep:
        for name, passes in (("collect", 1), ("pull", 2)):

            def work(name=name):
                if name == "collect":
                    return engine.collect(raw, labels, width=width)
                # Slope and own are 0, so that what comes out is as good to read at the next call.
                return engine.pull_(raw, labels, zeros, zeros, zeros, zeros, width=width)

            work()
            found = spread([milliseconds(work) for _ in range(size.rounds)])
            rate = passes * 2 * size.rows * vocab / found["ms"] / 1e6
            way = f"{name}, {engine.BLOCK} entries, {engine.WARPS} warps"
            yield {"way": way, **found, "figure": round(rate, 1), "unit": "GB/s"}


def cases(size, head, mix, trained):
    """Forward and backward of a head."""
    given = made(head, size.rows, trained)
    works = {name: partial(backward, way_of(name, mix), given) for name in ways(mix)}
    yield from interleaved(works, size.rounds)


def memory(size, head, mix, trained, way):
    """Peak memory of one way above its inputs, after a call that warms it up; gradients count."""
    given, function = made(head, size.rows, trained), way_of(way, mix)
    try:
        backward(function, given)
        for leaf in given[:2]:
            leaf.grad = None
        yield {"way": way, "peak_mib": peak(lambda: backward(function, given))}
    except Exception as error:
        if way.startswith("ours"):
            raise
        yield {"way": way, "note": f"{type(error).__name__}: {error}".splitlines()[0]}


def chunks(size, head, mix, trained):
    """One chunk against several."""
    given, loss = made(head, size.rows, trained), ours(mix)

    def by(rows):
        def work():
            with at_once(rows):
                backward(loss, given)

        return work

    works = {f"ours, {rows} rows at a time": by(rows) for rows in (size.rows >> i for i in range(5)) if rows}
    peaks = {}
    for name, work in works.items():
        work()
        peaks[name] = peak(work)
    for line in interleaved(works, size.rounds):
        yield line | {"peak_mib": peaks[line["way"]]}


def waits(size, head):
    """Where the host waits for the GPU in a forward and backward pass, as PyTorch warns of it."""
    for mix, trained in itertools.product(FAMILIES, (True, False)):
        given, loss = made(head, min(size.rows, 2048), trained), ours(mix)
        backward(loss, given)
        found = []
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                backward(loss, given)
            torch.cuda.set_sync_debug_mode("default")
            found = [w for w in said if "synchroniz" in str(w.message)]
        places = "; ".join(f"{w.filename.rsplit('axolotl_cvloss/')[-1]}:{w.lineno}" for w in found)
        yield {"mix": mix, "trained": trained, "way": "ours", "figure": len(found), "unit": "waits", "note": places}


STEPS = ("host", "Liger", "TRL, chunked", *(f"ours, {mix}" for mix in MIXES))


def step(size, model, method, way):
    """A training step of a Llama with random weights: forward, backward, AdamW. Only the loss is Liger's or TRL's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(DEVICE):
        net = LlamaForCausalLM(LlamaConfig(**MODELS[model], use_cache=False)).to(torch.bfloat16).train()
    how = method
    if method == "LoRA":
        net, how = _adapted(net)
    try:
        _with_loss(net, way)
    except Exception as error:  # not installed, or not for this transformers
        yield {"way": way, "mix": how, "note": f"{type(error).__name__}: {error}".splitlines()[0]}
        return
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=DEVICE == "cuda")
    generator = torch.Generator().manual_seed(0)
    vocab = MODELS[model]["vocab_size"]
    ids = torch.randint(0, vocab, (size.batch, size.length), generator=generator).to(DEVICE)

    def work():
        net(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        work()
    most = peak(work)
    found = spread([milliseconds(work) for _ in range(size.rounds)])
    rate = round(1e3 * ids.numel() / found["ms"])
    yield {"way": way, "mix": how, **found, "peak_mib": most, "figure": rate, "unit": "tokens/s"}


def _adapted(net):
    """With LoRA where peft is installed; else with a frozen head, which is what matters here."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        net.get_output_embeddings().weight.requires_grad_(False)  # the tied embedding too
        return net, "frozen head"
    return get_peft_model(net, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")), "LoRA"


def _with_loss(net, way):
    base = net.get_base_model() if hasattr(net, "get_base_model") else net
    if way == "Liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(
            rope=False, rms_norm=False, swiglu=False, cross_entropy=False, fused_linear_cross_entropy=True, model=base
        )
    elif way == "TRL, chunked":
        from trl.trainer.sft_trainer import _CHUNKED_LM_HEAD_CHUNK_SIZE, _patch_chunked_ce_lm_head

        _patch_chunked_ce_lm_head(base, chunk_size=_CHUNKED_LM_HEAD_CHUNK_SIZE)
    elif way != "host":
        install(net, Objective.from_config(MIXES[way.removeprefix("ours, ")]))


PARTS = {function.__name__: function for function in (check, kernels, cases, memory, chunks, waits, step)}


def jobs(smoke, model):
    """All there is to do, as (part, arguments); what matters most comes first."""
    heads = ["smoke"] if smoke else ["llama", "qwen"]
    for head, dtype, trained in itertools.product(heads[-1:], ("bfloat16", "float32"), (True, False)):
        yield "check", [head, dtype, trained]
    mixes = [(head, mix, trained) for trained in (True, False) for mix in MIXES for head in heads]
    mixes = mixes[:1] if smoke else mixes
    yield from (("cases", list(case)) for case in mixes)
    yield "waits", heads[-1:]
    for head, mix, trained in mixes:
        for way in ways(mix):
            # That of others does not depend on our mix.
            if way.startswith("ours") or mix == "token":
                yield "memory", [head, mix, trained, way]
    for head in heads:
        yield "kernels", [head]
        yield from (("chunks", [head, mix, True]) for mix in ("token", "lovasz"))
    for method, way in itertools.product(("full", "LoRA"), STEPS):
        yield "step", [model, method, way]
