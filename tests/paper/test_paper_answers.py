"""Answers and their NLL: those of the model itself, and of lm-evaluation-harness with the project's task files."""

import json
from types import SimpleNamespace

import pytest
from experiment import FOLDER, gsm8k, hellaswag, mathqa, openbookqa, write

HARNESS = FOLDER / "lm_eval"


def test_batches_and_padding_change_no_answer_and_no_nll(tiny, pairs, tmp_path):
    import answers

    def evaluate(batch):
        file = tmp_path / f"{batch}.jsonl"
        found = answers.evaluate("gsm8k", tiny.model, tiny.tokenizer, pairs, batch, 8, file, lambda done: None)
        return found, file.read_text()

    (together, texts), (alone, same) = evaluate(6), evaluate(1)
    assert texts == same
    assert together == pytest.approx(alone, rel=1e-5)
    records = [json.loads(line) for line in texts.splitlines()]
    assert [(record["prompt"], record["reference"]) for record in records] == pairs  # in the order of the rows


def test_nll_is_that_of_the_model_itself(tiny, pairs):
    import answers
    import torch

    total = count = 0
    for prompt, target in pairs:
        asked, told = (tiny.tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, target))
        ids = torch.tensor([[tiny.tokenizer.bos_token_id, *asked, *told, tiny.tokenizer.eos_token_id]])
        logp = torch.log_softmax(tiny.model(ids).logits[0, :-1].double(), -1)
        total -= float(logp.gather(1, ids[0, 1:, None])[len(asked) :].sum().detach())
        count += len(told) + 1
    assert answers.nll_of(tiny.model, tiny.tokenizer, pairs) == (pytest.approx(total, rel=1e-5), count)


def test_tokens_are_those_that_axolotl_trains_on(tiny, pairs):
    pytest.importorskip("axolotl")
    import answers
    from axolotl.utils.dict import DictDefault

    from axolotl_cvloss.hosts.axolotl_prompts import gsm8k

    strategy = gsm8k.load(tiny.tokenizer, DictDefault({"train_on_inputs": False, "sequence_len": 512}))
    for line, pair in zip((tiny.data / "gsm8k_test.jsonl").open(), pairs, strict=False):
        trained = strategy.tokenize_prompt(json.loads(line))
        assert answers.tokens_and_labels(tiny.tokenizer, pair) == (trained["input_ids"], trained["labels"])


def test_the_tokenizer_ends_where_the_model_ends(tiny):
    import answers

    wrong = SimpleNamespace(eos_token_id=[tiny.tokenizer.convert_tokens_to_ids("<s>")])
    assert answers.load_tokenizer(str(tiny.folder), wrong).eos_token == "<s>"
    right = SimpleNamespace(eos_token_id=[1, tiny.tokenizer.eos_token_id])
    assert answers.load_tokenizer(str(tiny.folder), right).eos_token == "</s>"


def generation(name):
    """How the task file has answers generated."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    task = yaml.load((HARNESS / f"{name}.yaml").read_text(), Loader)
    shared = yaml.load((HARNESS / task["include"]).read_text(), Loader)
    return {**shared, **task}["generation_kwargs"]


def harness(tiny, folder, name, files):
    """The harness's own scores of the tiny model, on local files in the place of the hub's."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    import yaml
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    changed = {
        "include": str(HARNESS / f"{name}.yaml"),
        "task": "local",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "generation_kwargs": {**generation(name), "max_gen_toks": 16},
    }
    (folder / "tasks").mkdir()
    (folder / "tasks" / "local.yaml").write_text(yaml.safe_dump(changed))
    manager = TaskManager(include_path=[str(HARNESS), str(folder / "tasks")], include_defaults=False)
    assert {f"cvloss_{name}" for name in ("gsm8k", "mathqa", "openbookqa", "hellaswag")} < set(manager.all_tasks)
    model = f"pretrained={tiny.folder}"
    found = simple_evaluate("hf", model, ["local"], task_manager=manager, batch_size=4, device="cpu", bootstrap_iters=0)
    return {name.removesuffix(",none"): value for name, value in found["results"]["local"].items()}


@pytest.mark.parametrize(
    ("name", "split", "rows"),
    [
        ("gsm8k", "test", gsm8k(7)),
        ("mathqa", "test", mathqa(8)),
        ("openbookqa", "test", openbookqa(6)),
        ("hellaswag", "validation", hellaswag(6)),
    ],
)
def test_the_harness_gives_the_same_scores(name, split, rows, tiny, tmp_path):
    import answers
    import tasks

    example = tasks.task(name).example
    assert generation(name)["max_gen_toks"] == tasks.NEW_TOKENS[name]
    pairs = [pair for pair in map(example, rows) if pair]
    learn(tiny, [*pairs[:-1], (pairs[-1][0], "")])  # right answers, and one that is none
    expected = answers.evaluate(name, tiny.model, tiny.tokenizer, pairs, 4, 16, tmp_path / "own.jsonl", lambda done: 0)
    folder = write(tmp_path, rows=rows)
    found = harness(tiny, tmp_path, name, {split: str(folder / "rows.jsonl")})
    for metric in expected.keys() - {"nll", "examples", "formula_examples"}:
        assert found[metric] == pytest.approx(expected[metric]), metric
    assert 0 < expected["exact_match"] < 1


def learn(tiny, pairs):
    import answers
    import torch

    rows = [answers.tokens_and_labels(tiny.tokenizer, pair) for pair in pairs]
    optimizer = torch.optim.AdamW(tiny.model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = sum(tiny.model(torch.tensor([ids]), labels=torch.tensor([labels])).loss for ids, labels in rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tiny.model.save_pretrained(tiny.folder)
