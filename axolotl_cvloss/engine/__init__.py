"""One engine for every loss: collect statistics, evaluate, pull back. It knows tensors only, no host and no config."""
