"""Settings of the whole suite. They are made before any test module imports torch or a host."""

import os

for name, value in {
    "HF_HUB_OFFLINE": "1",  # nothing here may need the network
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",  # the workers of pytest-xdist share the cores
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(name, value)
