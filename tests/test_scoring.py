"""The scorer against cases worked out by hand, and what it does with hostile and broken input."""

import json
import subprocess
import sys
import time
from fractions import Fraction

import pytest

from axolotl_cvloss.command import scoring
from axolotl_cvloss.command.scoring import (
    canonical,
    equivalent,
    final_number,
    formulas,
    last_number,
    letter,
    score_example,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<<48/2=24>> <<48+24=72>> #### 72", 72),
        ("#### -3", -3),
        ("#### - 3", -3),
        ("#### \u22123", -3),
        ("#### +3", 3),
        ("#### 1,234", 1234),
        ("#### 1,234,567.5", 1234567.5),
        ("#### -1,234", -1234),
        ("#### $5.", 5),
        ("#### $5.00", 5),
        ("#### -$5", -5),
        ("#### $-5", -5),
        ("#### $ 5", 5),
        ("#### €1,000", 1000),
        ("#### 1/2", 0.5),
        ("#### -3/4", -0.75),
        ("#### 1 / 2", 0.5),
        ("#### 1 1/2", 1.5),
        ("#### 3/0", None),
        ("#### .5", 0.5),
        ("#### 0.50", 0.5),
        ("#### 72.0", 72),
        ("#### 1e3", 1000),
        ("#### 1.5e+16", 15000000000000000),
        ("#### 5%", 5),
        ("#### 12 clips", 12),
        ("#### about 12 clips.", 12),
        ("#### (7)", 7),
        ("####7 and more", 7),
        ("####\n7", 7),
        ("#### 7<|im_end|>", 7),
        ("#### 7 #### 8", 7),  # two answers: the first is what the model settled on
        ("#### 7\n#### 8", 7),
        ("<<1+1=2>> 3 #### 4\nQuestion: 5", 4),
        ("#### 5-3", 5),
        ("the answer is 7", None),
        ("### 7", None),
        ("####", None),
        ("#### seven", None),
        ("#### seven\n8", None),
        ("", None),
        ("#### 12,5", None),  # neither thousands nor a point
        ("#### 1,2345", None),
        ("#### " + "9" * 31, None),
        ("#### " + "9" * 30, int("9" * 30)),
        ("#### x5", None),
        ("#### \u20133", -3),  # a dash
        ("#### 10/2.5", 4),
        ("#### 1/-2", -0.5),
        ("#### 48 + 24 = 72", 72),
        ("#### 72 = the total", 72),
        ("#### x = - 5", -5),
        (r"#### $\frac{1}{2}$", 0.5),
        (r"#### -\dfrac{3}{4}.", -0.75),
        ("#### 1.2.3", None),
        ("<<48+24=72>> #### 72 <<72+1=73>> #### 73", 72),
        ("#### 72 #### 8=8", 72),
        ("#### 38 <<x=5>>", 38),
        ("#### 5 = 3 + 2", 5),
        ("#### - 3 or 4", -3),
        ("#### x = 5-3", 5),
        ("#### 2 + 3 = 3 + 2", 2),  # no side is one number: the first
    ],
)
def test_final_number(text, value):
    assert final_number(text) == (None if value is None else Fraction(str(value)))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10 / 5 = 2.5\nThe answer is: 2.5", 2.5),
        ("He has 10 - 5", 5),
        ("so it is -5.", -5),
        ("between 5-3", 3),
        ("1,234 apples", 1234),
        ("no number", None),
        ("3 or 4", 4),
    ],
)
def test_last_number(text, value):
    assert last_number(text) == (None if value is None else Fraction(str(value)))


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("B", "B"),
        (" B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("B) the marsh", "B"),
        ("B. a marsh", "B"),
        ("**B**", "B"),
        ("b", "B"),
        ("(b)", "B"),
        ("B\nQuestion: C", "B"),
        ("B because of fog", "B"),
        ("The answer is B.", "B"),
        ("Answer: (C)", "C"),
        ("Answer: **C**", "C"),
        ("C is the answer", "C"),
        ("answer is D", "D"),
        ("A", "A"),
        ("A. marsh", "A"),
        ("A marsh", None),  # an article
        ("a marsh", None),
        ("A or B", None),
        ("A, B", None),
        ("B/C", None),
        ("The answer is A and B", None),
        ("Because", None),
        ("BCD", None),
        ("Z", None),
        ("", None),
        ("\n", None),
        ("none of them", None),
        ("A B C D", None),
        ("A. B.", None),
        ("(A) (B)", None),
        ("A|B", None),
        ("A; B", None),
        ("A, A", "A"),
        ("B. E. coli", "B"),
        ("C. A marsh", "C"),
        ("answer: b", "B"),
        ("The correct option is B", "B"),
        ("Choice (d).", "D"),
        ("the answer is a dog", None),
        ("A is the answer", "A"),
        ("A because of fog", "A"),
        ("A is not right, the answer is B", "B"),
        ("Option B is wrong, the answer is C", "C"),
        ("B is wrong. C", "C"),
        ("(B) is incorrect; (D)", "D"),
        ("B is wrong", None),
        ("B is right", "B"),
        ("B vs C", None),
        ("B vs. C", None),
        ("1.\nThe answer is: A", None),  # the first line alone
    ],
)
def test_letter(text, choice):
    assert letter(text) == choice


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<<48/2=24>> #### 24", ["48/2=24"]),
        ("<< 48 / 2 = 24 >>", ["48/2=24"]),
        ("<<1+1=2>><<1+1=2>>", ["1+1=2", "1+1=2"]),
        ("<<add(n0,N1)>>", ["add(n0,n1)"]),
        ("<<3+4=7", []),
        ("3+4=7>>", []),
        ("<<3+4=7>", []),
        ("<<3+4=7 <<5*2=10>>", ["5*2=10"]),
        ("<<3+4=7>> 5*2=10>>", ["3+4=7"]),
        ("<<<1+2=3>>>", ["1+2=3"]),
        ("<<>> << >>", []),
        ("", []),
    ],
)
def test_formulas(text, found):
    assert formulas(text) == found


@pytest.mark.parametrize(
    ("formula", "other", "same"),
    [
        ("48+24=72", "24+48=72", True),
        ("2*3*4=24", "4*2*3=24", True),
        ("2*(3+4)=14", "(4+3)*2=14", True),
        ("2+3+4=9", "2+(3+4)=9", True),
        ("10-3+2=9", "10+2-3=9", True),
        ("8/2*3=12", "8*3/2=12", True),
        ("-2+5=3", "5-2=3", True),
        (".5*10=5", "10*0.50=5.0", True),
        ("1,000*2=2000", "2*1000=2,000", True),
        ("$5*2=$10", "2*5=10", True),
        ("40=40", "40=40.0", True),
        ("5-2=3", "2-5=3", False),
        ("4/2=2", "2/4=2", False),
        ("2+3*4=14", "2*3+4=14", False),
        ("10-(3+2)=5", "10-3+2=5", False),
        ("48+24=72", "24+48=71", False),
        ("48+24=72", "24+48", False),
        ("2+2=4", "2*2=4", False),
        ("add(n0,n1)", "add(n1,n0)", True),
        ("multiply(#0,const_2)", "multiply(const_2,#0)", True),
        ("subtract(n0,n1)", "subtract(n1,n0)", False),
        ("add(n0,n1)", "multiply(n0,n1)", False),
        ("x+1=2", "1+x=2", False),  # letters are no arithmetic: compared as text
        ("x+1=2", "x+1=2", True),
    ],
)
def test_equivalent(formula, other, same):
    assert equivalent(formula, other) is same
    assert equivalent(other, formula) is same


@pytest.mark.parametrize(
    "formula",
    [
        "__import__('os').system('true')=1",
        "open('/etc/passwd')",
        "9**9**9**9=1",
        "(" * 150 + "1" + ")" * 150,
        "1" + "+1" * 5000,
        "-" * 199 + "1",
        "007+1=8",
        "1//2=0",
        "3(4)=12",
        "1..2=1",
        "()=",
        "=",
        "==",
        "add(n0,n1",
    ],
)
def test_a_formula_is_never_executed(formula):
    """And costs little: what is no arithmetic is equivalent to itself alone."""
    start = time.perf_counter()
    assert equivalent(formula, formula)
    assert not equivalent(formula, "1+1=2")
    scoring.score_formulas(f"<<{formula}>>", "<<1+1=2>>")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "text", ["#### " + " " * 20000, "<<" * 20000, "#### " + "1," * 20000, "9" * 20000, "(" * 20000]
)
def test_long_texts_take_no_time(text):
    start = time.perf_counter()
    score_example("gsm8k", text, "#### 1")
    letter(text)
    assert time.perf_counter() - start < 1


# Prediction, reference, and what differs from zero of the metrics of formulas.
PERFECT = dict.fromkeys(["iou", "overlap", "dice", "precision", "recall", "equivalent_iou"], 1)
NOTHING = {"missing_steps": 1}


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("<<1+2=3>> <<3*4=12>>", "<<1+2=3>> <<3*4=12>>", PERFECT),
        ("<<3*4=12>> <<1+2=3>>", "<<1+2=3>> <<3*4=12>>", PERFECT),  # the order of the steps does not count
        ("<<1 + 2 = 3>>", "<<1+2=3>>", PERFECT),
        ("", "<<1+2=3>>", NOTHING),
        ("#### 3", "<<1+2=3>>", NOTHING),
        ("<<1+2=3", "<<1+2=3>>", NOTHING),
        (
            "<<1+2=3>>",
            "<<1+2=3>> <<3*4=12>>",
            {
                "iou": 1 / 2,
                "overlap": 1,
                "dice": 2 / 3,
                "precision": 1,
                "recall": 1 / 2,
                "equivalent_iou": 1 / 2,
                "missing_steps": 1 / 2,
            },
        ),
        (
            "<<1+2=3>> <<3*4=12>> <<12-5=7>>",
            "<<1+2=3>>",
            {
                "iou": 1 / 3,
                "overlap": 1,
                "dice": 1 / 2,
                "precision": 1 / 3,
                "recall": 1,
                "equivalent_iou": 1 / 3,
                "extra_steps": 2,
            },
        ),
        ("<<1+2=3>> <<1+2=3>>", "<<1+2=3>>", {**PERFECT, "repetitions": 1 / 2}),
        ("<<9-1=8>> <<9-1=8>> <<9-1=8>>", "<<1+2=3>>", {"missing_steps": 1, "extra_steps": 1, "repetitions": 2 / 3}),
        ("<<2+1=3>>", "<<1+2=3>>", {"equivalent_iou": 1, "missing_steps": 1, "extra_steps": 1}),
        ("<<1*2=2>>", "<<1+2=3>>", {"wrong_operators": 1, "missing_steps": 1, "extra_steps": 1}),
        ("<<1+2=4>>", "<<1+2=3>>", {"missing_steps": 1, "extra_steps": 1}),  # only the result is wrong
        ("<<2-5=3>>", "<<5-2=3>>", {"inverted_operands": 1, "missing_steps": 1, "extra_steps": 1}),
        ("<<2-5=3>> <<7+7=14>>", "<<5-2=3>>", {"inverted_operands": 1 / 2, "missing_steps": 1, "extra_steps": 2}),
        ("<<2-5=9>>", "<<5-2=3>>", {"inverted_operands": 1, "missing_steps": 1, "extra_steps": 1}),
        ("<<2+5=8>>", "<<5+2=7>>", {"missing_steps": 1, "extra_steps": 1}),  # a sum has no order
        ("<<1.5*5=6>>", "<<5*1.50=7.50>>", {"missing_steps": 1, "extra_steps": 1}),
        ("<<2+3-1=9>>", "<<3+2-1=4>>", {"missing_steps": 1, "extra_steps": 1}),
        ("<<divide(n1,n0)>>", "<<divide(n0,n1)>>", {"inverted_operands": 1, "missing_steps": 1, "extra_steps": 1}),
        ("<<subtract(n0,n1)>>", "<<add(n0,n1)>>", {"wrong_operators": 1, "missing_steps": 1, "extra_steps": 1}),
        ("<<add(n1,n0)>>", "<<add(n0,n1)>>", {"equivalent_iou": 1, "missing_steps": 1, "extra_steps": 1}),
    ],
)
def test_metrics_of_formulas(prediction, reference, expected):
    found = scoring.score_formulas(prediction, reference)
    assert found == pytest.approx({**dict.fromkeys(found, 0), **expected})


@pytest.mark.parametrize(
    ("task", "prediction", "reference", "exact", "flexible"),
    [
        ("gsm8k", "#### 72", "72", True, True),
        ("gsm8k", "#### 72.0", "#### 72", True, True),
        ("gsm8k", "The answer is 72.", "#### 72", False, True),
        ("gsm8k", "#### 71, no: 72", "#### 72", False, False),
        ("gsm8k", "#### 3", "#### -3", False, False),
        ("gsm8k", "#### 50%", "#### 0.5", False, False),
        ("mathqa", "<<add(n0,n1)>> #### 27.6750", "#### 27.675", True, True),
        ("openbookqa", "B", "B", True, None),
        ("hellaswag", "C", "B", False, None),
        ("openbookqa", "", "B", False, None),
    ],
)
def test_exact_match(task, prediction, reference, exact, flexible):
    found = score_example(task, prediction, reference)
    assert found["exact_match"] == exact
    assert found.get("flexible_match") == flexible


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_score_file(tmp_path):
    path = write(
        tmp_path / "predictions.jsonl",
        {"task": "gsm8k", "prediction": "<<1+2=3>> #### 3", "reference": "<<1+2=3>> #### 3", "id": 7},
        {"task": "gsm8k", "prediction": "#### 4", "answer": "Easy.\n#### 5", "reference": None},  # and no formula there
        {"task": "openbookqa", "prediction": "B", "reference": "B"},
        {"task": "openbookqa", "prediction": "A or B", "reference": "A"},
    )
    found = scoring.score_file(path)
    assert found["openbookqa"] == {"examples": 2, "exact_match": 0.5, "no_answer": 0.5}
    assert (found["gsm8k"]["examples"], found["gsm8k"]["formula_examples"]) == (2, 1)
    assert (found["gsm8k"]["exact_match"], found["gsm8k"]["iou"], found["gsm8k"]["missing_steps"]) == (0.5, 1, 0)


GOOD = {"task": "gsm8k", "prediction": "#### 3", "reference": "#### 3"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: each line must be a JSON object"),
        (json.dumps({**GOOD, "task": "gsm"}), "line 2: task is 'gsm'; allowed: gsm8k, mathqa, openbookqa, hellaswag"),
        (json.dumps({**GOOD, "prediction": None}), "line 2: prediction is missing"),
        (json.dumps({**GOOD, "prediction": 3}), "line 2: prediction is not a text"),
        (json.dumps({**GOOD, "reference": "three"}), "line 2: reference is 'three'; gsm8k needs a number"),
        (json.dumps({**GOOD, "task": "openbookqa"}), "line 2: .*openbookqa needs a letter"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, line, message):
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"predictions.jsonl, {message}"):
        scoring.score_file(path)


def test_bytes_that_are_no_text_and_a_byte_order_mark(tmp_path):
    path, good = tmp_path / "predictions.jsonl", json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n" + good + b"\n\n")
    assert scoring.score_file(path)["gsm8k"]["examples"] == 2
    path.write_bytes(good + b"\n" + good.replace(b"3", b"\xff") + b"\n")
    with pytest.raises(ValueError, match=r"predictions.jsonl, line 2: not JSON: 'utf-8' codec"):
        scoring.score_file(path)


def test_an_empty_file(tmp_path):
    with pytest.raises(ValueError, match="has no predictions"):
        scoring.score_file(write(tmp_path / "predictions.jsonl"))


def test_every_metric_is_described():
    found = {**score_example("gsm8k", "<<1=1>> #### 1", "<<1=1>> #### 1"), "formula_examples": 1}
    assert all(name in scoring.__doc__ for name in found)
    assert canonical("1+1=2") != canonical("1+1=3")


def test_scoring_needs_no_torch():
    code = "import sys, axolotl_cvloss.command.scoring; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"], check=True)
