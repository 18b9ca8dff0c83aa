"""The word problems of the demo as rows for TRL, and its untrained model.

python benchmarks/evidence/make_problems.py [--out outputs/evidence/problems] [--kept-back]

The test set has held-out problems, whose stories and numbers are in no training row. With --kept-back it has others
of them, for a last look.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "demo"))

from model import build_model, build_tokenizer
from problems import make_problems
from saving import save_model, save_rows

from axolotl_cvloss.hosts.axolotl_prompts.gsm8k import example

TRAIN, TEST = 8000, 1200


def row_of(problem: dict[str, str]) -> dict[str, str]:
    prompt, target = example(problem)
    # The space goes with the answer, so that prompt and answer apart are the tokens of the whole.
    return {"prompt": prompt.rstrip(" "), "completion": f" {target}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/evidence/problems"))
    parser.add_argument("--kept-back", action="store_true")
    args = parser.parse_args()
    training = make_problems(TRAIN, held_out=False)
    held_out = make_problems(2 * TEST, held_out=True)
    test = held_out[TEST:] if args.kept_back else held_out[:TEST]
    save_rows(args.out, train=map(row_of, training), test=map(row_of, test))
    tokenizer = build_tokenizer(training)
    save_model(args.out, tokenizer, build_model(tokenizer))


if __name__ == "__main__":
    main()
