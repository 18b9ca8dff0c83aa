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
}.items():
    os.environ.setdefault(name, value)

GOLDEN = os.environ.get("CVLOSS_GOLDEN") or Path(__file__).parents[1] / "../shared/golden/reference_losses.npz"


@pytest.fixture(scope="session")
def golden():
    """Values and gradients of the paper's code: logits and labels of some cases, and what each loss gave."""
    import numpy as np
    import torch

    path = Path(GOLDEN).resolve()
    if not path.exists():
        pytest.skip(f"no values of the paper's code at {path}; set CVLOSS_GOLDEN to their .npz file")
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}
