"""What a YAML means and what is wrong with it, before any model is loaded."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel

from ..hosts import axolotl_keys, axolotl_prompts, trl_keys
from ..hosts.short_answers import measures_overlap, told
from ..losses.registry import Loss, available_losses
from ..objective.config import (
    ADAPTER_OFF,
    KEY,
    NEEDS_LOGITS,
    ConfigError,
    CVaRConfig,
    CVLossConfig,
    ExamplesConfig,
    ReweightConfig,
    Schedule,
    TermConfig,
    allowed,
)
from .curves import GRID, NotACurve, curve
from .descriptions import plain

# The host of a YAML is told by keys that only it has.
HOSTS = {
    "axolotl": ("base_model", "plugins", "micro_batch_size", "sequence_len"),
    "trl": ("model_name_or_path", "dataset_name", "per_device_train_batch_size"),
}
PLUGIN = "axolotl_cvloss.CVLossPlugin"

COUNTS_BY = {  # what a document does, by ``examples.normalize``
    "tokens": "the number of its rows",
    "examples": "1",
    "square_root": "the square root of the number of its rows",
}
REFERENCES = "reference_logps"  # the column that cvloss reference makes, and the key that names it
ENDS = (0.0, 1.0)  # of training, for what follows a schedule
ROWS = {"completion": "labelled tokens", "sequence": "every token but padding, the prompt too"}
SETS = {
    ("document", "local"): "a document",
    ("batch", "local"): "a micro-batch of one process",
    ("batch", "global"): "the micro-batches of all processes together",
}


@dataclass
class Report:
    """``host`` is None where the YAML could be for any; ``config`` is None where the key is wrong.

    Notes say what the host will do that the YAML does not. Of a sweep file there is a report for each value of the
    key, by a name, and ``runs`` counts what Axolotl makes of it.
    """

    host: str | None = None
    config: CVLossConfig | None = None
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    runs: int | None = None
    values: dict[str, "Report"] = field(default_factory=dict)


def check_file(path: Path, host: str | None = None) -> Report:
    """Check a YAML file for a host, or for the one that its keys tell of."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        return Report(host, errors=[f"{path} cannot be read: {error}"])
    if not isinstance(data, Mapping):
        return Report(host, errors=[f"{path} is not a mapping of keys to values"])
    return check(data, host)


def check(data: Mapping[Any, Any], host: str | None = None) -> Report:
    """Check the keys of a config, or of a sweep file."""
    if host != "trl" and _is_sweep(data):
        return _sweep(data)
    report = Report(host or next((name for name, keys in HOSTS.items() if any(key in data for key in keys)), None))
    if report.host != "trl":  # to TRL the dotted keys are unknown
        data = dict(data)
        try:
            axolotl_keys.spell_out(data)
        except ValueError as error:
            report.errors.append(str(error))
    if KEY not in data:
        missing = f"{KEY}: the key is not in the config, so training uses the host's own loss"
        report.errors.append(axolotl_keys.misspelt(data) or missing)
        return report
    try:
        report.config = CVLossConfig.parse(data[KEY])
    except ConfigError as error:
        report.errors += str(error).splitlines()
    if report.host == "axolotl":
        _axolotl(data, report)
    elif report.host == "trl":
        if theirs := [key for key in HOSTS["axolotl"] if key in data]:
            report.errors.append(f"{' and '.join(theirs)} are keys of Axolotl, which TRL does not know; see --host")
        report.errors += trl_keys.conflicts(data.get)
        report.notes += trl_keys.savers(data.get).values()
        if report.config is not None:
            report.errors += trl_keys.conflicts_of(report.config, data.get)
            report.errors += trl_keys.no_adapter(report.config, data.get("use_peft"))
    if report.config is not None:
        report.notes += [
            f"{key}: the dataset must have the column {name}, or messages with such a field"
            for name, key in report.config.columns.items()
        ]
        report.warnings += traps(report.config)
        report.warnings += _small_sets(report.config, data)
        report.warnings += _short_answers(report.config, data)
    return report


def with_references(key: Any) -> Any:
    """The value of the key with the column that ``cvloss reference`` makes."""
    key = {key: 1.0} if isinstance(key, str) else key
    if not isinstance(key, Mapping):
        return key
    rest = {name: value for name, value in key.items() if (name, value) != ("reference", ADAPTER_OFF)}
    return {**rest, REFERENCES: REFERENCES}


# Sweep files: each key has the list of its values, and the key _ a list of mappings of what goes together.


def _is_sweep(data: Mapping[Any, Any]) -> bool:
    lists = {str(key): values for key, values in data.items() if isinstance(values, list)}
    pairs = [pair for pair in lists.get("_", ()) if isinstance(pair, Mapping)]
    swept = [key for keys in (lists, *pairs) for key in keys if axolotl_keys.sets_key(str(key))]
    of_a_config = [key for key in (*HOSTS["axolotl"], *HOSTS["trl"]) if key in data and key not in lists]
    return bool(swept) and "plugins" not in data and not of_a_config


def _sweep(data: Mapping[Any, Any]) -> Report:
    """Every value is checked on its own, as the config that they are swept over is not known here."""
    report = Report("axolotl", runs=1)
    for key, values in data.items():
        if not isinstance(values, list):
            report.errors.append(f"{key}: must be a list of values, as in a sweep every key has one, not {values!r}")
            continue
        report.runs *= len(values)  # type: ignore[operator]
        for value in values:
            pair = value if key == "_" else {key: value}
            if not isinstance(pair, Mapping):
                report.errors.append(f"_: must be a list of mappings, not {value!r}")
                continue
            for name, one in pair.items():
                if axolotl_keys.sets_key(str(name)):
                    _swept(str(name), one, report)
    report.errors += filter(None, [axolotl_keys.misspelt(key for key in data if not axolotl_keys.sets_key(str(key)))])
    if not report.runs:
        report.errors.append("a list without values makes no run")
    return report


def _swept(name: str, value: Any, report: Report) -> None:
    found, title = Report(), f"{name}: {json.dumps(value, default=str)}"
    if name == KEY:
        found = check({name: value})
    elif axolotl_keys.SEPARATOR.split(name)[1] in available_losses():  # of a mix, of which this is a part
        whole = check({name: value})
        found = Report(config=whole.config, errors=whole.errors)
    else:
        found.notes.append(f"{name}: what it means depends on {KEY} of the config, so it is not checked")
    report.values[title] = found
    report.errors += [error for error in found.errors if error not in report.errors]
    report.warnings += [warning for warning in found.warnings if warning not in report.warnings]
    report.notes += [note for note in found.notes if note not in report.notes]


def _axolotl(data: Mapping[Any, Any], report: Report) -> None:
    report.errors += filter(None, [axolotl_keys.misspelt(data)])
    report.notes += axolotl_keys.savers(data.get).values()
    report.errors += axolotl_keys.conflicts(data.get)
    if report.config is not None:
        report.errors += axolotl_keys.conflicts_of(report.config, data.get)
    if _model_type(data.get("base_model")) == "mamba" and data.get("model_type") != "MambaLMHeadModel":
        report.errors.append(f"{KEY} cannot be used with {data['base_model']}: {axolotl_keys.MAMBA}")
    if (trainer := str(data.get("trainer_cls") or "")) and not trainer.startswith(("axolotl.", "trl.")):
        report.warnings.append(
            f"trainer_cls: {trainer} is not known here; where it computes a loss of its own, training stops"
        )
    given = data.get("plugins") or []
    if isinstance(given, str):
        report.errors.append(f"plugins: must be a list, such as [{given}], not the text {given}")
        return
    plugins = [str(name) for name in given] if isinstance(given, list) else []
    if not any(name.startswith("axolotl_cvloss.") and name.endswith(".CVLossPlugin") for name in plugins):
        close = difflib.get_close_matches(PLUGIN, plugins, n=1)
        instead = f"instead of {close[0]}" if close else "there"
        report.errors.append(f"plugins: {KEY} does nothing without its plugin; put {PLUGIN} {instead}")


def _model_type(base_model: Any) -> str | None:
    """What the config of a model says that it is, where the model is on this machine."""
    from huggingface_hub import try_to_load_from_cache

    try:
        path = Path(base_model, "config.json")
        path = path if path.is_file() else Path(try_to_load_from_cache(base_model, path.name))  # type: ignore[arg-type]
        return json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, TypeError, KeyError):  # TypeError: it is not in the cache
        return None


def _small_sets(config: CVLossConfig, data: Mapping[Any, Any]) -> list[str]:
    sizes = [data.get(name) for name in ("micro_batch_size", "per_device_train_batch_size")]
    sets = [t.loss for t in config.terms if available_losses()[t.loss].per_set and t.per == "batch"]
    found = [f"{KEY}.{loss}.per: batch is the micro-batch, and that is of one example" for loss in sets]
    packed = data.get("sample_packing") or data.get("packing")
    if config.examples is not None and config.examples.look == "batch" and not packed:
        found.append(f"{KEY}.examples.look: batch is the micro-batch, and that is of one example, so it weighs 1")
    return found if 1 in sizes else []


def _short_answers(config: CVLossConfig, data: Mapping[Any, Any]) -> list[str]:
    """Of dataset types that are known to have them; of others nothing is known before they are read."""
    given = data.get("datasets")
    datasets = given if isinstance(given, list) else []
    types = [dataset.get("type") if isinstance(dataset, Mapping) else None for dataset in datasets]
    letters = {f"{axolotl_prompts.__name__}.{name}" for name in axolotl_prompts.LETTERS}
    if (
        not types
        or config.papers_code
        or data.get("train_on_inputs")
        or not all(isinstance(t, str) and t in letters for t in types)
    ):
        return []
    losses = available_losses()
    terms = [t for t in config.terms if t.scope == "completion" and measures_overlap(losses[t.loss], t.per)]
    return [told([t.loss for t in terms], "the answers of this dataset are")] if terms else []


def traps(config: CVLossConfig) -> list[str]:
    """What is allowed and often not meant."""
    losses = available_losses()
    found = []
    trained = [term for term in config.terms if term.weight or "weight" in term.schedules]
    found += [
        f"{KEY}.{term.loss}: its weight is 0, so it is computed and logged, and changes nothing"
        for term in config.terms
        if term not in trained
    ]
    used = {term.loss for term in trained}
    if config.papers_code and "generalized_dice" in used:
        found.append(
            f"{KEY}: the paper's generalized_dice stays below 1e-20 with its own gradient, so it changes nothing; "
            "without reference: true it does"
        )
    if "focal" in used and (others := sorted(used & {"dft", "encouraging"})):
        found.append(
            f"{KEY}: focal gives weight to tokens that the model gets wrong, {' and '.join(others)} to those that it "
            "gets right; together they undo each other"
        )
    if (config.adapter_off or config.reference_logps is not None) and not config.with_reference:
        what = "reference: adapter_off" if config.adapter_off else f"reference_logps: {config.reference_logps}"
        found.append(f"{KEY}: {what} changes nothing, as no term looks at a reference model")
    names = " and ".join(dict.fromkeys(term.loss for term in trained))
    silent = {losses[term.loss].kind.silent_on for term in trained}
    if len(silent) == 1 and (tokens := silent.pop()):
        found.append(f"{KEY}: {names} says nothing of {tokens}, so nothing trains those; mix it with cross_entropy")
    elif all(losses[term.loss].kind.silent_on or _flat(losses[term.loss]) for term in trained):
        found.append(
            f"{KEY}: {names} without a loss of single tokens learns slowly: where the model gives a token little "
            "probability, its gradient is small too. The paper mixes 0.4 of such a loss with 0.6 of cross_entropy"
        )
    if len(trained) > 1 and any(term.loss == "unlikelihood" and term.where is None for term in trained):
        found.append(
            f"{KEY}.unlikelihood: it acts on the same tokens as the other terms, which it undoes; where: COLUMN says "
            "on which it shall"
        )
    if not config.papers_code and (where := _turning_point([t for t in trained if t.where is None])) is not None:
        remedy = [
            f"; detach_weight: true in {term.loss} removes that"
            for term in trained
            if term.parameters.get("detach_weight") is False
        ]
        found.append(
            f"{KEY}: the losses of single tokens together lower the probability of a token that has more than "
            f"{where:.2g}, so they punish confidence{''.join(remedy[:1]) or '; more cross_entropy removes that'}"
        )
    sums = list(dict.fromkeys(f"{sum(_at(term, end)[0] for term in trained):g}" for end in ENDS))
    if any(not 0.5 <= float(total) <= 2 for total in sums):
        found.append(
            f"{KEY}: the weights sum to {' at first and to '.join(sums)}{' at last' * (len(sums) > 1)}; far from 1 the "
            "gradient has another size, so learning rate and gradient clipping may need other values"
        )
    if config.needs_logits:
        found.append(f"{KEY}: this objective {NEEDS_LOGITS}")
    return found


def _flat(loss: Loss) -> bool:
    return loss.kind.flat and "logp" not in loss.statistics


def _turning_point(terms: list[TermConfig]) -> float | None:
    """The probability above which the losses of single tokens together push a token down; None where none does.

    Whether they do is only known where each of them is a function of that probability.
    """
    losses = available_losses()
    for end in ENDS:
        total = torch.zeros_like(GRID)
        for term in terms:
            weight, parameters = _at(term, end)
            if not losses[term.loss].per_set:
                try:
                    total += weight * curve(losses[term.loss], parameters).pull
                except NotACurve:
                    return None
        if len(down := GRID[total < -1e-9]):
            return float(down[0])
    return None


def _at(term: TermConfig, progress: float) -> tuple[float, dict[str, Any]]:
    """Weight and parameters of a term after a fraction of training."""
    now = {name: schedule.at(progress) for name, schedule in term.schedules.items()}
    weight = now.pop("weight", term.weight)
    return weight, {**term.parameters, **now}


def term_rows(config: CVLossConfig) -> list[dict[str, Any]]:
    """What the key means, a mapping for each term."""
    rows = []
    for term in config.terms:
        spelt = term.dump()
        weight, name = spelt.pop("weight"), spelt.pop("loss")
        scope, sets = spelt.pop("scope"), (spelt.pop("per", None), spelt.pop("reduce", None))
        rows.append(
            {
                "weight": _number(term.schedules.get("weight"), weight),
                "loss": name,
                "with": ", ".join(f"{key} {_number(term.schedules.get(key), v)}" for key, v in spelt.items()),
                "over": ROWS[scope],
                "a set is": SETS.get(sets, ""),
                "formula": available_losses()[name].formula,
            }
        )
    return rows


def examples_fields() -> list[tuple[str, str, str, str]]:
    """Of ``examples``: each field with its default, what it takes, and what it is."""
    found = []
    models: list[tuple[str, type[BaseModel]]] = [
        ("", ExamplesConfig),
        ("reweight.", ReweightConfig),
        ("cvar.", CVaRConfig),
    ]
    for path, model in models:
        for name, info in model.model_fields.items():
            nested = name in ("reweight", "cvar")
            takes = "true, or a mapping" if nested else allowed(model, name)
            found.append((path + name, plain(info.default), takes, info.description or ""))
    return found


def examples_words(config: CVLossConfig) -> str:
    """What ``examples`` means, or empty where there is none."""
    examples = config.examples
    if examples is None:
        return ""
    said = f"a document counts by {COUNTS_BY[examples.normalize]}"
    if examples.look is None:
        return said
    weights = f"reweight ({examples.reweight})" if examples.reweight else f"cvar ({examples.cvar})"
    whole = "the whole step" if examples.look == "step" else "its micro-batch"
    return f"{said}, times its weight by {weights} among the documents of {whole}"


def _number(schedule: Schedule | None, value: Any) -> str:
    if schedule is None:
        return plain(value)
    return f"{schedule.start:g} to {schedule.to:g} over {schedule.over:.0%} of training ({schedule.shape})"
