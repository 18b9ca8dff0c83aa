"""Which rows the experiment trains on, chooses by and scores."""

import json

import pytest
from experiment import FOLDER, gsm8k, hellaswag, mathqa, openbookqa, write

SHARED = FOLDER.parents[2] / "shared" / "data"  # real rows of three of the datasets, where somebody has put them


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
