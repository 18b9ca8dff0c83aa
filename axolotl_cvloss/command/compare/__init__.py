"""``cvloss compare``: objectives trained on one config and one data set, side by side, and what the numbers decide."""
