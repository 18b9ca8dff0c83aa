"""The word problems of the demo as rows for TRL, and its untrained model.

python benchmarks/evidence/make_problems.py [--out outputs/evidence/problems] [--kept-back]

The test set has held-out problems, whose stories and numbers are in no training row. With --kept-back it has others
of them, for a last look.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "demo"))

from model import build_model, build_tokenizer
from problems import make_problems

from axolotl_cvloss.hosts.axolotl_prompts.gsm8k import example

TRAIN, TEST = 8000, 1200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/evidence/problems"))
    parser.add_argument("--kept-back", action="store_true")
    args = parser.parse_args()
    training = make_problems(TRAIN, held_out=False)
    held_out = make_problems(2 * TEST, held_out=True)
    data = args.out / "data"
    data.mkdir(parents=True, exist_ok=True)
    for name, rows in ("train", training), ("test", held_out[TEST:] if args.kept_back else held_out[:TEST]):
        with (data / f"{name}.jsonl").open("w") as file:
            for prompt, target in map(example, rows):
                # The space goes with the answer, so that prompt and answer apart are the tokens of the whole.
                file.write(json.dumps({"prompt": prompt.rstrip(" "), "completion": f" {target}"}) + "\n")
    tokenizer = build_tokenizer(training)
    tokenizer.save_pretrained(args.out / "model")
    build_model(tokenizer).save_pretrained(args.out / "model")


if __name__ == "__main__":
    main()
