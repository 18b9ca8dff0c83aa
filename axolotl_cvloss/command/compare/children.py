"""The processes of a comparison: a module each, run as ``python -m`` runs it.

Importing a host takes longer than training a small model, and every run would import it twice: to train and to predict.
So runs are forked from a process that has imported everything and done nothing else. Not beside a GPU, which a fork
cannot use if an import has asked for it; and on Linux alone, as elsewhere system libraries may not be forked. There a
run is a process of its own.
"""

import atexit
import contextlib
import gc
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path


class Child:
    """A process in a group of its own; its output goes into a file."""

    def __init__(
        self, module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str], forked: bool
    ) -> None:
        self.process: ForkServerProcess | subprocess.Popen[bytes]
        log.write_bytes(b"")
        if forked:
            self.process = multiprocessing.get_context("forkserver").Process(
                target=_run, args=(module, arguments, log, environment)
            )
            self.process.start()
        else:
            with log.open("wb") as out:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", module, *arguments],
                    stdout=out,
                    stderr=out,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **environment},
                    start_new_session=True,
                )

    @property
    def code(self) -> int | None:
        """Of the exit, or None as long as it runs."""
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def end(self) -> None:
        """With all that it started."""
        if self.code is None and (pid := self.process.pid):
            with contextlib.suppress(ProcessLookupError):  # a fork may not have come to its group
                os.killpg(pid, signal.SIGKILL)
            self.process.kill()
            if isinstance(self.process, subprocess.Popen):
                self.process.wait()
            else:
                self.process.join()


def preload(modules: Sequence[str]) -> None:
    """What the process that others are forked from imports, before it is first needed."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, *modules])


def can_fork(gpus: Sequence[str]) -> bool:
    return sys.platform == "linux" and not gpus


def _run(module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    os.setsid()
    multiprocessing.set_start_method(None, force=True)  # for what the host starts: not the one that started this
    file = os.open(log, os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    sys.path.insert(0, "")
    sys.argv = [module, *arguments]
    gc.freeze()  # what was imported is no garbage
    try:
        importlib.import_module(module).main()
    finally:
        atexit._run_exitfuncs()  # a fork leaves them out, and a tracker of experiments finishes there
