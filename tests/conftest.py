"""Settings of the whole suite. They are made before any test module imports torch or a host."""

import os
from pathlib import Path

import pytest

for name, value in {
    "HF_HUB_OFFLINE": "1",  # nothing here may need the network
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",  # the workers of pytest-xdist share the cores
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "TRITON_INTERPRET": "1",  # kernels are Python here; Triton reads it once, when it is imported
}.items():
    os.environ.setdefault(name, value)


@pytest.fixture(scope="session")
def golden():
    """Values and gradients of the paper's code by name, in float64; see golden/README.md."""
    import numpy as np
    import torch

    with np.load(Path(__file__).with_name("golden") / "reference_losses.npz") as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays}
    return {name: x.double() if x.is_floating_point() else x.long() for name, x in found.items()}
