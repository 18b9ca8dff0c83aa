"""The engine on a CUDA device: is it right, and what does it cost beside others' losses.

    make bench-gpu
    python benchmarks/gpu.py --only cases,memory   # some parts
    python benchmarks/gpu.py --minutes 9           # no further job after so long; the next call goes on

Parts: check (against float64; no other begins where it fails), cases (time of heads and losses), waits (of the host for
the device), memory, kernels (over blocks and warps), chunks (one or several), step (of training a model with random
weights). A job is a process; its lines are written when it ends, and are not measured again on the same card with the
same versions. Needs PyTorch, Triton and transformers, and of what the package needs besides annotated-types, pluggy and
pydantic, which may lie in .gpu-packages. Peers that are not installed are left out.
"""

import argparse
import csv
import json
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))
sys.path.append(str(REPOSITORY / ".gpu-packages"))  # the machine's own come first

import torch  # noqa: E402

try:
    from gpu_parts import PARTS, WRONG, Size, jobs
except ModuleNotFoundError as error:
    sys.exit(f"benchmarks/gpu.py: {error}; `make .gpu-packages` puts what a bare machine lacks into a folder")

COLUMNS = ("part", "head", "mix", "trained", "rows", "way", "ms", "low", "high", "peak_mib", "figure", "unit", "note")
ABOUT = ("card", "driver", "torch", "triton", "transformers", "job")


def machine():
    """Card and versions, as they stand in each line."""
    found = {"torch": torch.__version__}
    for name in ("triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    if not torch.cuda.is_available():
        return {"card": "cpu", "driver": "", **found}
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {"card": torch.cuda.get_device_name(), "driver": driver, **found}


def written(path, about):
    """The lines that stand, and of which jobs they are: those of this machine that did not fail."""
    if not path.exists():
        return [], set()
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    same = [line for line in lines if all(line[name] == value for name, value in about.items())]
    return lines, {line["job"] for line in same} - {line["job"] for line in same if line["note"].startswith(WRONG)}


def line_of(part, arguments, size, found):
    """A line of the table, with what the arguments of its part say."""
    names = {"check": ("head", "unit", "trained"), "step": ("head",)}.get(part, ("head", "mix", "trained"))
    given = {name: value for name, value in zip(names, arguments, strict=False) if name != "unit"}
    rows = size.batch * size.length if part == "step" else size.rows
    if part == "check":
        found = found | {"way": f"{found['way']}, {arguments[1]}"}
    return {"part": part, "rows": rows, "note": "", **given, **found}


def name_of(job, size):
    return json.dumps([*job, vars(size)])


def run(job, size, about, limit):
    """The lines of a job in a process of its own, and whether it went well."""
    part, arguments = job
    named = name_of(job, size)
    command = [sys.executable, __file__, "--job", named]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
        error = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        found = json.loads(done.stdout.splitlines()[-1]) if not done.returncode else []
    except subprocess.TimeoutExpired:
        error, found = [f"not done after {limit:.0f} s"], []
    lines = [line_of(part, arguments, size, x) | about | {"job": named} for x in found]
    return lines, "; ".join(error)


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, (*COLUMNS, *ABOUT))
        table.writeheader()
        table.writerows(lines)


def told(line):
    figures = [f"{line['ms']} ms ({line['low']} to {line['high']})"] if line.get("ms") else []
    figures += [f"{line['peak_mib']} MiB"] if line.get("peak_mib") not in (None, "") else []
    figures += [f"{line['figure']} {line['unit']}"] if "figure" in line else []
    figures += [line["note"]] if line["note"] else []
    what = " ".join(str(line[name]) for name in ("part", "head", "mix", "trained") if line.get(name, "") != "")
    return f"{what}, {line['way']}: {', '.join(figures)}"


def main():
    options = parse()
    if options.job:
        part, arguments, size = json.loads(options.job)
        print(json.dumps(list(PARTS[part](Size(**size), *arguments))))
        return
    about = machine()
    if about["card"] == "cpu" and not options.smoke:
        sys.exit("benchmarks/gpu.py: no CUDA device; --smoke runs all parts on a CPU, in a tiny form")
    size = Size(32, 2, 2, 16) if options.smoke else Size(options.rows, options.rounds, options.batch, options.length)
    lines, done = written(options.out, about)
    parts = options.only.split(",") if options.only else list(PARTS)
    wanted = [job for job in jobs(options.smoke, "smoke" if options.smoke else options.model) if job[0] in parts]
    wanted = [job for job in wanted if options.again or name_of(job, size) not in done]
    start, failed, left = time.monotonic(), [], 0
    for job in wanted:
        rest = 60 * options.minutes - (time.monotonic() - start)
        if rest < 30:
            left += 1
            continue
        found, error = run(job, size, about, min(rest, 300))
        for line in found:
            print(told(line), flush=True)
        if error:
            print(f"FAILED {json.dumps(job)}: {error}", flush=True)
        if found:
            same = about | {"job": name_of(job, size)}  # what stands of this job; other cards keep theirs
            lines = [line for line in lines if any(line[name] != value for name, value in same.items())] + found
            write(options.out, lines)
        if error or any(line["note"].startswith(WRONG) for line in found):
            failed.append(job)
            if job[0] == "check":
                sys.exit("benchmarks/gpu.py: the check against float64 failed; what is wrong is not measured")
    draw(options.out)
    print(f"Written: {options.out}. {len(failed)} jobs failed, {left} are left for another call.")
    sys.exit(1 if failed else 0)


def draw(path):
    """The figure, where there is something to draw it with; `python benchmarks/gpu_report.py` draws it elsewhere."""
    from gpu_report import figure, lines_of

    try:
        figure(lines_of(path), path.with_suffix(".png"))
    except ImportError as error:
        print(f"No figure: {error}")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts, with commas between them")
    parser.add_argument("--minutes", type=float, default=60, help="no job begins later than half a minute before")
    parser.add_argument("--again", action="store_true", help="what has been measured too")
    parser.add_argument("--model", default="1b", choices=["1b", "3b"], help="of the training step")
    for name, value in vars(Size()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--smoke", action="store_true", help="everything in a tiny form on whatever device there is")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "gpu.csv")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.only.split(",")) - {"", *PARTS}:
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return options


if __name__ == "__main__":
    main()
