"""Random numbers that are drawn once more."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RandomState:
    """Where the random numbers of the CPU and of a device stand now. No other device is touched."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.where = () if device.type == "mps" else (device,)  # Apple's has no argument
        self.cpu = torch.get_rng_state()
        self.own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(*self.where)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw from here once more, and go on as before afterwards."""
        after = RandomState(self.device)
        self._set()
        try:
            yield
        finally:
            after._set()

    def _set(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.own is not None:
            torch.get_device_module(self.device).set_rng_state(self.own, *self.where)
