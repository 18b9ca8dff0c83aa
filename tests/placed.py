"""Tests on another device than the CPU (``TEST_DEVICE``): what they make lies there, and has the numbers of the CPU."""

import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

PACKAGE = str(Path(__file__).parents[1] / "axolotl_cvloss")


class Placed(TorchFunctionMode):
    """New tensors of tests, and of what tests call, are on the device. The package says itself where it makes its own.

    They are made in main memory first: a generator of the CPU draws the same numbers for every device.
    """

    def __init__(self, device):
        super().__init__()
        self.device, self.makers = torch.device(device), _device_constructors()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func not in self.makers or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        if sys._getframe(1).f_code.co_filename.startswith(PACKAGE):
            return func(*args, **kwargs)
        leaf = kwargs.pop("requires_grad", False)
        made = func(*args, **kwargs).to(self.device)
        return made.requires_grad_() if leaf else made


def without(device):
    """Why there is no such device in this process, or nothing."""
    if not device.startswith("cuda") or torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"no CUDA device: this PyTorch ({torch.__version__}) is built without CUDA"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return f"no CUDA device: {error}"
    return "no CUDA device"


def place(device):
    """From here on, and to the end of the process."""
    if device == "pretended":
        import pretended

        pretended.Accelerators().__enter__()
        pretended.known_to_the_engine()
        device = pretended.FIRST
    else:
        # Some tests want two results to be the same to the bit; a sum of atomic additions is not.
        torch.use_deterministic_algorithms(True, warn_only=True)
    Placed(device).__enter__()
