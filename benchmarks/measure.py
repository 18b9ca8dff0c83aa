"""Seconds and peak memory of one case, in a process that does nothing else; and the processes, round after round."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cases import Case, Data, Settings, all_cases, describe, make_data

Record = dict[str, Any]


def measure(name: str, settings: Settings, repeats: int) -> Record:
    """Peak memory of a first run of forward and backward, and seconds of ``repeats`` further ones.

    Memory counts from the inputs upwards, gradients included.
    """
    case = all_cases(settings.device)[name]
    # Libraries are loaded and threads started by a run that is too small to leave memory behind.
    tiny = dataclasses.replace(settings, rows=8, vocab=64)
    run(make := make_data(tiny, case.frozen, case.rows is not None), case.prepare(make))
    data = case_data(case, settings)
    peak = Peak(settings.device)
    step = case.prepare(data)
    loss = run(data, step)
    memory = peak.bytes()
    seconds = [timed(settings.device, data, step) for _ in range(repeats)]
    return {"seconds": seconds, "bytes": memory, "loss": loss}


def case_data(case: Case, settings: Settings) -> Data:
    if case.rows is not None:
        rows = min(case.rows, settings.rows)
        settings = dataclasses.replace(settings, rows=rows, document_rows=rows)
    return make_data(settings, case.frozen, case.rows is not None)


def run(data: Data, step: Callable[[], torch.Tensor | None]) -> float | None:
    """Forward and backward; the value of the loss, where the step has one."""
    loss = step()
    if loss is None:
        return None
    loss.backward()
    assert all(tensor.grad is not None for tensor in data.inputs() if tensor.requires_grad)
    return float(loss.detach())


def timed(device: str, data: Data, step: Callable[[], torch.Tensor | None]) -> float:
    for tensor in data.inputs():
        tensor.grad = None
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        run(data, step)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    run(data, step)
    return time.perf_counter() - start


class Peak:
    """The most memory in use since this was made, above what was in use then.

    On a CPU it is the resident memory of the process, whose high-water mark Linux allows to be reset.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # or memory freed before could be used again unnoticed
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _status("VmRSS")

    def bytes(self) -> int:
        return (torch.cuda.max_memory_allocated() if self.on_gpu else _status("VmHWM")) - self.before


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found.group(1))


@dataclasses.dataclass
class Job:
    """A case to measure; the case "data" describes the data instead."""

    case: str
    settings: Settings
    repeats: int = 1

    def run(self) -> Record:
        if self.case == "data":
            return describe(self.settings)
        return measure(self.case, self.settings, self.repeats)

    def run_in_process(self) -> Record:
        command = [sys.executable, str(Path(__file__)), json.dumps(dataclasses.asdict(self))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{self.case} ({self.settings}) failed:\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def rounds(jobs: Sequence[Job], count: int) -> list[Record]:
    """Every job once, then once more, and so on: what slows the machine down for a while hits all of them."""
    records = []
    for number in range(1, count + 1):
        for job in jobs:
            record = {"case": job.case, "round": number, **job.run_in_process()}
            records.append({**record, "rows": job.settings.rows, "vocab": job.settings.vocab})
            seconds, megabytes = min(record["seconds"]), record["bytes"] / 1e6
            print(f"round {number} of {count}  {seconds:9.4f} s {megabytes:9.1f} MB  {job.case}", flush=True)
    return records


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps(Job(job["case"], Settings(**job["settings"]), job["repeats"]).run()))
