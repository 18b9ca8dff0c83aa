"""Columns of the dataset through Axolotl's preparation, which keeps those alone that its strategies make.

Some of its functions are put in brackets: those that load a dataset and give it to a strategy, that which cuts long
examples, and that which names what is prepared, so that data prepared without the columns are not taken.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from hashlib import md5
from typing import Any

from ..objective.config import KEY, CVLossConfig
from .columns import before_messages, missing, numbers, of_messages

_before: list[tuple[Any, str, Callable[..., Any]]] = []  # of what is in brackets: its module, its name, what it was
_evaluated: list[bool] = []  # whether the datasets that are being loaded are for evaluation


def carry(config: CVLossConfig | None) -> None:
    """Keep the columns that the key of a run names, or nothing more than Axolotl does.

    The brackets hold the config: some of them go to processes that know nothing of this one.
    """
    while _before:
        setattr(*_before.pop())
    if config is None or not config.columns:
        return
    from axolotl.utils.data import sft, utils, wrappers

    names = sorted(config.columns)
    for module, name, bracket in (
        (sft, "_load_and_process_single_dataset", partial(_loaded, config)),
        (wrappers, "wrap_dataset_for_tokenized_prompt", partial(_strategy, config)),
        (utils, "truncate_long_seq", partial(_cut, names)),
        (sft, "generate_dataset_hash_from_config", partial(_named, names)),
    ):
        if (function := getattr(module, name, None)) is None:
            raise RuntimeError(
                f"{KEY}: this version of Axolotl prepares data in another way, and the columns {', '.join(names)} of "
                "the dataset would not come to the loss"
            )
        _before.append((module, name, function))
        setattr(module, name, wraps(function)(partial(bracket, function)))


def _loaded(config: CVLossConfig, load: Callable[..., Any], *given: Any, **named: Any) -> Any:
    _evaluated.append(named.get("split") == "test")
    try:
        dataset, prompter = load(*given, **named)
        _check(dataset, config)  # here too, for those that come tokenized
    finally:
        _evaluated.pop()
    return dataset, prompter


def _check(dataset: Any, config: CVLossConfig) -> None:
    if problem := missing(dataset, config, evaluation=_evaluated == [True]):
        raise ValueError(problem)


def _strategy(config: CVLossConfig, wrap: Callable[..., Any], prompt_tokenizer: Any, dataset: Any, **more: Any) -> Any:
    _check(dataset, config)
    names = dataset.column_names or list(next(iter(dataset)))
    own = {name: key for name, key in config.columns.items() if name in names}
    fields = {name: (config.columns[name], n) for name, n in before_messages(dataset, names, config).items()}
    return wrap(Carrying(prompt_tokenizer, own, fields), dataset, **more)


def _cut(names: Sequence[str], truncate: Callable[..., Any], sample: Any, sequence_len: int = 2048) -> Any:
    lengths = [len(ids) for ids in sample["input_ids"]]
    for name in names:
        for i, length in enumerate(lengths if name in sample else ()):
            if isinstance(values := sample[name][i], list) and len(values) == length:
                sample[name][i] = values[:sequence_len]
    return truncate(sample, sequence_len=sequence_len)


def _named(names: Sequence[str], generate: Callable[..., str], cfg: Any, *more: Any, **named: Any) -> str:
    return md5(f"{generate(cfg, *more, **named)} {names}".encode(), usedforsecurity=False).hexdigest()


class Carrying:
    """A strategy of Axolotl, and columns of the dataset beside what it makes, a number a token.

    Args:
        columns: The names of columns that the dataset has, and the keys that name them.
        fields: Of those that messages have as a field, the key, and the number of a message without it.
    """

    def __init__(self, strategy: Any, columns: Mapping[str, str], fields: Mapping[str, tuple[str, float]]) -> None:
        self.strategy, self.columns, self.fields = strategy, columns, fields
        self.supports_batched = strategy.supports_batched
        self.filter_rows = getattr(strategy, "filter_rows", None)
        self.prompter, self.tokenizer = strategy.prompter, strategy.tokenizer

    def tokenize_prompt(self, prompt: Mapping[str, Any]) -> dict[str, Any]:
        if not self.supports_batched:
            return self._with_numbers(prompt, self.strategy.tokenize_prompt(prompt))
        found = defaultdict(list)
        for row in (dict(zip(prompt, values, strict=True)) for values in zip(*prompt.values(), strict=True)):
            made = self.strategy.tokenize_prompt({name: [value] for name, value in row.items()})
            for values in zip(*made.values(), strict=True):  # a long text may make several examples
                for name, value in self._with_numbers(row, dict(zip(made, values, strict=True))).items():
                    found[name].append(value)
        return dict(found)

    def _with_numbers(self, row: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
        example = {**made, **{name: row[name] for name in self.columns}}
        found = {name: numbers(example, name, key).tolist() for name, key in self.columns.items()}
        return {**made, **found, **(self._of_messages(row, made["input_ids"]) if self.fields else {})}

    def _of_messages(self, row: Mapping[str, Any], input_ids: list[int]) -> dict[str, list[float]]:
        from axolotl.utils.dict import remove_none_values

        strategy, prompter = self.strategy, self.prompter
        if not hasattr(strategy, "get_conversation_thread"):
            key = next(key for key, _ in self.fields.values())
            raise ValueError(
                f"{key}: only datasets of type chat_template have it in messages; this is {type(strategy)}"
            )
        row = remove_none_values(row)  # as the strategy does
        turns = strategy.get_conversation_thread(row)
        render = partial(
            strategy.tokenizer.apply_chat_template,
            tokenize=False,
            chat_template=prompter.chat_template,
            tools=strategy._get_tools(row),
            **prompter.chat_template_kwargs,
        )
        # A system prompt may have come before the messages, or have been taken away.
        given: list[dict[str, Any]] = [{}] * len(turns) + list(strategy._get_messages(row))
        numbered = [
            {**turn, **{name: of.get(name) for name in self.fields}}
            for turn, of in zip(turns, given[-len(turns) :], strict=True)
        ]
        return of_messages(numbered, self.fields, input_ids, self.tokenizer, render)
