"""A process that ends in the middle of training as on a failing machine: at once."""

import os
import signal

from transformers import TrainerCallback


class Crash(TrainerCallback):
    """After the step that the environment names. Also sees to it that several processes do share the weights."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert any(hasattr(p, "full_tensor") for p in model.parameters()) == (args.world_size > 1)
        if str(state.global_step) == os.environ.get("CRASH_AFTER"):
            os.kill(os.getpid(), signal.SIGKILL)
