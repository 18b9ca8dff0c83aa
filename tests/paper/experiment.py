"""Where the code of the experiment lies, and rows as its datasets have them."""

import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "paper"


def gsm8k(count):
    return [{"question": f"What is {i} and 1?", "answer": f"<<{i}+1={i + 1}>>\n#### {i + 1}"} for i in range(count)]


def mathqa(count):
    row = {"options": "a ) 1 , b ) 2", "linear_formula": "add(n0,n1)|"}
    return [{**row, "Problem": f"problem {i}", "correct": "ae"[i % 2]} for i in range(count)]  # e is no option


def openbookqa(count):
    choices = {"label": ["A", "B"], "text": ["yes", "no"]}
    return [{"question_stem": f"Is it {i}?", "choices": choices, "answerKey": "AB"[i % 2]} for i in range(count)]


def hellaswag(count):
    return [{"ctx": f"{i} people", "endings": ["go", "stay"], "label": str(i % 2)} for i in range(count)]


def write(folder, **files):
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
