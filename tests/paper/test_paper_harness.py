"""lm-evaluation-harness with the project's task files gives the scores of `cvloss compare`."""

import pytest
from experiment import FOLDER, gsm8k, hellaswag, mathqa, openbookqa, write

HARNESS = FOLDER / "lm_eval"


def generation(name):
    """How the task file has answers generated."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    task = yaml.load((HARNESS / f"{name}.yaml").read_text(), Loader)
    shared = yaml.load((HARNESS / task["include"]).read_text(), Loader)
    return {**shared, **task}["generation_kwargs"]


def harness(untrained, folder, name, files):
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
    model = f"pretrained={untrained}"
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
def test_the_harness_gives_the_same_scores(name, split, rows, untrained, tmp_path):
    import prepare
    from transformers import AutoTokenizer

    from axolotl_cvloss.command.compare import predict
    from axolotl_cvloss.command.scorers import score_pairs

    example = prepare.example_of(prepare.recipe_of(name))
    pairs = [pair for pair in map(example, rows) if pair]
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    asked = [row_of(tokenizer, *pair) for pair in pairs]
    learn(untrained, [*asked[:-1], row_of(tokenizer, pairs[-1][0], "")])  # right answers, and one that is none
    records = predict.predict(*predict.load(str(untrained)), asked, 4, 16)
    scored = [(record["prediction"], record["reference"]) for record in records]
    expected = score_pairs(f"benchmarks.paper.scorer:{name}", scored).metrics
    assert 0 < expected["exact_match"] < 1
    folder = write(tmp_path, rows=rows)
    found = harness(untrained, tmp_path, name, {split: str(folder / "rows.jsonl")})
    for metric, value in expected.items():
        assert found[metric] == pytest.approx(value), metric


def row_of(tokenizer, prompt, target):
    """As Axolotl's strategy makes it for training."""
    asked = tokenizer(prompt).input_ids
    told = [*tokenizer(target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return {"input_ids": asked + told, "labels": [-100] * len(asked) + told}


def learn(folder, rows):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        losses = [model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss for row in rows]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
    model.save_pretrained(folder)
