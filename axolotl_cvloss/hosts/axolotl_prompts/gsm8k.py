"""GSM8K (openai/gsm8k: question, answer). The target keeps the formulas of the answer and its last line."""

import re

from axolotl_cvloss.hosts.axolotl_prompts import Row, loader, question


def example(row: Row) -> tuple[str, str]:
    """'... 48/2 = <<48/2=24>>24 clips ... #### 72' -> '<<48/2=24>> ... #### 72'"""
    kept = re.findall(r"<<[^>]+>>|#### .+", row["answer"])
    return question(row["question"]), " ".join(kept)


load = loader(example)
