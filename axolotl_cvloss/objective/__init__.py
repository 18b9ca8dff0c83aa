"""What an objective is: the key, parsed, and the weighted sum of losses that it names."""
