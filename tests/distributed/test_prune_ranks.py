"""``prune`` in two processes: all draw the same, each example has its own weight, and resuming changes nothing."""

import json
import math

import pytest

COUNT = 43  # of prune_ranks.py

KEY = {"cross_entropy": 1.0, "prune": {"share": 0.8, "until": 0.8}}
PLAIN = {"arguments": {}, "library": True, "flattened": False, "sharded": False, "resume": 8}
CASES = {
    "filled": PLAIN,
    "dropped": {**PLAIN, "arguments": {"dataloader_drop_last": True}, "library": False, "resume": 3},
    "workers, flattened": {
        **PLAIN,
        "arguments": {"dataloader_num_workers": 2, "train_sampling_strategy": "group_by_length"},
        "flattened": True,
        "resume": 6,
    },
    "FSDP2": {**PLAIN, "sharded": True},
}
STEP = 8  # examples: two micro-batches of two on two ranks


@pytest.mark.hosts
@pytest.mark.parametrize(
    "names",
    [["filled"], *(pytest.param(names, marks=pytest.mark.matrix) for names in ([*CASES][1:-1], ["FSDP2"]))],
    ids=str,
)
def test_two_ranks(names, start_processes, tmp_path):
    files, cases = (tmp_path / "cases.json", tmp_path / "found.json"), {name: CASES[name] for name in names}
    files[0].write_text(json.dumps([{**case, "cv_loss": KEY} for case in cases.values()]))
    start_processes(2, "prune_ranks.py", *files)
    for (name, case), found in zip(cases.items(), json.loads(files[1].read_text()), strict=True):
        check(found["whole"], drops=case["arguments"].get("dataloader_drop_last", False))
        one, two = found["again"]["ranks"], found["whole"]["ranks"]
        assert [rank["model"] for rank in one] == [rank["model"] for rank in two], name
        assert found["again"]["logs"] == found["whole"]["logs"], name


def check(run, drops):
    ranks = run["ranks"]
    assert ranks[0]["model"] == ranks[1]["model"]
    steps = 0
    for number, epochs in enumerate(zip(*(rank["epochs"] for rank in ranks), strict=True)):
        seen = [tuple(example) for epoch in epochs for example in epoch["examples"]]
        losses = epochs[0]["losses"]
        assert str(losses) == str(epochs[1]["losses"])  # of NaN too
        numbers = [example for example, _ in seen]
        known = [loss for loss in losses if not math.isnan(loss)]
        well = {i for i, loss in enumerate(losses) if known and loss < math.fsum(known) / len(known)}
        stay = math.ceil((COUNT - int(0.8 * len(well))) / STEP) * STEP - (COUNT - len(well))
        if number in (0, 3) or stay >= len(well):
            assert {weight for _, weight in seen} == {1.0}
            assert len(set(numbers)) == (COUNT // STEP * STEP if drops else COUNT)
            steps += run["whole"]
            continue
        assert len(numbers) == len(set(numbers)) == COUNT - len(well) + stay
        assert set(numbers) >= set(range(COUNT)) - well
        for example, weight in seen:
            assert weight == pytest.approx(len(well) / stay if example in well else 1.0)
        assert len(epochs[0]["examples"]) == len(epochs[1]["examples"])
        steps += len(numbers) // STEP
    assert number == 3
    assert run["steps"] == steps < 4 * run["whole"]
    assert run["logs"][-1]["cv_loss/prune/left_out"] == pytest.approx(1 - steps / (4 * run["whole"]))
