"""``cvloss-sft``: the command ``trl sft`` with the key ``cv_loss``.

It starts this module under ``accelerate launch``, as ``trl sft`` starts its script, so it takes the arguments of that
too. What runs then is TRL's script with the config and the trainer of this package.
"""

import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import trl
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from transformers import set_seed
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.scripts import sft

from .trl import CVLossSFTConfig, CVLossSFTTrainer

MODULE = "axolotl_cvloss.hosts.trl_cli"
LAUNCHED = "CVLOSS_LAUNCHED"  # in the environment of what the command has started


def parsed(arguments: list[str]) -> Any:
    """The dataclasses of the script, and the unknown arguments of the config file and of the command line."""
    # TRL's script imports these two inside its functions. If it no longer did, the parser would not know cv_loss, and
    # SFTTrainer would refuse a config that has it.
    trl.SFTConfig, trl.SFTTrainer = CVLossSFTConfig, CVLossSFTTrainer
    parser = sft.make_parser(prog="cvloss-sft")
    return parser.parse_args_and_config(arguments, return_remaining_strings=True, separate_remaining_strings=True)


def command() -> None:
    """Check the config, then start the training processes."""
    arguments = sys.argv[1:]
    *_, of_config, of_line = parsed(arguments)
    # accelerate refuses what it does not know either.
    launch_args = resolve_accelerate_config_argument([*of_config, *of_line])
    os.environ[LAUNCHED] = "1"
    launch_command(launch_command_parser().parse_args([*launch_args, "--module", MODULE, *arguments]))


def built(config: Path, folder: str, changes: Mapping[str, Any]) -> CVLossSFTTrainer:
    """The trainer that the command would train with, on a config with some changes and this output folder."""
    found: list[CVLossSFTTrainer] = []

    class Built(CVLossSFTTrainer):
        """Nothing is trained or saved."""

        def train(self, *args: Any, **kwargs: Any) -> None:
            found.append(self)

        def save_model(self, *args: Any, **kwargs: Any) -> None:
            pass

    changed = Path(folder) / "config.yaml"
    own = {**yaml.safe_load(config.read_text()), "push_to_hub": False, **changes, "output_dir": folder}
    changed.write_text(yaml.safe_dump(own))
    script, training, model, datasets, *_ = parsed(["--config", str(changed)])
    trl.SFTTrainer = Built
    set_seed(training.seed)
    with redirect_stdout(None):  # it would say that it has trained and saved
        sft.main(script, training, model, datasets)
    del Built.train  # from here on it trains
    return found[0]


def main() -> None:
    """Train in this process. What has arguments for accelerate's launcher is started by that, if it was not yet."""
    script, training, model, datasets, *for_launcher = parsed(sys.argv[1:])
    if any(for_launcher) and LAUNCHED not in os.environ:
        return command()
    set_seed(training.seed)  # SFTTrainer draws the start of LoRA before the Trainer sets the seed
    return sft.main(script, training, model, datasets)


if __name__ == "__main__":
    main()
