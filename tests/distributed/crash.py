"""A process that ends in the middle of training as on a failing machine: at once."""

import os
import signal

from transformers import TrainerCallback


class Crash(TrainerCallback):
    """After the step that the environment names."""

    def on_step_end(self, args, state, control, **kwargs):
        if str(state.global_step) == os.environ.get("CRASH_AFTER"):
            os.kill(os.getpid(), signal.SIGKILL)
