"""Write plugin.yaml from the code: python tools/manifest.py. A test keeps the two equal."""

from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Any

import yaml

from axolotl_cvloss import __version__, available_losses
from axolotl_cvloss.hosts.axolotl import CVLossArgs, CVLossPlugin
from axolotl_cvloss.losses.hookspecs import PROJECT
from axolotl_cvloss.objective.config import KEY, CVLossConfig, TermConfig

PATH = Path(__file__).parent.parent / "plugin.yaml"
HOSTS = ("axolotl", "transformers", "trl", "accelerate", "peft", "torch")


def manifest() -> dict[str, Any]:
    """What plugin.yaml says, apart from the tested host versions, which only a test run can know."""
    return {
        "name": PROJECT,
        "version": __version__,
        "entry_points": {
            "axolotl_plugin": f"{PROJECT}.{CVLossPlugin.__name__}",
            "axolotl_args": f"{CVLossArgs.__module__}.{CVLossArgs.__name__}",
            "trl_trainer": f"{PROJECT}.CVLossSFTTrainer",
            "trl_config": f"{PROJECT}.CVLossSFTConfig",
            "commands": sorted(script.name for script in entry_points(group="console_scripts") if _ours(script)),
            "losses_of_other_packages": PROJECT,
        },
        "config": {
            "key": KEY,
            "fields": _fields(CVLossConfig) | {"terms": _fields(TermConfig)},
        },
        "losses": {
            name: {
                "family": loss.family,
                "formula": loss.formula,
                "source": loss.source,
                "parameters": {n: f.default for n, f in loss.parameters.model_fields.items()},
            }
            for name, loss in available_losses().items()
            if loss.built_in
        },
    }


def _ours(script: EntryPoint) -> bool:
    return script.module.startswith(f"{PROJECT}.")


def _fields(model: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if not field.exclude:
            default = {} if field.is_required() else {"default": field.default}
            fields[name] = {"description": field.description, **default}
    return fields


if __name__ == "__main__":
    tested = {host: version(host).split("+")[0] for host in HOSTS}
    text = yaml.safe_dump(manifest() | {"tested_with": tested}, sort_keys=False, allow_unicode=True, width=110)
    PATH.write_text("# Written by tools/manifest.py.\n" + text, encoding="utf-8")
