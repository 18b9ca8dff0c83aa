"""A process that ends in the middle of training as on a failing machine: at once."""

import os
import signal

from accelerate.state import AcceleratorState
from transformers import TrainerCallback


def sharding_of(model):
    parameters = list(model.parameters())
    if any(hasattr(p, "full_tensor") for p in parameters):
        return "FSDP2"
    if any(hasattr(p, "ds_id") for p in parameters):
        return "ZeRO-3"
    return "none" if AcceleratorState().deepspeed_plugin is None else "ZeRO-2"


class Crash(TrainerCallback):
    """After the step that the environment names. Also sees to it that the weights are kept as the environment says."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        assert sharding_of(model) == os.environ["SHARDING"]
        if str(state.global_step) == os.environ.get("CRASH_AFTER"):
            os.kill(os.getpid(), signal.SIGKILL)
