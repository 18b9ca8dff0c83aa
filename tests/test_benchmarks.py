"""The benchmarks at a tiny size: what they compare computes the same, and what they write is complete."""

import csv
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import cases  # noqa: E402
import gpu  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_report  # noqa: E402
import loss_cost  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
import statistics_cost  # noqa: E402
import training_step  # noqa: E402

SETTINGS = cases.Settings(300, 32, 400, "float32", "cpu", "trained", 64)  # the last document is shorter
SHAPE = ["--device=cpu", "--rows=96", "--hidden=16", "--vocab=200", "--document-rows=32"]
MIX = "0.6 cross_entropy + 0.4 generalized_dice"

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory on a CPU is read from /proc")


@pytest.fixture
def in_process(monkeypatch):
    """Measure in this process: a process for each case takes seconds to start."""
    monkeypatch.setattr(measure.Job, "run_in_process", measure.Job.run)


@pytest.fixture
def bench(monkeypatch, tmp_path, in_process):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["loss_cost.py", *SHAPE, f"--out={tmp_path}", *arguments])
        loss_cost.main()
        return tmp_path

    return run


def test_losses_of_all_logits_beside_cross_entropy(monkeypatch, tmp_path):
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["statistics_cost.py", "--rows=4", "--rounds=2", f"--out={tmp_path}"])
    try:
        statistics_cost.main()
    finally:
        torch.set_num_threads(threads)
    with (tmp_path / "statistics_cost_cpu.csv").open() as file:
        rows = {row["loss"]: row for row in csv.DictReader(file)}
    assert float(rows["cross_entropy"]["ratio"]) == 1
    assert {"asymmetric", "gem", "sparsemax", "idft"} < rows.keys()
    assert not {"focal", "dice", "ldam"} & rows.keys()
    assert all(float(row["ratio_min"]) <= float(row["ratio"]) <= float(row["ratio_max"]) for row in rows.values())


@linux
@pytest.mark.parametrize("name", cases.all_cases("cpu"))
def test_every_case(name):
    result = measure.measure(name, SETTINGS, repeats=2)
    assert len(result["seconds"]) == 2
    assert min(result["seconds"]) > 0
    assert result["bytes"] >= 0
    assert result["loss"] is None if name.startswith("floor") else math.isfinite(result["loss"])


def value(name, settings=SETTINGS):
    case = cases.all_cases("cpu")[name]
    data = measure.case_data(case, settings)
    return measure.run(data, case.prepare(data)), data


@pytest.mark.parametrize("data", cases.DATA)
@pytest.mark.parametrize(
    "names",
    [
        (cases.CROSS_ENTROPY, "F.linear_cross_entropy, chunked", "cross_entropy"),
        ("focal, full logits", "focal"),
        ("generalized_dice, full logits", "generalized_dice"),
        (f"{MIX}, full logits", MIX),
        (cases.CLASS_LOOP, "lovasz, on 512 rows of logits"),
    ],
    ids=lambda names: names[-1],
)
def test_what_is_compared_computes_the_same(names, data):
    settings = cases.Settings(**{**vars(SETTINGS), "data": data})
    names = [name for name in names if name in cases.all_cases("cpu")]
    (first, data), *others = [value(name, settings) for name in names]
    for other, its_data in others:
        assert other == pytest.approx(first, rel=2e-5)
        for mine, its in zip(data.inputs(), its_data.inputs(), strict=True):
            torch.testing.assert_close(its.grad, mine.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.slow
def test_liger_is_called_rightly():
    """Through Triton's interpreter, which must be asked for before Triton is imported."""
    code = f"""
import sys; sys.path.insert(0, {str(FOLDER)!r})
from cases import *
settings = Settings(24, 16, 60, "float32", "cpu", "trained", 24)
for prepare in full_logits(cross_entropy), liger:
    print(float(prepare(make_data(settings))()))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    expected, found = map(float, done.stdout.split()[-2:])
    assert found == pytest.approx(expected, rel=1e-5)


def test_data_as_of_a_trained_model():
    settings = cases.Settings(1500, 256, 8000, "float32", "cpu", "trained", 1500)
    trained = cases.describe(settings)
    assert 0.4 < trained["mean p of the targets"] < 0.65
    assert 200 < trained["classes in a document"] < 300
    assert 2 < trained["errors that matter to lovasz, a row"] < 20
    random = cases.describe(cases.Settings(**{**vars(settings), "data": "random"}))
    assert random["mean p of the targets"] < 0.01


@linux
def test_peak_memory_counts_what_is_freed_again():
    peak = measure.Peak("cpu")
    torch.ones(40 << 18)  # 40 MB, freed at once
    kept = torch.ones(16 << 18)
    assert 40e6 < peak.bytes() < 50e6
    del kept


def test_ratios_are_those_of_the_moment():
    """A machine twice as slow for a while changes no ratio; one that slows down evenly changes none either."""
    table = {
        "base": cases.Case("peer", None, "base"),
        "half": cases.Case("fused", None, "base", time_limit=0.5, memory_limit=0.2),
    }
    measured = [
        ("base", 2.0),
        ("half", 1.0),
        ("base", 2.0),
        ("base", 4.0),
        ("half", 2.5),
        ("base", 6.0),
        ("base", 2.0),
        ("half", 1.2),
    ]
    records = [
        {"case": name, "seconds": [seconds], "bytes": 100 if name == "base" else 25, "loss": 1.0}
        for name, seconds in measured
    ]
    base, half = report.compare(table, records)
    assert (base["time_ratio"], base["memory_ratio"], base["time_reached"]) == (1, 1, None)
    assert (half["time_ratio"], half["time_ratio_min"], half["time_ratio_max"]) == (0.5, 0.5, 0.6)
    assert (half["seconds"], half["seconds_min"], half["seconds_max"]) == (1.2, 1.0, 2.5)
    assert (half["time_reached"], half["memory_ratio"], half["memory_reached"]) == (True, 0.25, False)


def test_the_base_comes_again_and_again():
    names = list(loss_cost.in_turn(cases.all_cases("cpu")))
    assert set(names) == set(cases.all_cases("cpu"))
    gaps = "".join("b" if name.startswith("F.cross_entropy, full") else "." for name in names).rstrip(".").split("b")
    assert max(map(len, gaps)) == loss_cost.CASES_BETWEEN


@linux
def test_what_is_written(bench, capsys):
    folder = bench("--only=generalized_dice|lovasz|floor", "--rounds=2")
    found = json.loads((folder / "loss_cost_cpu.json").read_text())
    assert {"cpu", "cores", "torch threads", "memory", "date", "torch", "axolotl-cvloss"} <= set(found["machine"])
    assert found["settings"]["rows"] == 96
    assert found["settings"]["data"] == "trained"
    assert 0 < found["data"]["mean p of the targets"] < 1
    names = [row["case"] for row in found["results"]]
    assert {cases.CROSS_ENTROPY, cases.CROSS_ENTROPY + cases.FROZEN, cases.CLASS_LOOP, MIX} <= set(names)
    turn = list(loss_cost.in_turn({name: cases.all_cases("cpu")[name] for name in names}))
    assert [record["case"] for record in found["records"]] == 2 * turn  # round after round
    with (folder / "loss_cost_cpu.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["case"] for line in lines] == names
    for line in lines:
        assert float(line["seconds_min"]) <= float(line["seconds"]) <= float(line["seconds_max"])
        assert float(line["time_ratio"]) > 0
        assert line["torch"] == torch.__version__
    assert {line["case"]: line["time_limit"] for line in lines}[MIX] == "1.25"
    assert (folder / "loss_cost_cpu.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert all(name.removesuffix(cases.FROZEN) in printed for name in names)

    bench("--only=^generalized_dice$", "--rounds=1", "--add")
    more = json.loads((folder / "loss_cost_cpu.json").read_text())
    assert more["records"][: len(found["records"])] == found["records"]
    assert [row["case"] for row in more["results"]] == names
    rounds = {row["case"]: row["rounds"] for row in more["results"]}
    assert (rounds["generalized_dice"], rounds[MIX]) == (3, 2)
    with pytest.raises(SystemExit, match=r"loss_cost_cpu\.json is of another rows: 96, not 64"):
        bench("--only=^generalized_dice$", "--rounds=1", "--add", "--rows=64")


@linux
def test_check_ends_with_an_error_where_memory_is_above_its_limit(bench):
    """At this size there is a single chunk, so a fused loss needs much of what full logits need."""
    bench("--only=^focal$", "--rounds=1", "--rows=2000", "--vocab=4000", "--hidden=8")
    with pytest.raises(SystemExit, match="memory limits missed: focal"):
        bench("--only=^focal$", "--rounds=1", "--rows=2000", "--vocab=4000", "--hidden=8", "--check")


@linux
def test_growth(bench, monkeypatch):
    monkeypatch.setattr(loss_cost, "GROWTH_ROWS", [32, 64])
    monkeypatch.setattr(loss_cost, "GROWTH_ROWS_OF_VOCAB", 32)
    monkeypatch.setattr(loss_cost, "GROWTH_VOCAB", [100, 400])
    folder = bench("--growth", "--rounds=1")
    with (folder / "growth_cpu.csv").open() as file:
        lines = list(csv.DictReader(file))
    found = {(int(line["rows"]), int(line["vocab"]), int(line["repeats"])) for line in lines}
    assert found == {(32, 100, 4), (64, 100, 2), (32, 400, 1)}  # the same work at every point
    assert len(lines) == 3 * len(loss_cost.GROWTH_CASES)
    assert all(float(line["seconds"]) > 0 for line in lines)
    assert (folder / "growth_cpu.png").stat().st_size > 10_000


@linux
def test_each_case_in_a_process_of_its_own(tmp_path):
    """The command itself, with one case."""
    command = [sys.executable, FOLDER / "loss_cost.py", *SHAPE, f"--out={tmp_path}", "--rounds=1"]
    only = f"--only=^{cases.CROSS_ENTROPY}$"
    done = subprocess.run([*command, only], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "round 1 of 1" in done.stdout
    assert len(json.loads((tmp_path / "loss_cost_cpu.json").read_text())["results"]) == 1


def test_a_case_that_fails_ends_the_run():
    job = measure.Job("no such case", SETTINGS)
    with pytest.raises(SystemExit, match="no such case"):
        job.run_in_process()


def test_limits_of_the_issue():
    """Of losses and mixtures by family, on a CPU; singles of set-level losses have none."""
    table = cases.all_cases("cpu")

    def limits(name):
        return table[name].time_limit, table[name].memory_limit

    assert limits("focal") == limits("0.6 cross_entropy + 0.4 focal") == (0.95, 0.20)
    assert limits(MIX) == (1.25, 0.25)
    assert limits("0.6 cross_entropy + 0.4 lovasz") == (1.35, 0.30)
    assert limits(f"0.6 cross_entropy + 0.4 lovasz{cases.FROZEN}") == (1.00, 0.20)
    assert limits("lovasz") == limits("generalized_dice") == (None, None)
    assert limits("lovasz, on 512 rows of logits") == (0.02, None)
    assert table[f"cross_entropy{cases.FROZEN}"].base == cases.CROSS_ENTROPY + cases.FROZEN


def test_steps_are_compared_on_the_same_batch():
    def run(*seconds, size):
        return {"seconds": list(seconds), "tokens": [10, 30], "bytes": size}

    runs = {
        training_step.HOST: [run(1.0, 3.0, size=100), run(2.0, 6.0, size=100)],
        training_step.PLUGIN: [run(1.1, 3.3, size=90), run(2.2, 6.6, size=90)],
    }
    host, plugin = training_step.compare(runs)
    assert host["tokens_per_second"] == pytest.approx(80 / 12)
    assert (host["time_ratio"], host["memory_ratio"]) == (1, 1)
    assert (plugin["time_ratio"], plugin["memory_ratio"]) == (pytest.approx(1.1), 0.9)
    runs[training_step.PLUGIN][0]["tokens"] = [10, 31]
    with pytest.raises(AssertionError, match="same batches"):
        training_step.compare(runs)


@linux
@pytest.mark.slow
@pytest.mark.hosts
def test_training_step(tmp_path):
    pytest.importorskip("axolotl")
    command = [sys.executable, FOLDER / "training_step.py", "--tiny", "--steps=4", "--repeats=1", "--batch=1"]
    done = subprocess.run([*command, f"--out={tmp_path}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (written,) = tmp_path.glob("training_step_*.json")
    rows = json.loads(written.read_text())["results"]
    assert [row["case"] for row in rows] == [training_step.HOST, training_step.PLUGIN]
    assert all(row["seconds"] > 0 and row["tokens_per_second"] > 0 and row["bytes"] > 1e8 for row in rows)


# On a GPU


def bench_gpu(out, *arguments):
    command = [sys.executable, FOLDER / "gpu.py", f"--out={out}", *arguments]
    environment = {**os.environ, "CVLOSS_KERNELS": "on", "TRITON_INTERPRET": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_benchmark_for_gpus_runs_on_a_cpu_in_a_tiny_form(tmp_path):
    out = tmp_path / "gpu.csv"
    done = bench_gpu(out, "--smoke")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "FAILED" not in done.stdout
    with out.open() as file:
        lines = list(csv.DictReader(file))
    assert {line["part"] for line in lines} == set(gpu_parts.PARTS)
    for line in lines:
        if line["way"].startswith("ours") or line["way"] in (gpu_parts.FULL, gpu_parts.PRODUCTS, "host"):
            assert not line["note"]
            assert line["ms"] or line["figure"] or line["part"] == "memory"
    again = bench_gpu(out, "--smoke")
    assert again.stdout == f"Written: {out}. 0 jobs failed, 0 are left for another call.\n"


def test_it_goes_on_where_a_call_was_cut_off(tmp_path, monkeypatch, capsys):
    """Jobs that are written are not done again, but for those whose numbers were wrong, or on another card."""
    out, ran, bad = tmp_path / "gpu.csv", [], {"a": gpu_parts.WRONG, "b": "killed"}

    def run(job, size, about, limit):
        name = job[1][0]
        ran.append(name)
        line = {"part": job[0], "way": "ours", "note": bad.pop("a", "") if name == "a" else ""}
        killed = bad.pop("b", "") if name == "b" else ""
        return [] if killed else [line | about | {"job": gpu.name_of(job, size)}], killed

    monkeypatch.setattr(gpu, "jobs", lambda smoke, model: [("cases", [name, "token", True]) for name in "abc"])
    monkeypatch.setattr(gpu, "run", run)
    for card, expected in (("one", "abc"), ("one", "ab"), ("one", ""), ("other", "abc")):
        del ran[:]
        monkeypatch.setattr(gpu, "machine", lambda card=card: {**dict.fromkeys(gpu.ABOUT[:-1], ""), "card": card})
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", f"--out={out}"])
        with pytest.raises(SystemExit):
            gpu.main()
        assert "".join(ran) == expected
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", f"--out={out}", "--minutes=0", "--again"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "3 are left for another call" in capsys.readouterr().out
    assert len(gpu.written(out, {})[0]) == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(tmp_path):
    done = bench_gpu(tmp_path / "gpu.csv")
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr


def test_what_is_wrong_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_parts, "MIXES", {"token": gpu_parts.MIXES["token"]})
    size, right = gpu_parts.Size(rows=24), gpu_parts.ours
    given = size, "smoke", "float32", True
    assert [line["note"] for line in gpu_parts.check(*given)] == ["", ""]

    def wrong(mix):
        loss = right(mix)
        return lambda hidden, *rest: loss(hidden, *rest) * (1 if hidden.dtype == torch.float64 else 1.001)

    monkeypatch.setattr(gpu_parts, "ours", wrong)
    found = list(gpu_parts.check(*given))
    assert all(line["note"].startswith(gpu_parts.WRONG) for line in found)
    monkeypatch.setattr(gpu, "run", lambda job, *_: ([gpu.line_of(*job, size, x) | {"job": "1"} for x in found], ""))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--smoke", f"--out={tmp_path / 'gpu.csv'}"])
    with pytest.raises(SystemExit, match="check against float64 failed"):
        gpu.main()


def test_the_page_has_what_was_measured_on_a_gpu_and_else_a_model(tmp_path):
    out = tmp_path / "gpu.csv"
    assert gpu_report.described(gpu_report.lines_of(out))[0].startswith("**Not measured on a GPU.**")
    about = dict(zip(gpu.ABOUT, ("H100", "1", "2", "3", "5", ""), strict=True))
    head = {
        "part": "cases",
        "head": "llama",
        "mix": "token",
        "trained": True,
        "rows": 8192,
        "low": 9,
        "high": 11,
        **about,
    }
    lines = [{**head, "way": way, "ms": 10 + i} for i, way in enumerate(("ours", gpu_parts.FULL, gpu_parts.PRODUCTS))]
    lines += [
        {**lines[0], "part": "memory", "ms": "", "peak_mib": 77},
        {**head, "way": "Liger", "note": "wrong version"},
    ]
    lines += [{**about, "part": "step", "mix": "LoRA", "way": "host", "ms": 5, "low": 5, "high": 5, "figure": 99}]
    gpu.write(out, [{**lines[0], "card": "an older one"}, *lines])
    said, (heads, steps) = gpu_report.described(found := gpu_report.lines_of(out))
    assert said.startswith("H100, driver 1, torch 2, Triton 3; bf16, N 8192")
    assert [row[:3] for row in heads[1:]] == [
        ("Llama-3-8B's, trained", "ours (token)", "10"),
        ("Llama-3-8B's, trained", gpu_parts.FULL, "11"),
        ("Llama-3-8B's, trained", gpu_parts.PRODUCTS, "12"),
    ]
    assert heads[1][4] == "77"
    assert steps[1][-1] == "99"
    gpu_report.figure(found, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


# What could be skipped


def test_skipped_columns_are_rounding_in_every_row():
    from skipping import skippable

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 8, generator=generator, dtype=torch.float64)
    logits = 6 * torch.randn(16, 200, generator=generator, dtype=torch.float64)
    p, labels = logits.softmax(1), torch.randint(200, (16,), generator=generator)
    for precision in (2**-9, 2**-24):
        spare = skippable(p, labels, precision)
        others = p.scatter(1, labels[:, None], 0)  # the engine adds the target's column by itself
        error = (others[:, spare] @ weight[spare]).norm(dim=1)
        assert (error <= precision * (1 - p.gather(1, labels[:, None]).squeeze(1)) * weight.norm(dim=1).max()).all()
    assert skippable(p, labels, 2**-9).sum() > skippable(p, labels, 2**-24).sum()
    assert skippable(p, labels, 1.0).sum() >= 199
