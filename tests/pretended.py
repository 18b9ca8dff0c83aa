"""Two accelerators on a machine without any, made of tensors of the CPU. Nothing else should run in the process.

As on real ones, an operation on tensors of two devices fails, but for single numbers of the CPU. Without ``float64``
they are like Apple's GPUs. What they compute is what the CPU computes.
"""

import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
FIRST, SECOND = f"{NAME}:0", f"{NAME}:1"
MOVES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)


class Module:
    """What torch.cuda is for CUDA, as far as torch and we ask; ``states`` counts what was asked of each
    device's random state."""

    def __init__(self):
        self.states, self.seeded = {FIRST: 0, SECOND: 0}, 0

    def get_rng_state(self, device):
        self.states[str(device)] += 1
        return torch.zeros(1)

    def set_rng_state(self, state, device):
        self.states[str(device)] += 1

    def manual_seed_all(self, seed):
        self.seeded += 1

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]

    def is_available(self):
        return True

    is_initialized = is_available

    def _is_in_bad_fork(self):
        return False

    def current_device(self):
        return 0

    def device_count(self):
        return 2


class Elsewhere(torch.Tensor):
    """A tensor ``inner`` of the CPU under another device."""

    @staticmethod
    def __new__(cls, inner, device):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=device, **layout)
        made.inner = inner
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.tolist:
            return args[0].inner.tolist()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("outside of Accelerators()")


class Accelerators(TorchDispatchMode):
    def __init__(self, float64=True):
        super().__init__()
        self.float64 = float64

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device for x in tensors if isinstance(x, Elsewhere) or x.dim()}
        devices |= {x.device for x in tensors if isinstance(x, Elsewhere)}
        if len(devices) > 1 and func not in MOVES:
            raise RuntimeError(f"{func} on tensors of several devices: {', '.join(sorted(map(str, devices)))}")
        device = tensors[0].device if func in MOVES and tensors else next(iter(devices), torch.device("cpu"))
        if kwargs.get("device") is not None:
            device, kwargs["device"] = torch.device(kwargs["device"]), "cpu"
        own = {id(x.inner): x for x in tensors if isinstance(x, Elsewhere)}  # results in place
        outer = args, kwargs
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Elsewhere) else x, (args, kwargs))
        with _disable_current_modes():
            result = func(*args, **kwargs)
        if torch.Tag.inplace_view in func.tags and own:  # such as squeeze_: another shape of the same tensor
            with no_dispatch():
                func(*outer[0], **outer[1])

        def placed(x):
            if not isinstance(x, torch.Tensor) or device.type == "cpu" or id(x) in own:
                return own.get(id(x), x) if isinstance(x, torch.Tensor) else x
            if x.dtype == torch.float64 and not self.float64:
                raise TypeError(f"{func}: {device} has no float64")
            return Elsewhere(x, device)

        return tree_map(placed, result)


MODULE = Module()
_setup_privateuseone_for_python_backend(NAME, MODULE)
torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) asks the mode, too


class Launched:
    """A kernel of Triton, launched on what is inside of tensors, in Triton's interpreter. Nothing waits for it."""

    count = 0

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            Launched.count += 1
            with _disable_current_modes():
                self.kernel[grid](*(x.inner if isinstance(x, Elsewhere) else x for x in args), **kwargs)

        return launch


def known_to_the_engine():
    """Its kernels run on these tensors, and a linear head that consists of them is no stranger's."""
    from importlib.util import find_spec

    from axolotl_cvloss.engine import sources

    sources.is_linear = lambda head: type(head).forward is torch.nn.Linear.forward
    if find_spec("triton"):
        from axolotl_cvloss.engine import kernels

        for name in ("collect_kernel", "pull_kernel", "scale_kernel"):
            if not isinstance(kernel := getattr(kernels, name), Launched):
                setattr(kernels, name, Launched(kernel))
