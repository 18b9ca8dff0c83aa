"""Axolotl seeds data order and dropout, and not the random start of LoRA: with this plugin the seed of a run is its."""

from typing import Any

from axolotl.integrations.base import BasePlugin
from transformers import set_seed


class SeedPlugin(BasePlugin):
    def pre_model_load(self, cfg: Any) -> None:
        set_seed(cfg.seed)
