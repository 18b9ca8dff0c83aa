"""Real FSDP2 and DeepSpeed over gloo without a GPU. Hosts choose them only on accelerators, so three of their choices
are made for them here; what runs then is their own code. Import this before a trainer is made."""

import os

from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_state_init, _build_mesh = AcceleratorState.__init__, ParallelismConfig.build_device_mesh
_prepare_backend = PartialState._prepare_backend


def _init(self, *args, fsdp_plugin=None, **kwargs):
    _state_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    plugin = fsdp_plugin or getattr(self, "fsdp_plugin", None)  # the state is made again by whoever reads it
    if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        if self._mixed_precision != "no":
            plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = plugin


def _mesh(self, device_type):
    return _build_mesh(self, "cpu")


def _backend(self, *args, **kwargs):
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return "gloo", DistributedType.MULTI_CPU
    return _prepare_backend(self, *args, **kwargs)


AcceleratorState.__init__ = _init
ParallelismConfig.build_device_mesh = _mesh
PartialState._prepare_backend = _backend
