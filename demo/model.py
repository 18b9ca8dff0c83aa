"""A small tokenizer, a small Llama with random weights, and the two measures of what a model knows."""

from __future__ import annotations

import torch
from problems import Problem
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, set_seed

from axolotl_cvloss import Objective
from axolotl_cvloss.hosts.axolotl_prompts.gsm8k import example


def build_tokenizer(problems: list[Problem]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for problem in problems for text in example(problem)), trainer)
    bos = ("<s>", bpe.token_to_id("<s>"))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: list[Problem], objective: Objective
) -> dict[str, float]:
    """The NLL and each term of the objective on the targets of the problems."""
    rows = []
    for prompt, target in map(example, problems):
        asked = tokenizer(prompt).input_ids
        told = [*tokenizer(target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        rows.append((asked + told, [-100] * len(asked) + told))
    longest = max(len(tokens) for tokens, _ in rows)
    input_ids, labels = (
        torch.tensor([row[i] + [filling] * (longest - len(row[i])) for row in rows])
        for i, filling in enumerate([tokenizer.pad_token_id, -100])
    )
    # Padding stands at the end, where a causal model's trained rows do not see it.
    result = objective.from_logits(model.eval()(input_ids).logits, labels)
    return {name: value.item() for name, value in {"nll": result.nll, **result.terms}.items()}


@torch.no_grad()
def write_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: list[Problem]) -> list[str]:
    """What the model writes greedily after each question."""
    prompts = tokenizer([example(problem)[0] for problem in problems], padding=True, return_tensors="pt")
    length = prompts.input_ids.shape[1]
    tokens = model.eval().generate(
        input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, do_sample=False, max_new_tokens=32
    )
    return tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
