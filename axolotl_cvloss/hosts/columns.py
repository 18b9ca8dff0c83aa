"""Columns of the dataset on their way to the loss, which hosts would drop, or could not cut, pack or pad.

A column has one number an example, or one a token. Imports no host.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


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
    length, given = len(example["input_ids"]), example[name]
    try:
        found = torch.as_tensor(given, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{key}: {name} is {given!r:.60} in an example; give a number, or a list of them, one for each token"
        ) from None
    if found.numel() not in (1, length):
        raise ValueError(
            f"{key}: {name} has {found.numel()} numbers for {length} tokens; give one for the example, or one for each "
            "token, and as many of these as are left where the host cuts long examples"
        )
    return found.flatten().expand(length)


def per_token(dataset: Any, columns: Mapping[str, str], cut: tuple[int, str] | None) -> tuple[Any, list[str]]:
    """A tokenized dataset, with a list of numbers a token in each of these columns that it has; and their names.

    Args:
        cut: The length that SFTTrainer will cut examples to, and ``keep_start`` or ``keep_end``.
    """
    names = dataset.column_names or list(next(iter(dataset)))
    there = {name: key for name, key in columns.items() if name in names}
    return dataset.map(_listed, fn_kwargs={"columns": there, "cut": cut}) if there else dataset, list(there)


def _listed(example: Mapping[str, Any], columns: Mapping[str, str], cut: tuple[int, str] | None) -> dict[str, Any]:
    found = {name: numbers(example, name, key).tolist() for name, key in columns.items()}
    if cut is None:
        return found
    kept = slice(-cut[0], None) if cut[1] == "keep_end" else slice(cut[0])
    return {name: values[kept] for name, values in found.items()}
