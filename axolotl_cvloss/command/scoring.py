"""Score generated answers: exact match of the final answer, and the paper's metrics of the formulas on the way.

A file of predictions is JSONL, one example a line::

    {"task": "gsm8k", "prediction": "<<48/2=24>> <<48+24=72>> #### 72", "reference": "<<48/2=24>> ... #### 72"}

task        gsm8k or mathqa (a number and formulas), openbookqa or hellaswag (a letter)
prediction  what the model wrote after the prompt
reference   the target: formulas and ``#### number``, or the number alone; or the letter. GSM8K's whole ``answer``
            does as well, and the field may also be called ``answer``

Other fields are left alone. What a model wrote is never executed.

The metrics
-----------
All are means over the examples, from 0 to 1 (extra_steps may be above 1). P and L are the sets of formulas between
``<<`` and ``>>`` in prediction and reference, without spaces. Examples whose reference has no formula (some of GSM8K)
do not count for the metrics of formulas; ``formula_examples`` says how many do.

exact_match        the final answer is the reference's, by value: ``#### $1,234.50`` is 1234.5, ``#### 48 + 24 = 72`` is
                   72. For letters: accuracy, by the first line
flexible_match     the same, with the last number of the text where there is no ``####`` with a number
no_answer          no answer was found where exact_match looks for it
iou                |P & L| / |P | L|
overlap            |P & L| / min(|P|, |L|), the overlap index
dice               2 |P & L| / (|P| + |L|)
precision          |P & L| / |P|
recall             |P & L| / |L|
equivalent_iou     iou of the formulas up to order: two are the same where one becomes the other by reordering sums and
                   products (also the arguments of add and multiply), and the results are the same numbers
wrong_operators    the share of P - L that has the operands of a formula of L - P, in its order, and other operators
inverted_operands  the share of P - L that has the operators of a formula of L - P and its operands in another order,
                   where the order matters (``2-5`` for ``5-2``, but not ``2+5`` for ``5+2``), whatever the results
missing_steps      |L - P| / |L|
extra_steps        |P - L| / |L|
repetitions        1 - |P| / (number of predicted formulas)

A ratio without a denominator is 0: a prediction without formulas has precision 0 and no repetitions.

Where the paper's own code (DarthReca/segmentation-losses-nlp, utils/metric_calculator.py) differs:

- It scores the argmax under teacher forcing, not generated text.
- It reads the answer as ``\\d+[.,]*\\d*``: ``-3`` and ``$5`` are no answers, ``1/2`` is 1, ``1,234`` is an error. Of a
  choice it compares one character.
- Formulas are the same only where their spaces are, too.
- Dice, precision, recall and overlap count formulas with repetitions below the line, and without them above it.
- References without formulas count, with iou 0 and missing steps 1.
- Its equivalence ignores the result, takes ``2+3*4`` for ``2*3+4``, and divides by the union of the formulas before
  equivalent ones are put together.
- Its wrong operators may differ from the reference in the result alone, and its inverted operands contain them.
"""

import ast
import json
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

NUMBERS, LETTERS = ("gsm8k", "mathqa"), ("openbookqa", "hellaswag")
TASKS = NUMBERS + LETTERS

# An amount: sign and currency in either order, thousands with commas, a fraction or a mixed number, an exponent.
# A minus after a digit or a bracket is a subtraction. More than 30 digits in a row are no number.
_SIGN = "[-+\u2212\u2013]?"  # a hyphen, a minus, a dash
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,30})(?!\d)"
_DECIMAL = rf"{_DIGITS}(?:\.\d{{0,30}}(?!\d))?"
_NUMBER = re.compile(
    rf"""(?<![\w)])(?<!\d[,.])(?P<sign>{_SIGN})(?:[$€£]\ ?(?P<sign2>{_SIGN}))?(?:
        (?:(?P<whole>{_DIGITS})\ )?(?P<above>{_DECIMAL})\ ?/\ ?(?P<sign3>{_SIGN})(?P<below>{_DECIMAL})
        |(?P<decimal>{_DECIMAL}|\.\d{{1,30}}(?!\d))(?P<exponent>[eE][-+]?\d{{1,3}}(?!\d))?
    )(?![,.]?\d)""",
    re.VERBOSE,
)
_FRAC = re.compile(r"\\[dt]?frac\{(\d{1,30})\}\{(\d{1,30})\}")  # of LaTeX
_FORMULA = re.compile(r"<<([^<>]+)>>")
_LETTER = r"([A-H])(?!\w)"
_LEADING = re.compile(rf"\W*{_LETTER}(?P<rest>.*)")
_ANNOUNCED = re.compile(
    rf"(?i:\b(?:answer|option|choice)(?:\s+is)?)\s*:?\s*\W{{0,3}}(?:{_LETTER}(?P<rest>.*)|(?P<small>[a-h])\W*$)"
)
_SECOND = re.compile(rf"\W*(?:,|/|&|\band\b|\bor\b|\bvs\b)\W*{_LETTER}")
_REJECTED = re.compile(rf"(?:(?i:option|choice) )?\W?{_LETTER}\W? is (?:not|wrong|incorrect|false)\b[^.,;]*[.,;]?\s*")
_AS_ARTICLE = re.compile(
    r" (?!(?:is|because|since)\b)[a-z]"
)  # what follows: "A marsh" is no choice, "A is right" is one
_LIST = re.compile(rf"(?:\W+{_LETTER})+\W*")
_LONGEST_FORMULA = 200  # characters; longer ones are compared as text
_MOST_BRACKETS = 20


# Numbers and letters


def number(text: str) -> Fraction | None:
    """The first number of the text: '$1,234.50' -> 1234.5, '-1/2' -> -0.5, '5%' -> 5, 'five' -> None."""
    found = _NUMBER.search(_without_latex(text))
    return _value(found) if found else None


def _without_latex(text: str) -> str:
    return _FRAC.sub(r"\1/\2", text)


def _value(found: re.Match[str]) -> Fraction | None:
    def plain(group: str) -> str:
        return (found[group] or "0").replace(",", "")

    if found["above"]:
        if not Fraction(plain("below")):
            return None
        value = Fraction(plain("above")) / Fraction(plain("below")) + int(plain("whole"))
    else:
        value = Fraction(plain("decimal") + (found["exponent"] or ""))
    signs = [found[group] for group in ("sign", "sign2", "sign3") if found[group]]
    return -value if len(signs) == 1 and signs != ["+"] else value


def final_number(text: str) -> Fraction | None:
    """The number after the first ``####``, up to the end of the line, a formula or the next ``####``.

    In an equation it is the last side that is one number, not a calculation.
    """
    _, mark, after = text.partition("####")
    line = (re.split("####|<<", after)[0].strip().splitlines() or [""])[0] if mark else ""
    sides = [re.sub(rf"^\s*({_SIGN})\s*", r"\1", side) for side in line.split("=")]  # "- 3" is a negative number here
    results = [side for side in sides if len(_NUMBER.findall(_without_latex(side))) == 1]
    return next((found for side in results[-1:] or sides if (found := number(side)) is not None), None)


def last_number(text: str) -> Fraction | None:
    *_, last = (None, *_NUMBER.finditer(_without_latex(text)))
    return _value(last) if last else None


def letter(text: str) -> str | None:
    """The choice: 'B', '(B) because', 'b.', 'The answer is B.' -> 'B'; 'A or B', 'A. B. C.', 'A marsh' -> None."""
    text = text.strip()
    if alone := re.fullmatch(r"\W*([a-h])\W*", text):
        return alone[1].upper()
    line = _REJECTED.sub("", text.partition("\n")[0])
    found = _LEADING.match(line) or _ANNOUNCED.search(line)
    if not found or not found[1]:
        return found and found["small"].upper()
    if found[1] == "A" and _AS_ARTICLE.match(found["rest"]):
        return None
    second = _SECOND.match(found["rest"])
    others = re.findall(_LETTER, found["rest"]) if _LIST.fullmatch(found["rest"]) else [second[1]] if second else []
    return found[1] if {found[1], *others} == {found[1]} else None


# Formulas


def formulas(text: str) -> list[str]:
    """What stands between << and >>, without spaces, in lower case; what is not closed is no formula."""
    return [kept for found in _FORMULA.findall(text) if (kept := re.sub(r"\s+", "", found).lower())]


def canonical(formula: str) -> Any:
    """Equal for formulas that differ in the order of sums and products alone; the formula itself if it is no such."""
    called = re.fullmatch(r"(\w+)\(([^()]*)\)", formula)
    if called:  # MathQA: one operation a step
        arguments = called[2].split(",")
        return called[1], tuple(sorted(arguments) if called[1] in ("add", "multiply") else arguments)
    left, equals, right = _sides(formula)
    try:
        key = _key(_tree(left))
    except ValueError:
        return formula
    result = number(right) if _NUMBER.fullmatch(right) else right
    return key, equals, str(result)


def equivalent(formula: str, other: str) -> bool:
    return bool(canonical(formula) == canonical(other))


def operators_and_operands(formula: str) -> tuple[list[str], list[str]]:
    """'(4-1)*3=9' -> ['-', '*'], ['4', '1', '3']; 'add(n0,n1)' -> ['add'], ['n0', 'n1']. The result does not count."""
    called = re.fullmatch(r"(\w+)\(([^()]*)\)", formula)
    if called:
        return [called[1]], called[2].split(",")
    left = _sides(formula)[0]
    operands = [operand for operand in re.split(r"[-+*/()]+", left) if operand]
    values = [str(number(operand) if _NUMBER.fullmatch(operand) else operand) for operand in operands]
    return re.findall(r"[-+*/]", left), values


def _sides(formula: str) -> tuple[str, str, str]:
    plain = re.sub(r"[$€£]|(?<=\d),(?=\d{3}(?!\d))", "", formula)
    left, equals, right = plain.rpartition("=")
    return (left, equals, right) if equals else (plain, "", "")


def _tree(text: str) -> ast.expr:
    """Only digits, points, brackets and + - * / come to the parser, and never very many: it is not for hostile text."""
    if len(text) > _LONGEST_FORMULA or text.count("(") > _MOST_BRACKETS or not re.fullmatch(r"[\d.+\-*/()]+", text):
        raise ValueError("not an arithmetic expression")
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(str(error)) from error


def _key(node: ast.expr) -> tuple[Any, ...]:
    """A sum as its sorted signed terms, a product as its sorted factors and divisors, a number as a fraction."""
    match node:
        case ast.Constant(value=int() | float()):
            return ("number", Fraction(str(node.value)))
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()) | ast.BinOp(op=ast.Add() | ast.Sub()):
            return ("sum", *sorted(_terms(node, 1), key=repr))
        case ast.BinOp(op=ast.Mult() | ast.Div()):
            return ("product", *sorted(_factors(node, 1), key=repr))
    raise ValueError("not an arithmetic expression")


def _terms(node: ast.expr, sign: int) -> list[tuple[int, Any]]:
    match node:
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as op, right=right):
            return _terms(left, sign) + _terms(right, -sign if isinstance(op, ast.Sub) else sign)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as op, operand=operand):
            return _terms(operand, -sign if isinstance(op, ast.USub) else sign)
    return [(sign, _key(node))]


def _factors(node: ast.expr, power: int) -> list[tuple[int, Any]]:
    match node:
        case ast.BinOp(left=left, op=ast.Mult() | ast.Div() as op, right=right):
            return _factors(left, power) + _factors(right, -power if isinstance(op, ast.Div) else power)
    return [(power, _key(node))]


# Scores


def score_formulas(prediction: str, reference: str) -> dict[str, float]:
    """The metrics of formulas of one example; the module's text defines them."""
    written, wanted = formulas(prediction), set(formulas(reference))
    predicted = set(written)
    both, wrong, missed = predicted & wanted, predicted - wanted, wanted - predicted
    same_predicted, same_wanted = set(map(canonical, predicted)), set(map(canonical, wanted))
    kinds = [_slip(formula, missed) for formula in wrong]
    return {
        "iou": _ratio(len(both), len(predicted | wanted)),
        "overlap": _ratio(len(both), min(len(predicted), len(wanted))),
        "dice": _ratio(2 * len(both), len(predicted) + len(wanted)),
        "precision": _ratio(len(both), len(predicted)),
        "recall": _ratio(len(both), len(wanted)),
        "equivalent_iou": _ratio(len(same_predicted & same_wanted), len(same_predicted | same_wanted)),
        "wrong_operators": _ratio(kinds.count("operators"), len(wrong)),
        "inverted_operands": _ratio(kinds.count("operands"), len(wrong)),
        "missing_steps": _ratio(len(missed), len(wanted)),
        "extra_steps": _ratio(len(wrong), len(wanted)),
        "repetitions": _ratio(len(written) - len(predicted), len(written)),
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _slip(formula: str, missed: Iterable[str]) -> str | None:
    """Whether it is a missed formula with other operators or with operands inverted; the results do not count."""
    left = _sides(formula)[0]
    operators, operands = operators_and_operands(formula)
    others = [operators_and_operands(other) for other in missed if not equivalent(left, _sides(other)[0])]
    if any(operands == there and operators != signs for signs, there in others):
        return "operators"
    if any(operators == signs and operands != there and sorted(operands) == sorted(there) for signs, there in others):
        return "operands"
    return None


def score_example(task: str, prediction: str, reference: str) -> dict[str, float]:
    """Every metric of one example; those of formulas only where the reference has formulas."""
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; allowed: {', '.join(TASKS)}")
    right: Fraction | str | None
    given: Fraction | str | None
    if task in LETTERS:
        right, given = letter(reference), letter(prediction)
    else:
        right, given = final_number(reference) if "####" in reference else number(reference), final_number(prediction)
    if right is None:
        what = "a letter" if task in LETTERS else "a number after ####, or a number"
        raise ValueError(f"reference is {reference!r}; {task} needs {what}")
    scores: dict[str, float] = {"exact_match": given == right, "no_answer": given is None}
    if task in NUMBERS:
        scores["flexible_match"] = (last_number(prediction) if given is None else given) == right
        if formulas(reference):
            scores.update(score_formulas(prediction, reference))
    return scores


def score(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """For each task the mean of its metrics, and the number of examples. A record has the fields of a line."""
    by_task: dict[str, list[dict[str, float]]] = {}
    for number_of_line, record in enumerate(records, start=1):
        try:
            task, prediction, reference = _fields(record)
            by_task.setdefault(task, []).append(score_example(task, prediction, reference))
        except ValueError as error:
            raise ValueError(f"line {number_of_line}: {error}") from error
    return {task: _means(scores) for task, scores in by_task.items()}


def score_file(path: str | Path) -> dict[str, dict[str, float]]:
    """`score` of a JSONL file. A ValueError names the file and the line that is wrong."""
    text = Path(path).read_bytes().rstrip()
    if not text:
        raise ValueError(f"{path} has no predictions; each line is a JSON object with task, prediction and reference")
    try:
        return score(_parse(line, i) for i, line in enumerate(text.split(b"\n"), start=1))
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from error


def _parse(line: bytes, number_of_line: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number_of_line}: not JSON: {error}") from error


def _fields(record: Any) -> tuple[str, str, str]:
    if not isinstance(record, Mapping):
        raise ValueError("each line must be a JSON object with task, prediction and reference")
    task, prediction, reference = (record.get(field) for field in ("task", "prediction", "reference"))
    reference = record.get("answer") if reference is None else reference
    for field, value in ("task", task), ("prediction", prediction), ("reference", reference):
        if not isinstance(value, str):
            raise ValueError(f"{field} is {'missing' if value is None else 'not a text'}")
    return str(task), str(prediction), str(reference)


def _means(scores: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for example in scores for name in example)
    means: dict[str, float] = {"examples": len(scores)}
    if "iou" in names:
        means["formula_examples"] = sum("iou" in example for example in scores)
    for name in names:
        means[name] = fmean(float(example[name]) for example in scores if name in example)
    return means
