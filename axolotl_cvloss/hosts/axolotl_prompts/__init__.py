"""Dataset types for Axolotl: the paper's four datasets, with the prompts and targets of the paper's code.

Axolotl finds a type by the dotted path of a module with a function ``load``::

    datasets:
      - path: openai/gsm8k
        name: main
        split: train
        type: axolotl_cvloss.hosts.axolotl_prompts.gsm8k

Each module here has a function ``example(row)`` that turns a raw row of its dataset into a prompt and a target,
or into None for a row that cannot be trained on. It needs neither Axolotl nor a tokenizer.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

LETTERS = ("hellaswag", "openbookqa")  # the target is one letter

Row = Mapping[str, Any]
Example = Callable[[Row], tuple[str, str] | None]


def question(text: str, *lines: str) -> str:
    return "\n".join([f"Question: {text}", *lines, "Answer: "])


def choices(labels: Sequence[str], texts: Sequence[str]) -> list[str]:
    return [f"{label}. {text}" for label, text in zip(labels, texts, strict=True)]


def _load(example: Example, tokenizer: Any, cfg: Any) -> Any:
    from axolotl.prompt_strategies.completion import CompletionPrompter
    from axolotl.prompt_tokenizers import InstructionPromptTokenizingStrategy

    class Strategy(InstructionPromptTokenizingStrategy):
        def parse_instruction_fields(self, prompt: Row) -> tuple[str, str, str]:
            found = example(prompt)
            if found is None:  # only where Axolotl does not call filter_rows: a streamed dataset
                raise ValueError(f"no prompt and target in this row: {dict(prompt)}")
            return found[0], "", found[1]

    strategy = Strategy(CompletionPrompter(), tokenizer, cfg.train_on_inputs, cfg.sequence_len)
    strategy.filter_rows = lambda row: example(row) is not None
    return strategy


def loader(example: Example) -> Callable[[Any, Any], Any]:
    """The function ``load(tokenizer, cfg)`` that Axolotl looks for."""
    return partial(_load, example)
