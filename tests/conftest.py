"""Settings of the whole suite. They are made before any test module imports torch or a host."""

import os
from pathlib import Path

import pytest

# Where the tensors of tests of the engine are: cpu, cuda, or pretended.
DEVICE = os.environ.get("TEST_DEVICE", "cpu")

for name, value in {
    "HF_HUB_OFFLINE": "1",  # nothing here may need the network
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "NUMBA_DISABLE_JIT": "1",  # Axolotl packs by it, and what tests have is packed before it is compiled
    "OMP_NUM_THREADS": "1",  # the workers of pytest-xdist share the cores
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    # Without a GPU kernels are Python; Triton reads it once, when it is imported.
    "TRITON_INTERPRET": str(int(not DEVICE.startswith("cuda"))),
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # products on a GPU that are the same at every run
}.items():
    os.environ.setdefault(name, value)

if DEVICE != "cpu":  # before any module makes a tensor
    from placed import place, without

    MISSING = without(DEVICE)
    if not MISSING:
        place(DEVICE)


def pytest_configure():
    if DEVICE != "cpu" and MISSING:
        raise pytest.UsageError(f"TEST_DEVICE={DEVICE}: {MISSING}")


def pytest_collection_modifyitems(items):
    for item in items if DEVICE == "pretended" else ():
        if "autocast" in item.name or "without_gradients" in item.name:
            item.add_marker(pytest.mark.skip(reason="the pretended device knows no autocast and no inference mode"))


@pytest.fixture
def kernels_on(monkeypatch):
    """The kernels are behind the terms, in Triton's interpreter where there is no GPU; a test that uses none fails."""
    pytest.importorskip("triton")
    from axolotl_cvloss.engine import kernels, views

    launched, collect = [], kernels.collect
    monkeypatch.setenv(views.ENVIRONMENT, "on")
    monkeypatch.setattr(kernels, "collect", lambda *args, **flags: launched.append(args) or collect(*args, **flags))
    yield
    assert launched


@pytest.fixture(scope="session")
def golden():
    """Values and gradients of the paper's code by name, in float64; see golden/README.md."""
    import numpy as np
    import torch

    with np.load(Path(__file__).with_name("golden") / "reference_losses.npz") as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays}
    return {name: x.double() if x.is_floating_point() else x.long() for name, x in found.items()}
