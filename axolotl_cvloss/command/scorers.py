"""Scores of generated answers of any task: exact match, and F1 where an answer has fields, spans or classes.

name    exact_match                                           F1 of
text    the same words, whatever the white space              -
number  the same value: after ``####`` where the reference    -
        has that mark, else the last number of the text
choice  the same letter, by the first line                    the letters
label   the same words, each answer being a class             the classes
json    the same JSON                                         the leaves of the objects, by path and value
spans   the same spans of BIO tags, ``O B-artist I-artist``   the spans, by label, first and last tag

f1_micro is 2 hits / (predicted + wanted) over all fields. f1_macro is the mean of that over the labels (path of a leaf,
label of a span, class) that a reference has, so that a rare label counts as much as a frequent one.

``MODULE:FUNCTION`` is a function of your own: of prediction and reference, to a number, or to a mapping of names to
numbers. The first of them decides, so every example must have it, and higher must be better; the others are means over
the examples that have them.
"""

import importlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from .scoring import final_number, last_number, letter, number

Fields = Counter[tuple[str, Hashable]]  # label and value of each field of an answer


@dataclass
class Example:
    """The scores of one answer, and its fields and those of the reference where F1 is taken of them."""

    scores: dict[str, float]
    predicted: Fields = field(default_factory=Counter)
    wanted: Fields = field(default_factory=Counter)


Scorer = Callable[[str, str], Example]


def _exact(same: bool, predicted: Iterable[Any] = (), wanted: Iterable[Any] = ()) -> Example:
    return Example({"exact_match": float(same)}, Counter(predicted), Counter(wanted))


def text(prediction: str, reference: str) -> Example:
    return _exact(prediction.split() == reference.split())


def numbers(prediction: str, reference: str) -> Example:
    marked = "####" in reference
    wanted = final_number(reference) if marked else number(reference)
    if wanted is None:
        raise ValueError(f"reference is {reference!r}; the score number needs a number in it")
    return _exact((final_number if marked else last_number)(prediction) == wanted)


def choice(prediction: str, reference: str) -> Example:
    given, wanted = letter(prediction), letter(reference)
    if wanted is None:
        raise ValueError(f"reference is {reference!r}; the score choice needs a letter from A to H")
    return _exact(given == wanted, [(given, True)] if given else [], [(wanted, True)])


def label(prediction: str, reference: str) -> Example:
    given, wanted = " ".join(prediction.split()), " ".join(reference.split())
    return _exact(given == wanted, [(given, True)], [(wanted, True)])


def json_(prediction: str, reference: str) -> Example:
    try:
        wanted = json.loads(reference)
    except ValueError as error:
        raise ValueError(f"reference is {reference!r}, which is not JSON: {error}") from error
    try:
        given = json.loads(prediction)
    except (ValueError, RecursionError):
        return _exact(False, [], _leaves(wanted))
    # Compared as text, as Python takes true for 1.
    same = json.dumps(given, sort_keys=True) == json.dumps(wanted, sort_keys=True)
    return _exact(same, _leaves(given), _leaves(wanted))


def _leaves(value: Any, path: str = "") -> Iterable[tuple[str, str]]:
    """Path and value of every leaf; the items of a list share one path, so their order does not count."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, f"{path}[]")
    else:
        yield path, json.dumps(value)


def spans(prediction: str, reference: str) -> Example:
    given, wanted = _spans(prediction.split()), _spans(reference.split())
    return _exact(given == wanted, given, wanted)


def _spans(tags: Sequence[str]) -> list[tuple[str, tuple[int, int]]]:
    """Label, first and last tag. As in conlleval, an I that continues no span of its label begins one."""
    found: list[tuple[str, tuple[int, int]]] = []
    open_label = None
    for place, tag in enumerate(tags):
        kind, _, name = tag.partition("-")
        if kind not in ("B", "I") or not name:
            open_label = None
        elif kind == "I" and name == open_label:
            found[-1] = (name, (found[-1][1][0], place))
        else:
            found.append((name, (place, place)))
            open_label = name
    return found


SCORERS: dict[str, Scorer] = {
    "text": text,
    "number": numbers,
    "choice": choice,
    "label": label,
    "json": json_,
    "spans": spans,
}


def scorer(name: str) -> Scorer:
    """A scorer by its name, or the function that ``MODULE:FUNCTION`` names, also in a module of the current folder.

    Raises:
        ValueError: There is no such scorer, module or function; the message says what is allowed.
    """
    if name in SCORERS:
        return SCORERS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"unknown score {name!r}; allowed: {', '.join(SCORERS)}, or MODULE:FUNCTION")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        own = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"score {name}: {error}") from error

    def score(prediction: str, reference: str) -> Example:
        given = own(prediction, reference)
        found = given if isinstance(given, Mapping) else {function: given}
        if not found or not all(isinstance(value, int | float) and math.isfinite(value) for value in found.values()):
            raise ValueError(f"{name} gave {given!r}; it must give a finite number, or a mapping of names to such")
        return Example({str(key): float(value) for key, value in found.items()})

    return score


@dataclass(frozen=True)
class Scores:
    """Means over the examples, the main one first, and the main score of each example."""

    metrics: dict[str, float]
    examples: list[float]


def score_pairs(name: str, pairs: Iterable[tuple[str, str]]) -> Scores:
    """Score predictions beside their references."""
    of = scorer(name)
    found = [of(prediction, reference) for prediction, reference in pairs]
    if not found:
        raise ValueError("there is nothing to score")
    names = dict.fromkeys(key for example in found for key in example.scores)
    metrics = {key: fmean(example.scores[key] for example in found if key in example.scores) for key in names}
    if any(example.wanted for example in found):
        metrics |= f1(found)
    main = next(iter(metrics))
    if any(main not in example.scores for example in found):
        raise ValueError(f"score {name}: every example must have {main}, which decides")
    return Scores(metrics, [example.scores[main] for example in found])


def f1(examples: Sequence[Example]) -> dict[str, float]:
    hits: Counter[str] = Counter()
    predicted: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    for example in examples:
        for counted, fields in (
            (hits, example.predicted & example.wanted),
            (predicted, example.predicted),
            (wanted, example.wanted),
        ):
            for (name, _), count in fields.items():
                counted[name] += count
    return {
        "f1_micro": 2 * hits.total() / (predicted.total() + wanted.total()),
        "f1_macro": fmean(2 * hits[name] / (predicted[name] + wanted[name]) for name in wanted),
    }


def score_file(path: str | Path, name: str) -> dict[str, float]:
    """Metrics of a JSONL file whose lines have the fields prediction and reference."""
    pairs = []
    # Not splitlines: a text may have other ends of lines in it, such as U+2028, which JSON leaves as they are.
    for place, line in enumerate(Path(path).read_text(encoding="utf-8").rstrip().split("\n"), start=1):
        try:
            record = json.loads(line)
            pair = record["prediction"], record["reference"]
            if not all(isinstance(text, str) for text in pair):
                raise TypeError("prediction and reference must be texts")
        except (ValueError, KeyError, TypeError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}, line {place}: {what}") from error
        pairs.append(pair)
    try:
        scores = score_pairs(name, pairs)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return {"examples": len(pairs), **scores.metrics}
