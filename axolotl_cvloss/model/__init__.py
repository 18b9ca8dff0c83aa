"""An objective in a model."""
