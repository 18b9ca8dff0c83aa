"""Arithmetic word problems in the GSM8K format, made up from a seed, and the scorer of their answers.

A problem has the fields of GSM8K, `question` and `answer` (worked sentences with <<formulas>>, then `#### number`), and
`target`, what a model is trained to write: the formulas and `#### number` alone.
"""

from __future__ import annotations

import operator
import random
import re

NAMES = {
    "She": "Anna Beth Carla Dora Elsa Fay Gina Hanna Iris Judy Kira Lena".split(),
    "He": "Adam Ben Carl Dan Emil Felix Gus Hugo Ivan Jack Kurt Leo".split(),
}
THINGS = "apples beads books cards coins eggs pens plums shells stamps stones tickets".split()
HOLDERS = "bags boxes jars baskets drawers trays".split()

# The numbers a, b, c of a story lie in 2..SMALL; c of a taking-away step never exceeds what is there.
SMALL = 9
# Each step is an operator and the number it takes; `then` is the worked sentence around the formula.
STORIES = [
    (
        "{name} has {a} {things}. {They} buys {b} more. How many {things} does {name} have?",
        [("+", "b", "{name} has {} {things}.")],
    ),
    (
        "There are {a} {things} on a table. {name} takes {b} of them. How many {things} are left on the table?",
        [("-", "b", "On the table {} {things} are left.")],
    ),
    (
        "{name} fills {a} {holders}. {They} puts {b} {things} in each. How many {things} are there in the {holders}?",
        [("*", "b", "The {holders} hold {} {things}.")],
    ),
    (
        "{name} finds {a} {things} on Monday and {b} on Tuesday, then loses {c}. How many {things} does {name} keep?",
        [("+", "b", "{They} finds {} {things}."), ("-", "c", "{They} keeps {} of them.")],
    ),
    (
        "{name} starts a day with {a} {things} and sells {b} of them. Later {name} makes {c} new ones. "
        "How many {things} does {name} have in the evening?",
        [("-", "b", "After selling, {} {things} are left."), ("+", "c", "In the evening there are {}.")],
    ),
    (
        "{name} carries {a} {holders} with {b} {things} in each and {c} loose {things}. "
        "How many {things} does {name} carry?",
        [("*", "b", "The {holders} hold {} {things}."), ("+", "c", "With the loose ones {name} carries {}.")],
    ),
    (
        "A shop has {a} {holders} of {b} {things}. {name} buys {c} {things} there. How many {things} remain in the shop?",
        [("*", "b", "The shop has {} {things}."), ("-", "c", "After that {} {things} remain.")],
    ),
]
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def solve(steps: list[tuple[str, str, str]], numbers: dict[str, int]) -> list[tuple[str, int]]:
    """The formula and the value of every step, each step going on from the value before."""
    value, solved = numbers["a"], []
    for symbol, letter, _ in steps:
        result = OPERATORS[symbol](value, numbers[letter])
        solved.append((f"{value}{symbol}{numbers[letter]}={result}", result))
        value = result
    return solved


def make_problem(rng: random.Random) -> tuple[tuple, dict[str, str]]:
    """One problem and its key: the story with its numbers, whatever the names and things in it."""
    index = rng.randrange(len(STORIES))
    question, steps = STORIES[index]
    while True:
        numbers = {letter: rng.randint(2, SMALL) for letter in "abc"}
        solved = solve(steps, numbers)
        if all(value >= 0 for _, value in solved):
            break
    they = rng.choice(list(NAMES))
    words = {
        "name": rng.choice(NAMES[they]),
        "They": they,
        "things": rng.choice(THINGS),
        "holders": rng.choice(HOLDERS),
    }
    sentences = [
        sentence.format(f"<<{formula}>>{value}", **words)
        for (_, _, sentence), (formula, value) in zip(steps, solved)
    ]
    answer = " ".join(sentences) + f"\n#### {solved[-1][1]}"
    used = tuple(numbers[letter] for letter in ["a", *(letter for _, letter, _ in steps)])
    problem = {"question": question.format(**numbers, **words), "answer": answer, "target": target_of(answer)}
    return (index, *used), problem


def is_held_out(key: tuple) -> bool:
    """One tenth of the stories with their numbers are kept for the held-out problems."""
    return random.Random(repr(key)).random() < 0.1


def make_problems(count: int, held_out: bool, seed: int = 0) -> list[dict]:
    """Different problems; no story of the held-out ones occurs in training with the same numbers."""
    rng = random.Random(seed)
    problems: dict[str, dict] = {}
    while len(problems) < count:
        key, problem = make_problem(rng)
        if is_held_out(key) == held_out:
            problems[problem["question"]] = problem
    return list(problems.values())


def target_of(answer: str) -> str:
    """The formulas of a GSM8K answer and its last line: `<<3+4=7>> <<7*2=14>> #### 14`."""
    return " ".join([*re.findall(r"<<.*?>>", answer), answer[answer.index("####") :]])


def number_of(text: str) -> str | None:
    """The number after the first `####`, None where there is none."""
    found = re.search(r"####\s*(-?\d+)", text)
    return found.group(1) if found else None


def exact_match(texts: list[str], problems: list[dict]) -> float:
    """The share of texts whose number after `####` is the problem's."""
    right = [
        number_of(text) == number_of(problem["answer"])
        for text, problem in zip(texts, problems, strict=True)
    ]
    return sum(right) / len(right)
