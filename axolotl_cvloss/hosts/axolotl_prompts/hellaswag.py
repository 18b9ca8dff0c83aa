"""HellaSwag (Rowan/hellaswag: ctx, endings, label). The target is the letter of the right ending."""

from axolotl_cvloss.hosts.axolotl_prompts import Row, choices, loader, question


def example(row: Row) -> tuple[str, str] | None:
    """label '2' of four endings -> 'C'; the labels of the test split are empty, and its rows are left out"""
    if row["label"] == "":
        return None
    letters = "ABCD"[: len(row["endings"])]
    return question(row["ctx"], *choices(letters, row["endings"])), letters[int(row["label"])]


load = loader(example)
