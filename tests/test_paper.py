"""The paper's experiment without training: rows, plan, configs, figures. hosts/test_paper_experiment.py trains."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "paper"
SHARED = FOLDER.parents[2] / "shared" / "data"  # real rows of three of the datasets, where somebody has put them
MODULES = ("answers", "plans", "run", "seeding", "summary", "tasks", "tiny", "training")


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


# Rows


def gsm8k(count):
    return [{"question": f"What is {i} and 1?", "answer": f"<<{i}+1={i + 1}>>\n#### {i + 1}"} for i in range(count)]


def mathqa(count):
    row = {"options": "a ) 1 , b ) 2", "linear_formula": "add(n0,n1)|"}
    return [{**row, "Problem": f"problem {i}", "correct": "ae"[i % 2]} for i in range(count)]  # e is no option


def openbookqa(count):
    choices = {"label": ["A", "B"], "text": ["yes", "no"]}
    return [{"question_stem": f"Is it {i}?", "choices": choices, "answerKey": "AB"[i % 2]} for i in range(count)]


def hellaswag(count):
    return [{"ctx": f"{i} people", "endings": ["go", "stay"], "label": str(i % 2)} for i in range(count)]


def write(folder, **files):
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def prepare(name, folder, work, train=None, valid=5, test=None):
    import tasks

    return tasks.prepare(tasks.task(name), folder, work, train, valid, test)


def test_validation_rows_are_held_out_of_the_training_split(tmp_path):
    folder = write(tmp_path, gsm8k_train=gsm8k(30), gsm8k_test=gsm8k(8))
    data = prepare("gsm8k", folder, tmp_path / "work", train=20, valid=5, test=6)
    assert (len(data.train), len(data.valid), len(data.test)) == (20, 5, 6)
    questions = [row["question"] for row in data.train + data.valid]
    assert len(set(questions)) == 25
    assert [json.loads(line) for line in data.file.read_text().splitlines()] == data.train
    again = prepare("gsm8k", folder, tmp_path / "elsewhere", train=20, valid=5, test=6)
    assert (again.train, again.valid, again.test, again.digest) == (data.train, data.valid, data.test, data.digest)
    fewer = prepare("gsm8k", folder, tmp_path / "work", train=10, valid=5, test=3)
    assert (fewer.train, fewer.valid, fewer.test) == (data.train[:10], data.valid, data.test[:3])
    assert fewer.digest != data.digest


def test_a_validation_split_is_taken_where_there_is_one(tmp_path):
    files = {f"openbookqa_{name}": openbookqa(count) for name, count in (("train", 20), ("validation", 9), ("test", 7))}
    data = prepare("openbookqa", write(tmp_path, **files), tmp_path / "work")
    assert (len(data.train), len(data.valid), len(data.test)) == (20, 5, 7)
    assert data.sources["valid"] == "openbookqa_validation.jsonl"


def test_mathqa_trains_on_dev_where_train_is_missing_and_leaves_rows_out(tmp_path):
    data = prepare("mathqa", write(tmp_path, mathqa_dev=mathqa(40), mathqa_test=mathqa(10)), tmp_path / "work")
    assert (len(data.train), len(data.valid), len(data.test)) == (15, 5, 5)
    assert data.sources["train"] == "mathqa_dev.jsonl"


def test_hellaswag_is_scored_on_its_validation_split(tmp_path):
    unlabelled = [{**row, "label": ""} for row in hellaswag(9)]
    files = {"hellaswag_train": hellaswag(20), "hellaswag_validation": hellaswag(8), "hellaswag_test": unlabelled}
    data = prepare("hellaswag", write(tmp_path, **files), tmp_path / "work")
    assert (len(data.train), len(data.valid), len(data.test)) == (15, 5, 8)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no gsm8k_test\.jsonl"):
        prepare("gsm8k", write(tmp_path, gsm8k_train=gsm8k(9)), tmp_path / "work")


@pytest.mark.skipif(not SHARED.exists(), reason=f"the files of the datasets are not in {SHARED}")
@pytest.mark.parametrize("name", ["gsm8k", "mathqa", "openbookqa"])
def test_real_rows_score_perfectly_against_themselves(name, tmp_path):
    import tasks

    from axolotl_cvloss.scoring import score

    data, example = prepare(name, SHARED, tmp_path, valid=50), tasks.task(name).example
    pairs = [example(row) for row in data.test]
    found = score({"task": name, "prediction": target, "reference": target} for _, target in pairs)[name]
    assert found["examples"] == len(data.test) > 400
    assert (found["exact_match"], found["no_answer"]) == (1, 0)


# The plan


def test_objectives():
    import plans

    from axolotl_cvloss.config import CVLossConfig

    for loss in plans.LOSSES:
        terms = CVLossConfig.parse(plans.objective(loss)).dump()["terms"]
        assert terms[0]["scope"] == "sequence"
        assert sum(term["weight"] for term in terms) == pytest.approx(1)
    reference = plans.objective("generalized_dice:reference")
    assert reference == {**plans.objective("generalized_dice"), "reference": True}


def make_plan(**changes):
    import dataclasses

    import plans

    return dataclasses.replace(plans.PLANS["full"], **{"steps": 0, "batch": 2, **changes})


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [(1000, 1e-2), (20, 1e-4)],
    ids=["exact match tells", "exact match does not tell: the lowest NLL"],
)
def test_the_rate_is_chosen_by_exact_match_unless_it_is_noise(rows, chosen):
    import plans

    plan = make_plan(rates=(1e-4, 1e-3, 1e-2), losses=("lovasz",))
    runs = plans.sweep(plan, "gsm8k")
    assert {run.seed for run in runs} == {0}
    found = [(0.1, 2.0), (0.2, 3.0), (0.19, 2.5)]
    lines = {
        run: {"validation": {"examples": rows, "exact_match": exact, "nll": nll}}
        for run, (exact, nll) in zip(runs, found, strict=True)
    }
    assert plans.best_rate(plan, lines, "gsm8k", "lovasz") == chosen
    lines[runs[0]]["validation"]["nll"] = math.nan  # this one diverged
    assert plans.best_rate(plan, lines, "gsm8k", "lovasz") == 1e-2
    assert plans.sweep(make_plan(rates=(1e-4,)), "gsm8k") == []


def test_the_clock_counts_what_is_left():
    import plans
    import run

    plan = make_plan(datasets=("gsm8k", "mathqa"), losses=("cross_entropy", "lovasz"), rates=(1e-4, 1e-3))
    clock = run.Clock(plan)
    # Untrained, 4 runs of the sweep, 2 final ones that it has trained, and 4 of the other seeds; twice.
    assert clock.todo.total() == 22
    assert clock.left() == ""
    clock.count(("sweep", "gsm8k"), 600.0)
    assert clock.left() == ", about 3.5 hours left"  # 21 of 10 minutes
    clock.count(("untrained", "gsm8k"), 0.0)
    clock.count(("untrained", "mathqa"), None)  # found among the results
    for name in "gsm8k", "mathqa":
        for one in plans.finals(plan, name, dict.fromkeys(plan.losses, 1e-4)):
            clock.count((run.stage_of(plan, "final", one), name), 60.0)
    assert clock.left() == ", about 70 min left"


def config(run, name="gsm8k", model="llama", tied=True, on_gpu=False, work=Path("work"), **changes):
    import tasks
    import training

    data = tasks.Data(gsm8k(20), [], [], work / "rows.jsonl", "digest", "inputs", {})
    about = SimpleNamespace(model_type=model, tie_word_embeddings=tied)
    task = tasks.task(name)
    return training.config_of(
        run, make_plan(**changes), task, data, "model", about, {"eos_token": "</s>"}, on_gpu
    ), data


def test_losses_differ_in_objective_and_rate_alone():
    import plans

    one, _ = config(plans.Run("gsm8k", "cross_entropy", 1, 1e-4))
    other, _ = config(plans.Run("gsm8k", "lovasz", 1, 1e-3))
    assert {key for key in one | other if one.get(key) != other.get(key)} == {"cv_loss", "learning_rate"}
    assert other["cv_loss"] == plans.objective("lovasz")


def test_config_is_the_recipe_of_the_paper():
    import plans

    found, _ = config(plans.Run("gsm8k", "lovasz", 1, 1e-4))
    assert found["max_steps"] == 100  # 10 epochs of 20 rows in batches of 2
    assert found["warmup_steps"] == 10  # 500 in the recipe, but never more than a tenth
    assert (found["lora_r"], found["lora_alpha"], found["lora_dropout"], found["weight_decay"]) == (8, 16, 0.05, 0.01)
    assert found["lora_target_linear"] is True
    untied, _ = config(plans.Run("gsm8k", "lovasz", 1, 1e-4), tied=False, on_gpu=True)
    assert "lm_head" in untied["lora_target_modules"]
    assert "lora_target_linear" not in untied
    assert untied["bf16"] == "auto"
    short, _ = config(plans.Run("gsm8k", "lovasz", 1, 1e-4), steps=7, batch=4)
    assert (short["max_steps"], short["warmup_steps"], short["micro_batch_size"]) == (7, 0, 4)


def test_a_run_has_the_same_name_in_other_places_and_another_with_other_settings(tmp_path):
    import plans
    import training

    run = plans.Run("gsm8k", "generalized_dice:reference", 1, 1e-4)

    def name(**changes):
        found, data = config(run, **changes)
        return training.name_of(run, found, "model", data)

    assert name() == name(work=tmp_path)
    assert name().startswith("gsm8k-generalized_dice-reference-seed1-lr0.0001-")
    assert len({name(), name(steps=7), name(batch=4), name(tied=False)}) == 4


def test_models_in_folders_of_one_name_are_told_apart(tmp_path):
    import training

    for part, weights in ("a", b"1"), ("b", b"2"), ("c", b"1"):
        (tmp_path / part / "final").mkdir(parents=True)
        (tmp_path / part / "final" / "config.json").write_text("{}")
        (tmp_path / part / "final" / "model.safetensors").write_bytes(weights)
    one, other, same = (training.weights_of(str(tmp_path / part / "final")) for part in "abc")
    assert one == same != other
    assert training.weights_of("owner/model") == "owner/model"


def test_axolotl_accepts_the_configs(tmp_path):
    pytest.importorskip("axolotl")
    import plans
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    machine = {"bf16": False, "fp8": False, "tf32": False, "n_gpu": 1, "compute_capability": None}
    for name in "gsm8k", "mathqa", "openbookqa", "hellaswag":
        raw, _ = config(plans.Run(name, "generalized_dice:reference", 1, 1e-4), name=name, steps=7)
        raw = {**raw, "output_dir": "out", "dataset_prepared_path": "prepared"}
        cfg = DictDefault(raw)
        prepare_plugins(cfg)
        cfg = validate_config(cfg, capabilities=machine, env_capabilities={"torch_version": "2.13.0"})
        assert cfg["max_steps"] == 7
        assert cfg["cv_loss"]["reference"] is True
        assert not any(cfg[key] for key in raw if key.startswith("lora_") and key.endswith("_kernel"))


# Answers


@pytest.fixture
def tiny(tmp_path):
    """The model and the data of --smoke."""
    import tiny
    from answers import load_model, load_tokenizer
    from transformers import AutoConfig

    model, data = tiny.make(tmp_path)
    for name in "model", "problems":  # of the demo
        sys.modules.pop(name, None)
    tokenizer = load_tokenizer(str(model), AutoConfig.from_pretrained(model))
    return SimpleNamespace(model=load_model(str(model), None, "cpu"), tokenizer=tokenizer, folder=model, data=data)


@pytest.fixture
def pairs(tiny):
    import tasks

    return [tasks.task("gsm8k").example(json.loads(line)) for line in (tiny.data / "gsm8k_test.jsonl").open()][:6]


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


# Lines, table, headline


def line(loss, seed, exact, nll=1.0, valid=None, stage="final", **more):
    return {
        "stage": stage,
        "run": f"{loss}-{seed}",
        "model": "small",
        "dataset": "openbookqa",
        "train_examples": 100,
        "steps": 50,
        "batch": 2,
        "validation_examples": 20,
        "test_examples": 40,
        "new_tokens": 4,
        "rates": "0.001",
        "sweep_seed": None,
        "device": "cpu",
        "inputs": "digest",
        "loss": loss,
        "seed": seed,
        "lr": 1e-3,
        "validation": {"exact_match": exact if valid is None else valid, "nll": nll},
        "test": {"exact_match": exact, "nll": nll},
        "exact_match": exact,
        "nll": nll,
        **more,
    }


def results():
    """Lovasz is the best on the test set, focal on the validation rows."""
    exact = {
        "cross_entropy": (0.20, 0.30, 0.25),
        "focal": (0.25, 0.30, 0.35),
        "generalized_dice": (0.20, 0.20, 0.20),
        "self_adjusting_dice": (0.25, 0.35, 0.30),
        "lovasz": (0.30, 0.35, 0.40),
    }
    lines = [line(None, None, 0.1, stage="untrained")]
    for loss, values in exact.items():
        lines += [line(loss, seed, value, valid=0.5 if loss == "focal" else 0.3) for seed, value in enumerate(values)]
    return lines


def test_paired_test():
    import summary

    (setting,) = summary.settings(results())
    assert setting.differences("lovasz") == pytest.approx([0.10, 0.05, 0.15])
    # By hand: mean 0.1, standard error 0.05 / sqrt(3), t = 3.464 at 2 degrees of freedom: p = 1 - t / sqrt(t^2 + 2).
    assert summary.paired_p(setting.differences("lovasz")) == pytest.approx(1 - 3.4641 / (14**0.5), abs=1e-4)
    assert summary.paired_p([0.1]) is None
    assert summary.paired_p([0.0, 0.0]) == 1
    assert summary.paired_p([0.5, 0.5]) is None
    assert summary.paired_p([4 / 80 - 1 / 80, 5 / 80 - 2 / 80, 3 / 80]) is None  # equal but for rounding
    assert summary.mean_and_error([0.2, 0.4]) == pytest.approx((0.3, 0.1))


def test_headline_as_in_the_paper_and_the_honest_one():
    import summary

    (setting,) = summary.settings(results())
    assert setting.headline() == {"test": "lovasz", "validation": "focal"}
    assert setting.gain("lovasz") == pytest.approx(0.4)
    assert setting.gain("focal") == pytest.approx(0.2)
    text = summary.markdown(results())
    assert "| openbookqa, small | lovasz: +40% | focal: +20% |" in text
    other = [{**line, "dataset": "gsm8k"} for line in results()]
    assert "| mean where it is defined | +40% | +20% |" in summary.markdown(results() + other)
    assert "| lovasz | 0.001 | 3 | 30.0 ± 0.0 | 35.0 ± 2.9 | +10.0 ± 2.9 | 0.07 | 1.000 ± 0.000 |" in text
    assert "| untrained |  |  | 10.0 | 10.0 |" in text


def test_there_is_no_headline_before_all_four_losses_have_every_seed():
    import summary

    without = [line for line in results() if (line["loss"], line["seed"]) != ("generalized_dice", 2)]
    text = summary.markdown(without)
    assert "| generalized_dice | 0.001 | 2 |" in text
    assert "Relative gain" not in text


def test_a_gain_over_nothing_is_not_defined():
    import summary

    lines = [{**line, "exact_match": 0.0} if line["loss"] == "cross_entropy" else line for line in results()]
    assert "| openbookqa, small | lovasz: not defined | focal: not defined |" in summary.markdown(lines)


def test_settings_are_not_mixed():
    import summary

    longer = [{**line, "steps": 500} for line in results()]
    assert len(summary.settings(results() + longer)) == 2
    for other in {"inputs": "another model in a folder of this name"}, {"sweep_seed": 3}, {"device": "cuda"}:
        assert len(summary.settings(results() + [{**line, **other} for line in results()])) == 2
    assert summary.markdown([]) == "No finished runs yet.\n"


def test_a_torn_line_is_left_out_and_the_next_one_is_whole(tmp_path):
    import summary

    path = tmp_path / "runs.jsonl"
    first, second = results()[:2]
    summary.append(path, first)
    with path.open("a") as file:
        file.write(json.dumps(second)[:40])
    assert summary.read(path) == [first]
    summary.append(path, second)
    assert summary.read(path) == [first, second]


def test_report_from_the_lines_alone(tmp_path, monkeypatch, capsys):
    import run
    import summary

    for one in results():
        summary.append(tmp_path / "runs.jsonl", one)
    monkeypatch.setattr(sys, "argv", ["run.py", "--report", f"--results={tmp_path}"])
    run.main()
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    assert (tmp_path / "exact_match.png").stat().st_size > 5000


def test_the_committed_table_is_that_of_the_committed_lines():
    import summary

    folder = FOLDER / "results"
    assert (folder / "table.md").read_text() == summary.markdown(summary.read(folder / "runs.jsonl"))


def test_the_committed_rates_follow_the_rule():
    import plans
    import summary

    lines = summary.read(FOLDER / "results" / "runs.jsonl")
    found = summary.settings(lines)
    for setting in found:
        about = setting.about
        swept = {
            plans.Run(line["dataset"], line["loss"], line["seed"], line["lr"]): line
            for line in lines
            if line["stage"] == "sweep" and all(line[name] == about[name] for name in summary.SETTING)
        }
        plan = make_plan(rates=tuple(map(float, about["rates"].split())))
        for loss in setting.losses:
            rate = plans.best_rate(plan, swept, about["dataset"], loss)
            assert set(setting.values(loss, lambda line: line["lr"])) == {rate}
    assert found


# Options, and the task files of lm-evaluation-harness


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quick"], "--model is needed"),
        ([], "one of the arguments"),
        (["--quick", "--model=m", "--losses", "lovas"], "lovasz"),
        (["--quick", "--model=m", "--datasets", "gsm"], "invalid choice"),
        (["--quick", "--model=m", "--valid", "0"], "0 is less than 1"),
        (["--quick", "--model=no/such/folder"], "--model no/such/folder: there is no such folder"),
        (["--quick", "--model=/nowhere"], "--model /nowhere: there is no such folder"),
    ],
)
def test_wrong_options(options, message, monkeypatch, capsys):
    import run

    monkeypatch.setattr(sys, "argv", ["run.py", *options])
    with pytest.raises((SystemExit, ValueError)) as caught:
        run.main()
    assert message in str(caught.value) + capsys.readouterr().err


def test_missing_rows_are_told_without_a_traceback(request, tmp_path, monkeypatch):
    import run  # before the tiny model, whose demo has a module of that name, too

    tiny = request.getfixturevalue("tiny")
    empty = tmp_path / "empty"
    empty.mkdir()
    options = f"--quick --model {tiny.folder} --data {empty} --work {tmp_path} --results {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["run.py", *options.split()])
    with pytest.raises(SystemExit, match=r"no gsm8k_train\.jsonl"):
        run.main()


def test_options_change_the_plan(monkeypatch):
    import run

    options = "--full --model m --seeds 4 5 --rates 1e-3 --train 9 --losses lovasz dice --datasets mathqa"
    monkeypatch.setattr(sys, "argv", ["run.py", *options.split()])
    plan = run.plan_of(run.arguments())
    assert (plan.seeds, plan.rates, plan.train, plan.losses) == ((4, 5), (1e-3,), 9, ("lovasz", "dice"))
    assert (plan.datasets, plan.batch) == (("mathqa",), 8)


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
