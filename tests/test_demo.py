"""What `make demo` is made of: problems, tokenizer, scorer. The demo itself takes minutes and is run by hand."""

import re
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

DEMO = Path(__file__).parent.parent / "demo"


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(DEMO))
    yield
    for name in ("model", "problems"):
        sys.modules.pop(name, None)


def test_problems_are_the_same_every_time_and_none_is_twice():
    from problems import make_problems

    problems = make_problems(300, held_out=False)
    assert problems == make_problems(300, held_out=False)
    assert len({problem["question"] for problem in problems}) == 300


def test_held_out_problems_share_no_story_and_numbers_with_the_training_ones():
    from problems import make_problems

    def keys(held_out):
        # The formulas and the shape of the question, whatever its names and things.
        return {
            (re.sub(r"[A-Za-z]+", "", problem["question"]), tuple(re.findall(r"<<.*?>>", problem["answer"])))
            for problem in make_problems(200, held_out)
        }

    assert not keys(held_out=True) & keys(held_out=False)


def test_answers_have_the_format_of_gsm8k_and_are_right():
    from problems import make_problems, number_of

    for problem in make_problems(300, held_out=False):
        formulas = re.findall(r"<<(\d+)([+*-])(\d+)=(\d+)>>(\d+)", problem["answer"])
        assert formulas
        for a, sign, b, value, written in formulas:
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(value)
            assert value == written
        assert number_of(problem["answer"]) == formulas[-1][3]
        assert re.search(r"\n#### \d+$", problem["answer"])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("<<3+4=7>> #### 7", "7"),
        ("#### -3", "-3"),
        ("####7 and more", "7"),
        ("#### 7 #### 8", "7"),
        ("the answer is 7", None),
        ("#### seven", None),
        ("", None),
    ],
)
def test_number_of(text, number):
    from problems import number_of

    assert number_of(text) == number


def test_exact_match():
    from problems import exact_match, make_problems

    problems = make_problems(4, held_out=True)
    right = [problem["answer"] for problem in problems]
    assert exact_match(right, problems) == 1
    assert exact_match([right[0], right[1] + "0", "", "####"], problems) == 0.25


def test_the_tokenizer_gives_back_what_it_read_and_keeps_digits_apart():
    pytest.importorskip("tokenizers")
    from model import build_model, build_tokenizer
    from problems import make_problems

    problems = make_problems(200, held_out=False)
    tokenizer = build_tokenizer(problems)
    for problem in problems[:20]:
        ids = tokenizer(problem["question"]).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == problem["question"]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("12+34").input_ids)
    assert [token for token in tokens if any(c.isdigit() for c in token)] == ["1", "2", "3", "4"]
    assert build_model(tokenizer).config.vocab_size == len(tokenizer)


def test_quickstart_yaml_is_the_mix_of_the_readme():
    config = yaml.safe_load((DEMO.parent / "example_configs" / "quickstart.yaml").read_text())
    diff = (DEMO.parent / "README.md").read_text().split("```diff\n")[1].split("```")[0]
    added = yaml.safe_load(textwrap.dedent("\n".join(line[1:] for line in diff.splitlines() if line.startswith("+"))))
    assert config["cv_loss"] == added["cv_loss"]
    assert config["plugins"] == added["plugins"]
