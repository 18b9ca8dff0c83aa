"""Write the table of supported setups into docs/compatibility.md, from docs/compatibility/*.json.

`make test-hosts` and `make test-trl-latest` write these; so does a part of them, with the file in COMPATIBILITY.

Each of them holds what ran with one set of versions. A setup has the commit and the day that it last ran with.
"""

import datetime
import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
START, END = "<!-- compatibility: written by tools/compatibility.py -->", "<!-- end of compatibility -->"
COLUMNS = ("host", "version", "sharding", "packing", "adapter", "result", "ran at")
PACKAGE = {"axolotl train": "axolotl", "transformers Trainer": "transformers", "SFTTrainer": "trl"}
# Said, not left out.
UNTESTED = [("all", "", "GPUs", "", "", "not tested", "")]


def commit() -> str:
    """The commit that is checked out, with a + where the package has changed since."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "axolotl_cvloss") else "")


def merged(before: dict, versions: dict, rows: list[dict], columns: tuple[str, ...]) -> dict:
    """The results of a run, and of those before it with the same versions what did not run again."""
    ran = {"commit": commit(), "day": datetime.date.today().isoformat()}
    old = before["setups"] if before.get("versions") == versions else []
    new = [{**row, **ran} for row in rows if row["result"] != "skipped"]
    found = {tuple(row[name] for name in columns): row for row in [*old, *new]}
    return {"versions": versions, "setups": list(found.values())}


def lines(results: dict) -> list[tuple[str, ...]]:
    """The setups that ran with the packages of one environment; padded and packed share a line."""
    packings: dict[tuple[str, ...], list[str]] = {}
    for setup in results["setups"]:
        version = results["versions"][PACKAGE[setup["host"]]]
        sharding = setup["sharding"] if setup["sharding"].startswith("1 ") else f"2 processes, {setup['sharding']}"
        ran = setup["result"], f"{setup['commit']}, {setup['day']}"
        packings.setdefault((setup["host"], version, sharding, setup["adapter"], *ran), []).append(setup["packing"])
    return [(*line[:3], " and ".join(packing), *line[3:]) for line, packing in packings.items()]


def table(environments: list[dict]) -> str:
    """The setups of all environments, one a line, by host and version."""
    rows = [line for results in environments for line in lines(results)]
    rows = [COLUMNS, ("---",) * len(COLUMNS), *sorted(rows, key=lambda row: row[:2]), *UNTESTED]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def with_table(text: str, environments: list[dict]) -> str:
    """The page with the table in its place."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{table(environments)}\n{END}{after}"


def environments() -> list[dict]:
    """What ran, in each environment that there are results of."""
    files = [json.loads(path.read_text()) for path in sorted((ROOT / "docs" / "compatibility").glob("*.json"))]
    return [results for results in files if "setups" in results]  # tools/classes.py has a file there too


def main() -> None:
    PAGE.write_text(with_table(PAGE.read_text(), environments()))
    print(table(environments()))


if __name__ == "__main__":
    main()
