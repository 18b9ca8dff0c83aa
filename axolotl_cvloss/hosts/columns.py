"""Columns of the dataset on their way to the loss, which hosts would drop, or could not cut, pack or pad.

A column has one number an example, or one a token; or the messages of conversations have a field of its name, with a
number each. Imports no host.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..objective.config import KEY, CVLossConfig
from .chats import in_messages, message_of_each_token

OF_TOKENS = f"{KEY}.reference_logps"  # has no meaning with one number for an example


class ColumnCollator:
    """A data collator that adds columns of the dataset to each batch: a number of each token, (B, T) as the labels.

    Packed rows are lists of examples, or all examples are one row. A column that not all examples have, as in an
    evaluation set, is in no batch. Padding has 0.

    Args:
        columns: The names of the columns, and the keys that name them.
    """

    def __init__(self, collator: Callable[..., Any], columns: Mapping[str, str]) -> None:
        self.collator, self.columns = collator, columns

    def __call__(self, features: list[Any], *args: Any, **kwargs: Any) -> Any:
        packed = isinstance(features[0], list)
        rows = features if packed else [[example] for example in features]
        found = {
            name: [torch.cat([numbers(example, name, key) for example in row]) for row in rows]
            for name, key in self.columns.items()
            if all(name in example for row in rows for example in row)
        }
        rows = [[{k: v for k, v in example.items() if k not in self.columns} for example in row] for row in rows]
        batch = self.collator(rows if packed else [row[0] for row in rows], *args, **kwargs)
        left = getattr(getattr(self.collator, "tokenizer", None), "padding_side", "right") == "left"
        for name, values in found.items():
            values = values if len(values) == len(batch["labels"]) else [torch.cat(values)]
            batch[name] = torch.zeros(batch["labels"].shape)
            for line, row in zip(batch[name], values, strict=True):
                line[len(line) - len(row) if left else 0 :][: len(row)] = row
        return batch


def numbers(example: Mapping[str, Any], name: str, key: str) -> Tensor:
    """(T,), float32, the numbers that a column has for the tokens of an example.

    Raises:
        ValueError: It has none, or as many as fit neither the example nor its tokens.
    """
    if "input_ids" not in example:
        raise ValueError(f"{key}: the examples have no input_ids, as where a collator makes the tokens of images")
    length, given = len(example["input_ids"]), example[name]
    try:
        found = torch.as_tensor(given, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{key}: {name} is {given!r:.60} in an example; give a number, or a list of them, one for each token"
        ) from None
    if found.numel() != length and (found.numel() != 1 or key == OF_TOKENS):
        raise ValueError(
            f"{key}: {name} has {found.numel()} numbers for {length} tokens; give one for the example, or one for each "
            "token, and as many of these as are left where the host cuts long examples"
        )
    return found.flatten().expand(length)


def missing(dataset: Any, config: CVLossConfig, evaluation: bool = False) -> str | None:
    """What is wrong with a dataset that has not got a column; None where all are there, or it cannot be told yet."""
    names = getattr(dataset, "column_names", None)
    if not isinstance(names, list):
        return None
    for name, key in config.columns.items():
        optional = evaluation and name == config.example_weights
        if name not in names and not optional and not in_messages(dataset, name):
            which = "evaluation" if evaluation else "training"
            return (
                f"{key}: the {which} set has no column {name}, and no messages with such a field; it has "
                f"{', '.join(names)}"
            )
    return None


def before_messages(dataset: Any, names: Sequence[str], config: CVLossConfig) -> dict[str, float]:
    """Of what only messages have as a field, the number of a message without it, and of what is before all of them."""
    return {
        name: 1.0 if name == config.example_weights else 0.0
        for name in config.columns
        if name not in names and in_messages(dataset, name)
    }


def per_token(
    dataset: Any, config: CVLossConfig, cut: tuple[int, str] | None, tokenizer: Any, template: str | None
) -> tuple[Any, list[str]]:
    """A dataset that SFTTrainer has tokenized, with a list of numbers a token in each column of ``config``.

    Gives with it the names of those that it has: an evaluation set may be without weights.

    Args:
        cut: The length that examples will be cut to, and ``keep_start`` or ``keep_end``.
        template: By which conversations have become text; None: the tokenizer's.
    """
    names = dataset.column_names or list(next(iter(dataset)))
    before = before_messages(dataset, names, config)
    there = {name: key for name, key in config.columns.items() if name in names or name in before}
    if not there:
        return dataset, []
    more = {"columns": there, "before": before, "cut": cut, "tokenizer": tokenizer, "template": template}
    return dataset.map(_listed, fn_kwargs=more), list(there)


def _listed(
    example: Mapping[str, Any],
    columns: Mapping[str, str],
    before: Mapping[str, float],
    cut: tuple[int, str] | None,
    tokenizer: Any,
    template: str | None,
) -> dict[str, Any]:
    found = {name: numbers(example, name, key).tolist() for name, key in columns.items() if name not in before}
    if before:
        messages = example.get("messages") or [*example.get("prompt", ()), *example.get("completion", ())]
        tools, more = example.get("tools"), example.get("chat_template_kwargs") or {}
        more = {"chat_template": template, "tools": json.loads(tools) if isinstance(tools, str) else tools, **more}
        render = partial(tokenizer.apply_chat_template, tokenize=False, **more)
        fields = {name: (columns[name], number) for name, number in before.items()}
        found |= of_messages(messages, fields, example["input_ids"], tokenizer, render)
    if cut is None:
        return found
    kept = slice(-cut[0], None) if cut[1] == "keep_end" else slice(cut[0])
    return {name: values[kept] for name, values in found.items()}


def of_messages(
    messages: Sequence[Mapping[str, Any]],
    fields: Mapping[str, tuple[str, float]],
    input_ids: Sequence[int],
    tokenizer: Any,
    render: Callable[..., str],
) -> dict[str, list[float]]:
    """The numbers of each token, from fields of messages.

    Args:
        fields: By name, the key that names a field, and the number of a message without it and of what is before all.
    """
    numbers = {}
    for name, (key, before) in fields.items():
        values = [before, *(before if message.get(name) is None else message[name] for message in messages)]
        if wrong := [value for value in values if not isinstance(value, int | float)]:
            raise ValueError(f"{key}: {name} is {wrong[0]!r:.60} in a message; give a number")
        numbers[name] = [float(value) for value in values]
    try:
        of = message_of_each_token(messages, input_ids, tokenizer, render)
    except ValueError as error:
        raise ValueError(f"{', '.join(key for key, _ in fields.values())}: {error}") from error
    return {name: [values[message] for message in of] for name, values in numbers.items()}
