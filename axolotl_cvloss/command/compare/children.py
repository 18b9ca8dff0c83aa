"""The processes of a comparison: a module each, whose ``main`` is called as by ``python -m``.

Importing a host takes longer than training a small model, and a run would import it twice: to train and to predict. So
there is one process that imports everything and does nothing else, ``python -m axolotl_cvloss.command.compare.children
MODULE ...``, and runs are forks of it. Not beside a GPU, which a fork cannot use if an import has asked for it, and on
Linux alone, as elsewhere system libraries may not be forked: there a run is a process that imports for itself.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


class Child(Protocol):
    """Leads a group of its own."""

    pid: int

    def poll(self) -> int | None:
        """The code it has ended with, negative for a signal; None as long as it runs."""


class Gone(Exception):
    """The process that runs are forked from has ended."""


def end(child: Child) -> None:
    """With all that it started."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        while child.poll() is None:
            time.sleep(0.01)


def can_fork() -> bool:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    return sys.platform == "linux" and (hidden or not any(map(os.path.exists, GPU_DEVICES)))


def start(module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Child:
    """A process that imports for itself."""
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **environment},
            start_new_session=True,
        )


class Forks:
    """Runs that are forked. One that is not closed ends with this process, and its runs with it.

    log: of what the imports print.
    """

    def __init__(self, modules: Sequence[str], log: Path) -> None:
        with log.open("wb") as out:
            # In a session of its own: a signal for the group is for this process to answer.
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, *modules],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=out,
                start_new_session=True,
            )
        self.lock = threading.Lock()

    def start(self, module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Child:
        log.write_bytes(b"")
        request = {"module": module, "arguments": arguments, "log": str(log.absolute()), "environment": environment}
        return _Fork(self, self.ask(request))

    def ask(self, request: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self.lock:
            try:
                self.process.stdin.write(json.dumps(request).encode() + b"\n")
                self.process.stdin.flush()
                return json.loads(self.process.stdout.readline())
            except (OSError, ValueError) as error:
                raise Gone from error

    def close(self) -> None:
        with self.lock:
            self.process.kill()
            self.process.wait()


class _Fork:
    def __init__(self, forks: Forks, pid: int) -> None:
        self.forks, self.pid = forks, pid
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            try:
                self.code = self.forks.ask(self.pid)
            except Gone:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                self.code = -signal.SIGKILL
        return self.code


def _serve() -> Any:
    """Answer a line with a line: a request with the number of a fork, such a number with its code. Returns in the fork,
    with the request, and when there is nobody to ask any more, with None."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed is no answer
    for module in sys.argv[1:]:
        with contextlib.suppress(Exception):  # the run that needs it will say so
            importlib.import_module(module)
    gc.freeze()  # what was imported is no garbage
    forks: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            ended, status = os.waitpid(request, os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if ended else None
            forks -= {ended}
        else:
            sys.stdout.flush()
            answer = os.fork()
            if not answer:
                answers.close()
                return request
            with contextlib.suppress(OSError):  # one of the two is first
                os.setpgid(answer, answer)
            forks.add(answer)
        print(json.dumps(answer), file=answers, flush=True)
    for fork in forks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(fork, signal.SIGKILL)
    return None


def main() -> None:
    if (request := _serve()) is None:
        return
    os.setpgid(0, 0)
    for place, (file, flags) in enumerate([(os.devnull, os.O_RDONLY), (request["log"], os.O_WRONLY)]):
        os.dup2(os.open(file, flags), place)
    os.dup2(1, 2)
    os.environ.update(request["environment"])
    sys.argv = [request["module"], *request["arguments"]]
    importlib.import_module(request["module"]).main()


if __name__ == "__main__":
    main()
