"""The generic scorers, against answers scored by hand."""

import json

import pytest
from click.testing import CliRunner

from axolotl_cvloss.command.cli import cli
from axolotl_cvloss.command.scorers import score_file, score_pairs


def exact(name, prediction, reference):
    return score_pairs(name, [(prediction, reference)]).metrics["exact_match"]


@pytest.mark.parametrize(
    ("name", "prediction", "reference", "right"),
    [
        ("text", " two  words\n", "two words", True),
        ("text", "Two words", "two words", False),
        ("number", "so 3+4 = 7.0", "7", True),
        ("number", "<<3+4=7>> #### 7", "x #### 7", True),
        ("number", "<<3+4=7>> 7", "x #### 7", False),  # the mark is part of the answer where the reference has it
        ("choice", "(B) because", "B", True),
        ("choice", "A or B", "B", False),
        ("label", "play  music", "play music", True),
        ("json", '{"b": [1], "a": true}', '{"a": true, "b": [1]}', True),
        ("json", '{"a": 1}', '{"a": true}', False),
        ("json", "{", '{"a": true}', False),
        ("spans", "O B-x I-x O O", "O B-x I-x", True),  # an O more is no span more
        ("spans", "O B-x B-x", "O B-x I-x", False),
        ("spans", "I-x I-x", "B-x I-x", True),
    ],
)
def test_exact_match(name, prediction, reference, right):
    assert exact(name, prediction, reference) == right


def test_f1_of_spans_by_hand():
    """x: one of two found, one found that is none; y: none of one found. Micro 2*1/(2+3), macro of 2*1/(2+2) and 0."""
    pairs = [("B-x I-x O B-x", "B-x I-x O O"), ("O O O", "B-x O B-y")]
    metrics = score_pairs("spans", pairs).metrics
    assert metrics == {"exact_match": 0, "f1_micro": pytest.approx(2 / 5), "f1_macro": pytest.approx(1 / 4)}


def test_f1_of_json_is_of_leaves():
    metrics = score_pairs(
        "json", [('{"a": {"b": 1, "c": 2}, "l": [1, 1]}', '{"a": {"b": 1, "c": 3}, "l": [1]}')]
    ).metrics
    # a.b is right, a.c is wrong, l[] has one right and one too many.
    assert metrics["f1_micro"] == pytest.approx(2 * 2 / (4 + 3))
    assert metrics["f1_macro"] == pytest.approx((1 + 0 + 2 / 3) / 3)


def test_a_rare_class_counts_as_much_as_a_frequent_one():
    metrics = score_pairs("label", [("often", "often")] * 9 + [("often", "rare")]).metrics
    assert metrics["exact_match"] == 0.9
    assert metrics["f1_macro"] == pytest.approx((2 * 9 / 19 + 0) / 2)


def test_a_scorer_of_your_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_scorer.py").write_text(
        "def shared(prediction, reference):\n    return {'shared': 0.5, 'length': len(prediction)}\n"
        "def nothing(prediction, reference):\n    return None\n"
        "def some(prediction, reference):\n    return {'right': 1} | ({'rare': 3} if prediction == 'ab' else {})\n"
        "def lacking(prediction, reference):\n    return {prediction: 1}\n"
    )
    scores = score_pairs("own_scorer:shared", [("ab", "x"), ("abcd", "y")])
    assert scores.metrics == {"shared": 0.5, "length": 3}
    assert scores.examples == [0.5, 0.5]
    assert score_pairs("own_scorer:some", [("ab", "x"), ("c", "y")]).metrics == {"right": 1, "rare": 3}
    for wrong, says in [
        ("own_scorer:lacking", "every example must have a"),
        ("own_scorer:nothing", "finite number"),
        ("own_scorer:no", "no attribute 'no'"),
        ("words", "allowed: text,"),
    ]:
        with pytest.raises(ValueError, match=says):
            score_pairs(wrong, [("a", "b"), ("c", "d")])


def test_of_a_file(tmp_path):
    file = tmp_path / "predictions.jsonl"
    file.write_text('{"prediction": "7", "reference": "7"}\n{"prediction": "8\u2028", "reference": "7"}\n')
    found = json.loads(CliRunner().invoke(cli, ["score", str(file), "--score", "number", "--json"]).output)
    assert found == {"number": {"examples": 2, "exact_match": 0.5}}
    file.write_text('{"prediction": "7", "reference": "7"}\n{"prediction": "8"}\n')
    with pytest.raises(ValueError, match=r"line 2: 'reference' is missing"):
        score_file(file, "text")
    failed = CliRunner().invoke(cli, ["score", str(file), "--score", "text"])
    assert failed.exit_code == 1
    assert "line 2" in failed.output
