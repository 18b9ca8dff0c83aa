"""SNIPS as a segmentation of text: words in, a tag a word out; and a small untrained Llama with a word-level tokenizer.

python benchmarks/evidence/make_slots.py DATA [--out outputs/evidence/slots] [--kept-back] [--width 96]
python benchmarks/evidence/make_slots.py DATA --intents A,B [--model FOLDER] [--out FOLDER]

DATA has snips_train.jsonl, snips_dev.jsonl and snips_test.jsonl, with the fields words, tags and intent. Every prompt
is filled up to the same number of tokens, so that a tag stands at a constant distance from its word. The test set is
dev and test together; `cvloss compare` splits it at random. With --kept-back, for a last look at a winner, it is the
end of the training file instead, and training and vocabulary have the rows before. With --intents there are only rows
of these, with the vocabulary of all; with --model a trained model is taken in place of a new one.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from saving import save_model, save_rows
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "_"]
LONGEST = 24  # words; longer sentences, one in a hundred, are left out
SEEN = 2  # times that a word must be in the training set to have a token
KEPT_BACK = 1400  # rows at the end of the training file

Row = dict[str, Any]


def rows_of(data: Path, *splits: str) -> list[Row]:
    lines = [line for split in splits for line in (data / f"snips_{split}.jsonl").read_text().splitlines()]
    return [row for row in map(json.loads, lines) if len(row["words"]) <= LONGEST]


def unseen(rows: list[Row], training: list[Row]) -> list[Row]:
    """Without the sentences that are in the training rows, too."""
    known = {tuple(row["words"]) for row in training}
    return [row for row in rows if tuple(row["words"]) not in known]


def example(row: Row) -> dict[str, str]:
    filled = row["words"] + ["_"] * (LONGEST - len(row["words"]))
    return {"prompt": " ".join(filled), "completion": " " + " ".join(row["tags"])}


def build_tokenizer(rows: list[Row]) -> PreTrainedTokenizerFast:
    """A token a word and a token a tag; the tags come first."""
    tags = sorted({tag for row in rows for tag in row["tags"]})
    counts = Counter(word for row in rows for word in row["words"])
    words = sorted(word for word, count in counts.items() if count >= SEEN and word not in tags)
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *tags, *words])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def build_model(tokenizer: PreTrainedTokenizerFast, width: int = 96) -> LlamaForCausalLM:
    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=2,
            num_attention_heads=width // 16,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("outputs/evidence/slots"))
    parser.add_argument("--kept-back", action="store_true")
    parser.add_argument("--width", type=int, default=96, help="of the new model's hidden states")
    parser.add_argument("--intents", help="names with commas between them; without it all seven")
    parser.add_argument("--model", help="a folder of a model that was trained on other intents")
    args = parser.parse_args()
    training, test = rows_of(args.data, "train"), rows_of(args.data, "dev", "test")
    if args.kept_back:
        training, last = training[:-KEPT_BACK], training[-KEPT_BACK:]
        test = unseen(last, training)
    tokenizer = build_tokenizer(training)
    if args.intents:
        names = args.intents.split(",")
        training, test = ([row for row in rows if row["intent"] in names] for rows in (training, test))
    save_rows(args.out, train=map(example, training), test=map(example, test))
    print(f"{len(training)} training rows, {len(test)} test rows")
    model = LlamaForCausalLM.from_pretrained(args.model) if args.model else build_model(tokenizer, args.width)
    save_model(args.out, tokenizer, model)


if __name__ == "__main__":
    main()
