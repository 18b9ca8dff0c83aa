"""Keys of Axolotl's YAML beside ``cv_loss``: what is switched off, what is refused, and dotted keys.

Imports no host, so that anybody can check a config.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from itertools import zip_longest
from typing import Any

import yaml

from ..losses.registry import available_losses
from ..objective.config import ADAPTER_OFF, KEY, CVLossConfig
from . import prune_keys

ValueOf = Callable[[str], Any]

# Ways to compute cross-entropy without its logits. They say nothing of the objective, so they are switched off.
SAVERS = (
    "cut_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "liger_cross_entropy",
    "chunked_cross_entropy",
    "flash_attn_cross_entropy",
)
# Plugins that act as soon as they are listed, and the key that is then as good as set.
LISTED = {"CutCrossEntropyPlugin": "cut_cross_entropy", "DiffusionPlugin": "diffusion", "HatcheryPlugin": "hatchery"}
# Keys that bring another loss, and what to do instead.
CONFLICTS = {
    "liger_use_token_scaling": "it brings another loss; remove it and name dft, which is this loss, in cv_loss",
    "kd_trainer": "distillation brings its own loss; train with one or the other",
    "diffusion": "diffusion training brings its own loss; remove its plugin or train without cv_loss",
    "hatchery": "it trains on a remote machine that knows nothing of cv_loss; remove its plugin",
    "rl": "preference and reinforcement learning bring their own losses; use cv_loss for supervised fine-tuning",
    "reward_model": "a reward model has no tokens to predict; use cv_loss for supervised fine-tuning",
    "process_reward_model": "a reward model has no tokens to predict; use cv_loss for supervised fine-tuning",
    "orpo_alpha": "ORPO brings its own loss; remove it",
}
# Degrees above 1 of these are refused.
PARALLEL = {
    "context_parallel_size": "it splits a sequence over GPUs, which cv_loss cannot follow yet; use FSDP instead",
    "sequence_parallel_degree": "it splits a sequence over GPUs, which cv_loss cannot follow yet; use FSDP instead",
    "tensor_parallel_size": "it splits the vocabulary over GPUs, which cv_loss cannot follow yet; use FSDP instead",
}
MAMBA = "Axolotl's trainer for Mamba computes a loss of its own; Mamba 2 and Falcon Mamba have the usual trainer"


def conflicts(value_of: ValueOf) -> list[str]:
    """What is wrong with a config that has ``cv_loss``, one line a key; ``value_of`` gives the value of a key."""
    found = [f"{key}: {why}" for key, why in CONFLICTS.items() if _or_listed(value_of, key)]
    found += [f"{key} above 1: {why}" for key, why in PARALLEL.items() if str(value_of(key) or 1) != "1"]
    if value_of("use_eaft"):
        found.append(f"use_eaft: it brings another loss; {_instead_of_eaft(value_of)}")
    model = str(value_of("type_of_model") or value_of("model_type") or "")
    if re.search("Classification|QuestionAnswering", model):
        found.append(f"model_type {model}: it has no tokens to predict; use cv_loss for supervised fine-tuning")
    if model == "MambaLMHeadModel":
        found.append(f"model_type {model}: {MAMBA}")
    trainer = str(value_of("trainer_cls") or "")
    if trainer.startswith(("axolotl.", "trl.")) and not trainer.endswith(".AxolotlTrainer"):
        found.append(f"trainer_cls {trainer}: it computes a loss of its own; remove it")
    return [f"{KEY} cannot be used with {problem}" for problem in found]


def conflicts_of(config: CVLossConfig, value_of: ValueOf) -> list[str]:
    """The same for what the key itself says."""
    pruned = prune_conflicts(value_of) if config.prune else []
    without = config.without_reference() + no_adapter(config, value_of)
    return [*pruned, *without, *lost_columns(value_of, config.columns)]


def prune_conflicts(value_of: ValueOf) -> list[str]:
    """The same for one that has ``prune``."""
    streams = ("pretraining_dataset", "streaming")
    return prune_keys.conflicts(
        packed="sample_packing" if value_of("sample_packing") else None,
        streamed=next((key for key in streams if value_of(key)), None),
        epochs=None if value_of("max_steps") else ("num_epochs", value_of("num_epochs") or 1),
    )


def no_adapter(config: CVLossConfig, value_of: ValueOf) -> list[str]:
    """What is wrong where the reference is to be the model without its adapters."""
    if not config.adapter_off or value_of("adapter"):
        return []
    return [f"{KEY}.reference: {ADAPTER_OFF} needs an adapter; write adapter: lora, or leave it out"]


def lost_columns(value_of: ValueOf, columns: Mapping[str, str]) -> list[str]:
    """What is wrong where the key names columns of the dataset, and Axolotl drops them."""
    streamed = "pretraining_dataset" if value_of("pretraining_dataset") else "streaming with sample_packing"
    packed = value_of("streaming") and value_of("sample_packing")
    return [
        f"{key} cannot be used with {streamed}: it drops the columns of the dataset; use datasets without streaming"
        for key in columns.values()
        if value_of("pretraining_dataset") or packed
    ]


def savers(value_of: ValueOf) -> dict[str, str]:
    """The keys to switch off, and a sentence about each."""
    if value_of("liger_use_token_scaling"):  # refused, and Liger wants its fused cross-entropy beside it
        return {}
    return {
        key: f"{KEY} computes its loss itself, without keeping logits where the losses allow it, so {key} is "
        "switched off"
        for key in SAVERS
        if _or_listed(value_of, key)
    }


def _or_listed(value_of: ValueOf, key: str) -> Any:
    """The value of a key, or True where a plugin that sets it is listed."""
    if (value := value_of(key)) is not None:
        return value
    given = value_of("plugins")
    names = given if isinstance(given, list) else ()
    return any(LISTED.get(str(name).rsplit(".", 1)[-1]) == key for name in names)


def _instead_of_eaft(value_of: ValueOf) -> str:
    """Axolotl weights tokens by H^alpha, ours by (H / log k)^alpha."""
    given = {name: value_of(f"eaft_{name}") for name in ("alpha", "k")}
    alpha, k = (float(default if given[name] is None else given[name]) for name, default in (("alpha", 1), ("k", 20)))
    weight = math.log(max(k, 2)) ** alpha
    return (
        f"remove it and write {KEY}: {{entropy_adaptive: {{weight: {weight:.4g}, alpha: {alpha:g}, k: {k:g}}}}}. "
        "This weight, (log k)^alpha, gives the same gradient, as Axolotl does not divide the entropy by log k; with "
        f"weight 1 it is {weight:.3g} times smaller"
    )


def misspelt(keys: Iterable[Any], known: Iterable[str] = ()) -> str | None:
    """What is wrong where one of the keys is nearly ``cv_loss``; None where none is.

    Axolotl drops keys that it does not know, so such a one would change nothing.
    """
    unknown = {_head(str(key)).lower(): key for key in keys if key != KEY and key not in known}
    for match in difflib.get_close_matches(KEY, unknown, n=1, cutoff=0.8):
        return f"unknown key {unknown[match]}: did you mean {KEY}{str(unknown[match])[len(match) :]}?"
    return None


# Dotted keys


def spell_out(data: MutableMapping[str, Any]) -> None:
    """Put keys such as ``cv_loss.focal.gamma`` and ``cv_loss__focal``, as sweeps and the command line give them, in
    their place under ``cv_loss``.

    Raises:
        ValueError: There is no such place.
    """
    if isinstance(inner := data.get(KEY), Mapping):  # Axolotl itself takes cv_loss__focal__gamma apart once
        for key in [key for key in inner if _is_dotted(key)]:
            data[f"{KEY}.{key}"] = inner[key]
            data[KEY] = {name: value for name, value in data[KEY].items() if name != key}
    for key in [key for key in data if _is_dotted(key) and _head(key) == KEY]:
        _, *path = SEPARATOR.split(key)
        data[KEY] = _put(data.get(KEY), path, data.pop(key), key)


SEPARATOR = re.compile(r"\.|__")


def _head(key: str) -> str:
    return SEPARATOR.split(key)[0]


def sets_key(name: str) -> bool:
    """Whether it is the key ``cv_loss``, or sets a part of it."""
    return _head(name) == KEY


def _is_dotted(key: Any) -> bool:
    return isinstance(key, str) and _head(key) != key and key not in available_losses()


def _put(node: Any, path: Sequence[str], value: Any, key: str) -> Any:
    """A copy of a part of the config with a value at a path below it."""
    if not path:
        # A number beside the fields of a loss is its weight.
        keeps = isinstance(node, Mapping) and "from" not in node and isinstance(value, int | float)
        return {**node, "weight": value} if keeps else value
    name, *rest = path
    if isinstance(node, list):
        if not (name.isdigit() and int(name) < len(node)):
            raise ValueError(f"{key}: there is no term {name}; allowed: 0 to {len(node) - 1}")
        terms = [{"loss": term} if isinstance(term, str) else term for term in node]
        return [_put(term, rest, value, key) if i == int(name) else term for i, term in enumerate(terms)]
    if not isinstance(node, Mapping):  # the short forms: a name, or a weight
        node = {node: 1.0} if isinstance(node, str) else {} if node is None else {"weight": node}
    return {**node, name: _put(node.get(name), rest, value, key)}


def on_command_line(arguments: Sequence[str]) -> dict[str, Any]:
    """The options ``--cv-loss``, ``--cv-loss.focal`` and the like: `axolotl train --launcher python` ignores them.

    Raises:
        ValueError: One of them has no value, or none that YAML can read.
    """
    found = {}
    for argument, after in zip_longest(arguments, arguments[1:]):
        option, sign, value = argument.partition("=")
        name = option.lstrip("-").replace("-", "_")
        if not option.startswith("--") or (_head(name) != KEY and not misspelt([name])):
            continue
        if not sign and (after is None or after.startswith("--")):
            raise ValueError(f"{option}: has no value; write {option}=...")
        try:
            found[name] = yaml.safe_load(value if sign else after)
        except yaml.YAMLError as error:
            raise ValueError(f"{option}: {value if sign else after} cannot be read: {error}") from error
    return found
