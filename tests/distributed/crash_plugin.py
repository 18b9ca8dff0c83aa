"""For Axolotl: the crash, and a seed for the random start of LoRA, so that runs can be compared."""

from axolotl.integrations.base import BasePlugin
from crash import Crash
from transformers import set_seed


class CrashPlugin(BasePlugin):
    def pre_model_load(self, cfg):
        set_seed(cfg.seed)

    def add_callbacks_post_trainer(self, cfg, trainer):
        return [Crash()]
