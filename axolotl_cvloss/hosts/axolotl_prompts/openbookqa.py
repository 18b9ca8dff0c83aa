"""OpenBookQA (allenai/openbookqa: question_stem, choices, answerKey). The target is the right choice's letter.

The dataset's configuration ``additional`` also has the fact that a question is about, fact1, and the paper shows it
to the model. With ``main`` the prompt goes without.
"""

from axolotl_cvloss.hosts.axolotl_prompts import Row, choices, loader, question


def example(row: Row) -> tuple[str, str]:
    lines = choices(row["choices"]["label"], row["choices"]["text"])
    if row.get("fact1"):
        lines.append(f"Context: {row['fact1']}")
    return question(row["question_stem"], *lines), row["answerKey"]


load = loader(example)
