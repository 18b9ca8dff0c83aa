"""MathQA (allenai/math_qa: Problem, options, correct, linear_formula). The target is the formula, then the number.

As in the paper's code the options are not shown: the model writes the steps of ``linear_formula`` and the value of
the right option, and problems whose right option is not one number are left out. Two slips of that code are not
repeated: it loses the last step of a formula that does not end in "|" (every fifth problem), and it splits the
options at every comma, so that "1,600" becomes 1 or another option's value.
"""

import re

from axolotl_cvloss.hosts.axolotl_prompts import Row, loader, question


def example(row: Row) -> tuple[str, str] | None:
    """'add(n0,n1)|power(#0,n2)', 'a ) 38 , b ) rs . 40', 'b' -> '<<add(n0,n1)>> <<power(#0,n2)>> #### 40.0'"""
    parts = re.split(r"(?:^|,)\W*([a-e]) \) ", row["options"])  # "", "a", "38 ", "b", "rs . 40"
    right = dict(zip(parts[1::2], parts[2::2], strict=True)).get(row["correct"], "")
    try:
        number = float(re.sub(r"^[^\d+-]+|[^\d+-]+$|(?<=\d),(?=\d{3}\b)", "", right))
    except ValueError:
        return None
    steps = [f"<<{step}>>" for step in row["linear_formula"].split("|") if step]
    return question(row["Problem"]), " ".join([*steps, f"#### {number}"])


load = loader(example)
