"""A weight column through the data collator of any host, which would drop it, or could not pad it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class WeightCollator:
    """A data collator that adds to each batch the column ``name``: the weight of each token, (B, T) as the labels.

    The data have one number an example, or one a token. Packed rows are lists of examples, or all examples are one
    row. Examples without the column, as in an evaluation set, make batches without it.
    """

    def __init__(self, collator: Callable[..., Any], name: str) -> None:
        self.collator, self.name = collator, name

    def __call__(self, features: list[Any], *args: Any, **kwargs: Any) -> Any:
        rows = [row if isinstance(row, list) else [row] for row in features]
        if not all(self.name in example for row in rows for example in row):
            return self.collator(features, *args, **kwargs)
        weights = [torch.cat([self._of(example) for example in row]) for row in rows]
        rows = [[{k: v for k, v in example.items() if k != self.name} for example in row] for row in rows]
        packed = isinstance(features[0], list)
        batch = self.collator(rows if packed else [row[0] for row in rows], *args, **kwargs)
        if len(weights) != len(batch["labels"]):
            weights = [torch.cat(weights)]
        left = getattr(getattr(self.collator, "tokenizer", None), "padding_side", "right") == "left"
        padded = torch.zeros(batch["labels"].shape)
        for line, row in zip(padded, weights, strict=True):
            line[len(line) - len(row) if left else 0 :][: len(row)] = row
        batch[self.name] = padded
        return batch

    def _of(self, example: Mapping[str, Any]) -> Tensor:
        """(T,) weights of the tokens of an example."""
        length = len(example["input_ids"])
        weights = torch.as_tensor(example[self.name], dtype=torch.float32)
        if weights.numel() not in (1, length):
            raise ValueError(
                f"cv_loss.example_weights: {self.name} has {weights.numel()} numbers for {length} tokens; give one for "
                "the example, or one for each token, and as many of these as are left where the host cuts long examples"
            )
        return weights.flatten().expand(length)
