"""Which tokens of a conversation are of which of its messages. Imports no host."""

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


def message_of_each_token(
    messages: Sequence[Message], input_ids: Sequence[int], tokenizer: Any, render: Callable[..., str]
) -> list[int]:
    """Of which message each token is, counted from 1; 0 before the first.

    The tokens of a message are those from the beginning of what it says to the beginning of what the next one says, so
    the token that ends it is one of them. What an assistant says begins after the template's generation prompt.

    Args:
        render: Makes text of messages, by the template; with ``add_generation_prompt=True`` also the prompt.

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
    return [bisect_left(starts, end) for _, end in encoded["offset_mapping"]]


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
    role = messages[i]["role"]
    others = (
        render([*messages[:i], {"role": role, "content": stand_in}, *messages[i + 1 :]]) for stand_in in STAND_INS
    )
    return min(_first_difference(text, other) for other in others)


def _first_difference(a: str, b: str) -> int:
    """How many characters are the same before it; halved, as comparing text one by one takes longer than to render."""
    return bisect_left(range(min(len(a), len(b))), True, key=lambda at: a[: at + 1] != b[: at + 1])
