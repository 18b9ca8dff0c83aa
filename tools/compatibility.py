"""Write the table of supported setups into the README, from docs/compatibility.json, which `make test-hosts` writes."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
START, END = "<!-- compatibility: written by tools/compatibility.py -->", "<!-- end of compatibility -->"
COLUMNS = ("host", "version", "sharding", "packing", "adapter", "result")
PACKAGE = {"axolotl train": "axolotl", "transformers Trainer": "transformers", "SFTTrainer": "trl"}
# What this machine's kind cannot run. Said, not left out.
UNTESTED = [("all", "", "DeepSpeed ZeRO-2 and ZeRO-3", "", "", "not tested")]


def table(results: dict) -> str:
    """The setups that ran, one a line."""
    versions = results["versions"]
    rows = []
    for setup in results["setups"]:
        version = versions[PACKAGE[setup["host"]]]
        sharding = setup["sharding"] if setup["sharding"].startswith("1 ") else f"2 processes, {setup['sharding']}"
        rows.append((setup["host"], version, sharding, setup["packing"], setup["adapter"], setup["result"]))
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows, *UNTESTED]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_table(text: str, results: dict) -> str:
    """The README with the table in its place."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{table(results)}\n{END}{after}"


def main() -> None:
    results = json.loads((ROOT / "docs" / "compatibility.json").read_text())
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(), results))
    print(table(results))


if __name__ == "__main__":
    main()
