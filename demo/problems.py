"""Arithmetic word problems in the format of GSM8K, made up from a seed, and the scorer of their answers.

A problem has the fields of GSM8K: `question`, and `answer` with worked sentences, <<formulas>> and `#### number`.
"""

from __future__ import annotations

import operator
import random
import re

Problem = dict[str, str]
Key = tuple[int, ...]

NAMES = {
    "She": ["Anna", "Beth", "Carla", "Dora", "Elsa", "Fay", "Gina", "Hanna", "Iris", "Judy", "Kira", "Lena"],
    "He": ["Adam", "Ben", "Carl", "Dan", "Emil", "Felix", "Gus", "Hugo", "Ivan", "Jack", "Kurt", "Leo"],
}
THINGS = [
    "apples",
    "beads",
    "books",
    "cards",
    "coins",
    "eggs",
    "pens",
    "plums",
    "shells",
    "stamps",
    "stones",
    "tickets",
]
HOLDERS = ["bags", "boxes", "jars", "baskets", "drawers", "trays"]
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}

# A question, and the steps that solve it: what is done to the value so far, with which number of the question, and a
# sentence around the formula. The first step starts from a.
Step = tuple[str, str, str]
STORIES: list[tuple[str, list[Step]]] = [
    (
        "{name} has {a} {things}. {They} buys {b} more. How many {things} does {name} have?",
        [("+", "b", "{name} has {} {things}.")],
    ),
    (
        "There are {a} {things} on a table. {name} takes {b} of them. How many {things} are left on the table?",
        [("-", "b", "On the table there are {} {things}.")],
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
        [("-", "b", "After selling there are {} {things}."), ("+", "c", "In the evening there are {}.")],
    ),
    (
        "{name} carries {a} {holders} with {b} {things} in each and {c} loose {things}. "
        "How many {things} does {name} carry?",
        [("*", "b", "The {holders} hold {} {things}."), ("+", "c", "With the loose ones {name} carries {}.")],
    ),
    (
        "A shop has {a} {holders} of {b} {things}. {name} buys {c} {things} there. "
        "How many {things} remain in the shop?",
        [("*", "b", "The shop has {} {things}."), ("-", "c", "Then {} {things} remain.")],
    ),
]


def make_problem(rng: random.Random) -> tuple[Key, Problem]:
    """A problem and its key, the story with its numbers, whatever the names and things in it."""
    story = rng.randrange(len(STORIES))
    question, steps = STORIES[story]
    solved: list[tuple[str, int]] = []
    while not solved or min(value for _, value in solved) < 0:
        numbers = {letter: rng.randint(2, 9) for letter in "abc"}
        solved = solve(steps, numbers)
    they = rng.choice(list(NAMES))
    words = {
        "They": they,
        "name": rng.choice(NAMES[they]),
        "things": rng.choice(THINGS),
        "holders": rng.choice(HOLDERS),
    }
    sentences = [step[2].format(worked, **words) for step, (worked, _) in zip(steps, solved, strict=True)]
    answer = " ".join(sentences) + f"\n#### {solved[-1][1]}"
    used = (numbers[letter] for letter in "abc"[: len(steps) + 1])
    return (story, *used), {"question": question.format(**numbers, **words), "answer": answer}


def solve(steps: list[Step], numbers: dict[str, int]) -> list[tuple[str, int]]:
    """What each step writes, as in `3+4=<<3+4=7>>7`, and its value."""
    value, solved = numbers["a"], []
    for symbol, letter, _ in steps:
        formula, value = f"{value}{symbol}{numbers[letter]}", OPERATORS[symbol](value, numbers[letter])
        solved.append((f"{formula}=<<{formula}={value}>>{value}", value))
    return solved


def is_held_out(key: Key) -> bool:
    """A tenth of the stories with their numbers is never trained on."""
    return random.Random(repr(key)).random() < 0.1


def make_problems(count: int, held_out: bool) -> list[Problem]:
    """Different problems, all held out or none."""
    rng = random.Random(f"held out: {held_out}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        key, problem = make_problem(rng)
        if is_held_out(key) == held_out:
            problems[problem["question"]] = problem
    return list(problems.values())


def number_of(text: str) -> str | None:
    """The number after the first `####`; None where there is none."""
    found = re.search(r"####\s*(-?\d+)", text)
    return found.group(1) if found else None


def exact_match(texts: list[str], problems: list[Problem]) -> float:
    """The share of texts whose number after `####` is the problem's."""
    numbers = [number_of(problem["answer"]) for problem in problems]
    return sum(number_of(text) == number for text, number in zip(texts, numbers, strict=True)) / len(problems)
