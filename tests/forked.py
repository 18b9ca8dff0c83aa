"""`axolotl train` without its start: Axolotl takes several times as long to import as to train a tiny model.

So runs are forked from a process that has imported Axolotl, and nothing of ours but what torch starts.
"""

import gc
import multiprocessing
import os
import sys

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["axolotl.cli.train", "axolotl.cli.config", "axolotl.train", "axolotl.core.builders"])


def axolotl_train(config, environment):
    """Train with the config of that path: the exit status, and what was printed."""
    log = config.with_suffix(".log")
    process = FORKS.Process(target=_train, args=(config, log, environment))
    process.start()
    process.join(600)
    process.kill()
    return process.exitcode, log.read_text()


def _train(config, log, environment):
    multiprocessing.set_start_method(None, force=True)  # for what Axolotl starts: not the one that started this
    os.chdir(config.parent)
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    gc.freeze()  # Axolotl's packing collects garbage again and again; what was imported is none

    from axolotl.cli.train import do_cli

    sys.argv = sys.argv[:1]
    do_cli(config=str(config))
