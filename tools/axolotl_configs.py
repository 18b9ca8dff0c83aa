"""Add the plugin and its key to every example YAML of Axolotl, and print what Axolotl's validation makes of each.

    python tools/axolotl_configs.py axolotl-0.19.0.tar.gz [TABLE.md]

Fails where a config for supervised fine-tuning is refused for another cause than context or tensor parallelism.
`make test-configs` runs it.
"""

import copy
import logging
import re
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from axolotl.cli.config import prepare_plugins
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault

from axolotl_cvloss.command.checking import PLUGIN
from axolotl_cvloss.hosts.axolotl_keys import CONFLICTS, PARALLEL, savers

MIX = {"cross_entropy": 0.6, "lovasz": 0.4}
# A machine that the examples could be for. Axolotl's own tests state it in the same way.
MACHINE = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 8, "compute_capability": "sm_90"}
# What is no supervised fine-tuning with the loss of a causal language model, by the beginning of the refusal.
OTHERS = (*CONFLICTS, "use_eaft", "model_type MambaLMHeadModel")
CLONES = "NemoGymPlugin"  # clones a repository into the home directory as soon as it is listed
HEAD = ("config", "result", "why")


def examples(archive: Path) -> dict[str, dict[str, Any]]:
    """The YAMLs under folders named examples that name a model, by their path."""
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            path = member.name.split("/", 1)[-1]
            if "examples/" in path and path.endswith((".yaml", ".yml")):
                content = yaml.safe_load(tar.extractfile(member).read())  # type: ignore[union-attr]
                if isinstance(content, dict) and "base_model" in content:
                    found[path] = content
    return dict(sorted(found.items()))


def problem(config: dict[str, Any]) -> str:
    """Why Axolotl refuses a config, or nothing."""
    PluginManager._instance = None  # it keeps the plugins of earlier configs
    cfg = DictDefault(copy.deepcopy(config))
    try:
        prepare_plugins(cfg)
        validate_config(cfg, capabilities=dict(MACHINE), env_capabilities={"torch_version": "2.13.0"})
    except Exception as error:
        said = " ".join(str(error).split()).split(" [type=")[0].split(" For further information")[0]
        return re.sub(r"^\d+ validation errors? for \w+ (Value error, )?", "", said)
    return ""


def row(path: str, config: dict[str, Any]) -> tuple[str, str, str]:
    """A config, what becomes of it with the key, and why."""
    plugins = config.get("plugins") or []
    if any(name.endswith(CLONES) for name in plugins):
        return path, "not tried", f"{CLONES} clones a repository as soon as it is listed"
    if why := problem(config):
        return path, "invalid without cv_loss", why
    ours = {**config, "plugins": [*plugins, PLUGIN], "cv_loss": MIX}
    if why := problem(ours):
        return path, "refused", why
    off = savers(ours.get)
    return path, "taken over" if off else "accepted", ", ".join(off)


def wrong(row: tuple[str, str, str]) -> bool:
    """Whether a config for supervised fine-tuning is refused that should not be."""
    _, result, why = row
    return result == "refused" and not re.search(f"cannot be used with ({'|'.join([*PARALLEL, *OTHERS])})", why)


def table(rows: list[tuple[str, str, str]]) -> str:
    cells = [HEAD, ("---",) * len(HEAD), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells)


def main(archive: Path, page: Path | None = None) -> None:
    logging.disable(logging.ERROR)
    rows = [row(path, config) for path, config in examples(archive).items()]
    counts = ", ".join(f"{count} {result}" for result, count in Counter(result for _, result, _ in rows).most_common())
    print(table(rows), counts, sep="\n\n")
    if page:
        page.write_text(
            f"# The example configs of {archive.name.removesuffix('.tar.gz')} with `cv_loss`\n\n"
            f"Written by `make test-configs`. To each were added the plugin and `cv_loss: {MIX}`; then Axolotl "
            f"validated it. {len(rows)} configs: {counts}. Taken over: what only saves memory for cross-entropy is "
            f"switched off, and the key is named.\n\n{table(rows)}\n"
        )
    if failures := [path for path, *rest in rows if wrong((path, *rest))]:
        sys.exit(f"refused, and should not be: {', '.join(failures)}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
