"""What README.md and docs/ say is what the code says, and what they show works."""

import ast
import builtins
import datetime
import inspect
import itertools
import json
import re
import shlex
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from helpers import temporary_losses

from axolotl_cvloss import available_losses, register_loss
from axolotl_cvloss.command.cli import cli
from axolotl_cvloss.objective.config import ConfigError, CVLossConfig

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
PAGES = [
    README,
    REPOSITORY / "CONTRIBUTING.md",
    *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts),
]
TRAIN = ("compare", "predict", "probe", "reference")  # commands that load a model
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def load(name):
    """One of the programs in tools/."""
    spec = spec_from_file_location(name, REPOSITORY / "tools" / f"{name}.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool():
    return load("docs")


def name_of(path):
    return str(path.relative_to(REPOSITORY))


def blocks(path, *languages):
    """The code of a page: its line and its text."""
    text = path.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        if found[2] in languages:
            indent, code = len(found[1]), found[3]
            yield text[: found.start(3)].count("\n") + 1, "".join(line[indent:] for line in code.splitlines(True))


def test_the_pages_are_what_the_docstrings_say(tool):
    written = {path: path.read_text(encoding="utf-8") for path in tool.PAGES.glob("*.md")}
    assert written == tool.pages(), "run python tools/docs.py"


def test_the_table_of_losses_is_what_the_docstrings_say(tool):
    text = README.read_text(encoding="utf-8")
    assert text == tool.readme(text), "run python tools/docs.py"


def test_the_table_of_speed_is_what_was_measured(tool):
    text = tool.PERFORMANCE.read_text(encoding="utf-8")
    assert text == tool.speed(text) == tool.all_logits(text) == tool.gpu(text), "run python tools/docs.py"


def test_the_table_of_the_paper_s_experiment_is_that_of_its_runs(tool):
    text = tool.EXPERIMENT.read_text(encoding="utf-8")
    assert text == tool.paper(text), "run python tools/docs.py"


def test_the_table_of_what_was_tested_is_that_of_the_results():
    compatibility = load("compatibility")
    text = compatibility.PAGE.read_text(encoding="utf-8")
    environments = compatibility.environments()
    assert environments
    assert text == compatibility.with_table(text, environments), "run python tools/compatibility.py"
    hosts = {setup["host"] for found in environments for setup in found["setups"] if setup["result"] == "passed"}
    assert hosts == set(compatibility.PACKAGE)


def test_results_keep_the_day_and_the_commit_that_they_ran_with(monkeypatch):
    compatibility = load("compatibility")
    one, two = ({"host": name, "result": "passed"} for name in ("one", "two"))
    ran = []
    for commit in "first", "second", "third":
        monkeypatch.setattr(compatibility, "commit", lambda commit=commit: commit)
        before = ran[-1] if ran else {}
        rows = {"first": [one, two], "second": [{**two, "result": "failed"}, {**one, "result": "skipped"}]}
        ran.append(compatibility.merged(before, {"torch": "2"}, rows.get(commit, []), ("host",)))
    assert ran[1] == ran[2]
    assert [(row["host"], row["result"], row["commit"]) for row in ran[2]["setups"]] == [
        ("one", "passed", "first"),
        ("two", "failed", "second"),
    ]
    assert all(datetime.date.fromisoformat(row["day"]) for row in ran[2]["setups"])
    assert compatibility.merged(ran[2], {"torch": "3"}, [], ("host",))["setups"] == []


def test_what_is_said_of_classes_of_models_is_what_was_found():
    classes = load("classes")
    record, text = json.loads(classes.RECORD.read_text(encoding="utf-8")), classes.PAGE.read_text(encoding="utf-8")
    assert text == classes.with_sentence(text, record), "run make test-classes"
    assert classes.RECORD.with_suffix(".md").read_text(encoding="utf-8") == classes.page(record)
    assert not [name for name, entry in record["classes"].items() if entry["result"] in ("another loss", "error")]


def test_every_loss_has_its_place(tool):
    text = README.read_text(encoding="utf-8")
    rows = [line for line in text.split(tool.START)[1].split(tool.END)[0].splitlines() if line.startswith("| [")]
    names = [re.match(r"\| \[`(\w+)`\]", row)[1] for row in rows]
    assert len(names) == len(set(names))
    for name, loss in available_losses().items():
        if loss.function.__module__.startswith("axolotl_cvloss."):
            row = rows[names.index(name)]
            assert row.split(" | ")[1].removesuffix(" |") in loss.summary.replace("``", "`")
            page = (tool.PAGES / f"{loss.family}.md").read_text(encoding="utf-8")
            section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
            assert f"`{loss.formula}`" in section
            assert all(f"| `{parameter}` |" in section for parameter in loss.parameters.model_fields)


def test_every_built_in_loss_says_what_users_ask(tool):
    for losses in tool.built_in().values():
        for loss in losses:
            assert loss.summary.endswith("."), loss.name
            assert loss.formula, loss.name
            assert loss.source, loss.name


def test_docstrings_have_the_arguments_of_the_losses(tool):
    for loss in itertools.chain(*(losses for family, losses in tool.built_in().items() if family != "token")):
        said = inspect.getdoc(loss.function).split("\nArgs:\n")[1]
        assert re.findall(r"^    (\w+): ", said, re.MULTILINE) == list(inspect.signature(loss.function).parameters)


def test_the_pictures_of_losses(tool):
    image = pytest.importorskip("matplotlib.image")
    for picture in (tool.PICTURE, tool.REGION_PICTURE):
        pixels = image.imread(picture)
        assert min(pixels.shape[:2]) > 400
        assert len({tuple(pixel) for row in pixels[::3, ::3] for pixel in row.tolist()}) > 20
    assert {"cross_entropy", "focal", "self_adjusting_dice"} <= set(tool.curves())


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", path.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_code_and_configs(path):
    """Python compiles, and runs where it needs nothing but the page; every ``cv_loss`` is a valid one."""
    names = {"__name__": "page"}
    with temporary_losses():
        for line, code in blocks(path, "python"):
            compiled = compile(code, f"{path.name}:{line}", "exec")
            if unknown(code) <= names.keys():
                exec(compiled, names)
        if "cvloss_register_losses" in names:
            names["cvloss_register_losses"](register_loss)
        for line, text in blocks(path, "yaml", "yml", "diff"):
            if added := [part[1:] for part in text.splitlines() if part.startswith("+")]:
                text = "\n".join(re.sub("^ ", "", part) for part in added)
            # One block may show the key several times.
            for part in re.split(r"^(?=cv_loss:)", text, flags=re.MULTILINE):
                config = yaml.safe_load(part)
                if isinstance(config, dict) and "cv_loss" in config:
                    try:
                        CVLossConfig.parse(config["cv_loss"])
                    except ConfigError as error:
                        pytest.fail(f"{path.name}:{line}: {error}")


def unknown(code):
    """The names that a piece of code uses before it makes them."""
    known, missing = set(dir(builtins)), set()
    for statement in ast.parse(code).body:
        nodes = list(ast.walk(statement))
        used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        made = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        made |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        made |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        imports = [alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
        made |= {(alias.asname or alias.name).split(".")[0] for alias in imports}
        # The right side of an assignment comes before its targets.
        targets = [node for target in getattr(statement, "targets", []) for node in ast.walk(target)]
        missing |= used - known - (made - {node.id for node in targets if isinstance(node, ast.Name)})
        known |= made
    return missing


def test_the_files_that_the_architecture_names_are_there():
    named = re.findall(r"`((?:axolotl_cvloss|tests)/[\w/.]*)`", (DOCS / "architecture.md").read_text(encoding="utf-8"))
    assert len(set(named)) > 10
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


def test_the_readme_is_read_in_a_few_minutes():
    assert len(README.read_text(encoding="utf-8").split()) <= 1600


def test_code_that_needs_nothing_is_known_as_such():
    assert unknown("from a import b as c\ndef f(x: int = 1):\n    y = [z for z in x]\n    return c(y, len(x))") == set()
    assert unknown("import torch\nloss = model(torch.ones(1)).loss") == {"model"}
    assert unknown("a = 1\nmodel, b = prepare(model, a)") == {"model", "prepare"}


def test_the_readme_has_code_that_runs():
    assert [line for line, code in blocks(README, "python") if not unknown(code)]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_commands(path, tmp_path, monkeypatch):
    """Every call of cvloss, with files of the names that it mentions."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "example_configs").symlink_to(REPOSITORY / "example_configs")
    answer = {"task": "gsm8k", "prediction": "#### 7", "reference": "#### 7"}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(answer))
    for line, text in blocks(path, "bash", "console", "sh"):
        text = text.replace("\\\n", "")
        for command in re.findall(r"^(?:\$ )?(?:axolotl )?cvloss +(.*)$", text, re.MULTILINE):
            arguments = shlex.split(command, comments=True)
            for argument in arguments:
                if argument.endswith(".yaml") and not Path(argument).exists():
                    Path(argument).write_text("cv_loss: {cross_entropy: 0.6, lovasz: 0.4}")
            if arguments[0] in TRAIN:  # these take a model and hours; their arguments are looked at
                Path("model").mkdir(exist_ok=True)
                cli.commands[arguments[0]].make_context(arguments[0], arguments[1:])
                continue
            result = CliRunner().invoke(cli, arguments)
            assert result.exit_code == 0, f"{path.name}:{line}: cvloss {command}: {result.output}"


def test_the_readme_names_every_command():
    text = "".join(code for _, code in blocks(README, "bash"))
    assert set(re.findall(r"^cvloss (\w+)", text, re.MULTILINE)) == set(cli.commands)


def test_the_message_in_the_readme():
    (shown,) = [code.strip() for _, code in blocks(README, "") if code.startswith("cv_loss")]
    with pytest.raises(ConfigError) as error:
        CVLossConfig.parse({"focal": {"gama": 3}})
    assert shown == str(error.value)
