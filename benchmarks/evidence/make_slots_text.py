"""SNIPS with the slots as text, for a pretrained model: a sentence in, `artist: westbam; album: allergic` out.

python benchmarks/evidence/make_slots_text.py DATA [--model NAME] [--out outputs/evidence/slots_text] [--kept-back]

DATA as in make_slots.py. There are 640 training rows, the first of the file, and 300 test rows, the first 150 of dev
and of test. With --kept-back the test rows are the last 300 of the training file. The model is saved beside them.
`score` is for `cvloss compare --score benchmarks.evidence.make_slots_text:score`.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

TRAIN, TEST = 640, 300
NONE = "none"

Row = dict[str, list[str]]


def example(row: Row) -> dict[str, str]:
    slots: list[tuple[str, list[str]]] = []
    for word, tag in zip(row["words"], row["tags"], strict=True):
        kind, _, name = tag.partition("-")
        if kind == "B":
            slots.append((name, [word]))
        elif kind == "I":
            slots[-1][1].append(word)
    answer = "; ".join(f"{name}: {' '.join(words)}" for name, words in slots)
    return {"prompt": f"Sentence: {' '.join(row['words'])}\nSlots:", "completion": f" {answer or NONE}"}


def score(prediction: str, reference: str) -> dict[str, float]:
    """Exact match of the whole, and F1 of the slots of an answer."""
    given, wanted = (Counter(text.strip().split("; ")) for text in (prediction, reference))
    hits = (given & wanted).total()
    return {"exact_match": float(given == wanted), "f1": 2 * hits / (given.total() + wanted.total())}


def main() -> None:
    from saving import save_pretrained, save_rows

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a name of the hub or a folder")
    parser.add_argument("--out", type=Path, default=Path("outputs/evidence/slots_text"))
    parser.add_argument("--kept-back", action="store_true")
    args = parser.parse_args()

    def rows(split: str) -> list[Row]:
        return [json.loads(line) for line in (args.data / f"snips_{split}.jsonl").read_text().splitlines()]

    training, test = rows("train")[:TRAIN], rows("dev")[: TEST // 2] + rows("test")[: TEST // 2]
    if args.kept_back:
        test = rows("train")[-TEST:]
    save_rows(args.out, train=map(example, training), test=map(example, test))
    save_pretrained(args.out, args.model)


if __name__ == "__main__":
    main()
