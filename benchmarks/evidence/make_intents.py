"""The intents of SNIPS with a long tail: a sentence in, one of seven names out, of which the rarest is seen 15 times.

python benchmarks/evidence/make_intents.py DATA [--model NAME] [--out outputs/evidence/intents] [--kept-back]

DATA as in make_slots.py, with the field intent. Training rows are cut down to 1500, 696, 323, 150, 70, 32 and 15 of the
seven intents in the order of their names, 1 : 100 from the first to the last. The test set is dev and test together,
nearly 200 of each, so that rare intents count as much as frequent ones. With --kept-back it is of the training file,
200 of each from its end, and the training rows come from before. With --model a pretrained model is saved beside them,
the sentences are prompts in words, and the test set has 100 of each; without it, a small untrained one, a token a word.
"""

import argparse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from make_slots import Row, build_model, build_tokenizer, rows_of, unseen
from saving import save_model, save_pretrained, save_rows

MOST, RATIO = 1500, 100
KEPT_BACK = 200  # of each intent
TEST = 100  # of each intent, for a pretrained model, which takes long to answer


def cut(rows: Iterable[Row], wanted: dict[str, int]) -> list[Row]:
    """The first rows of each intent, as many as are wanted."""
    seen: Counter[str] = Counter()
    found = []
    for row in rows:
        seen[row["intent"]] += 1
        if seen[row["intent"]] <= wanted[row["intent"]]:
            found.append(row)
    return found


def example(row: Row) -> dict[str, str]:
    # The last word is the place where the answer is asked for: a token of its own.
    return {"prompt": " ".join([*row["words"], "_"]), "completion": " " + row["intent"]}


def example_in_words(row: Row) -> dict[str, str]:
    return {"prompt": f"Sentence: {' '.join(row['words'])}\nIntent:", "completion": f" {row['intent']}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", help="a name of the hub or a folder")
    parser.add_argument("--out", type=Path, default=Path("outputs/evidence/intents"))
    parser.add_argument("--kept-back", action="store_true")
    args = parser.parse_args()
    whole, test = rows_of(args.data, "train"), rows_of(args.data, "dev", "test")
    intents = sorted({row["intent"] for row in whole})
    tail = {name: round(MOST * RATIO ** (-rank / (len(intents) - 1))) for rank, name in enumerate(intents)}
    training = cut(whole, tail)
    if args.kept_back:
        test = unseen(cut(reversed(whole), dict.fromkeys(intents, KEPT_BACK)), training)
    if args.model:
        test = cut(test, dict.fromkeys(intents, TEST))
    of_row = example_in_words if args.model else example
    save_rows(args.out, train=map(of_row, training), test=map(of_row, test))
    for name, rows in (("train", training), ("test", test)):
        print(f"{name}: {dict(Counter(row['intent'] for row in rows).most_common())}")
    if args.model:
        save_pretrained(args.out, args.model)
        return
    tokenizer = build_tokenizer([{"words": row["words"], "tags": [row["intent"]]} for row in training])
    save_model(args.out, tokenizer, build_model(tokenizer))


if __name__ == "__main__":
    main()
