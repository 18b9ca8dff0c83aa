"""A number of each message of a conversation as a number of each of its tokens. Imports no host."""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

Message = Mapping[str, Any]

FEW = 100
STAND_INS = "[[stand-in]]", "zzstandinzz"  # no character that one begins with begins the other


def in_messages(dataset: Any, name: str) -> bool:
    """Whether the conversations of a dataset have this field in their messages.

    Of a stream that does not tell, one of the first examples must have it.
    """
    if (features := dataset.features) is None:
        return any(_has(row, name) for row in islice(dataset, FEW))
    told = {
        column: feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
        for column, feature in features.items()
    }
    if any(isinstance(message, Mapping) and name in message for message in told.values()):
        return True
    # Messages of many forms are kept as JSON, and their fields are told by nothing but themselves.
    columns = [column for column, message in told.items() if type(message).__name__ == "Json"]
    rows = dataset.select_columns(columns) if columns else ()
    return any(_has(row, name) for row in rows)


def _has(row: Mapping[str, Any], name: str) -> bool:
    lists = [value for value in row.values() if isinstance(value, list)]
    return any(isinstance(each, Mapping) and each.get(name) is not None for value in lists for each in value)


def number_of_each_token(
    messages: Sequence[Message],
    values: Sequence[float],
    input_ids: Sequence[int],
    tokenizer: Any,
    render: Callable[..., str],
    before: float,
) -> list[float]:
    """As many numbers as ``input_ids``.

    The tokens of a message are those from the beginning of what it says to the beginning of what the next one says, so
    the token that ends it is one of them. What an assistant says begins after the template's generation prompt.

    Args:
        values: A number of each message.
        render: Makes text of messages, by the template; with ``add_generation_prompt=True`` also the prompt.
        before: The number of the tokens before the first message.

    Raises:
        ValueError: The tokens are not those of the text, or the tokenizer does not say where in it they are.
    """
    text = render(messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) if tokenizer.is_fast else {}
    if list(encoded.get("input_ids", ())) != list(input_ids):
        raise ValueError(
            "the tokens of the messages cannot be told apart: this takes a fast tokenizer, and the tokens of the "
            "conversation's text; give a list of numbers, one for each token"
        )
    starts = [_start(text, messages, i, render) for i in range(len(messages))]
    # A token on both sides of a start is of the later message.
    of = [bisect_left(starts, end) for _, end in encoded["offset_mapping"]]
    return [values[i - 1] if i else before for i in of]


def _start(text: str, messages: Sequence[Message], i: int, render: Callable[..., str]) -> int:
    """Where in the text a message begins to say something."""
    if messages[i]["role"] == "assistant" and i:
        try:
            prompt = render(messages[:i], add_generation_prompt=True)
        except Exception:  # templates raise what they like at conversations that they do not know
            prompt = None
        if prompt is not None and text.startswith(prompt):
            return len(prompt)
    # Where another text in its place makes the first difference, as the rest of the conversation may change the whole.
    role, others = messages[i]["role"], []
    for stand_in in STAND_INS:
        other = render([*messages[:i], {"role": role, "content": stand_in}, *messages[i + 1 :]])
        same = (a == b for a, b in zip(text, other, strict=False))
        others.append(next((at for at, alike in enumerate(same) if not alike), min(len(text), len(other))))
    return min(others)
