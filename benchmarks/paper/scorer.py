"""The scores of the paper's datasets for `cvloss compare --score benchmarks.paper.scorer:gsm8k`, and so on.

axolotl_cvloss.command.scoring says what they are. The first, which decides, is exact_match.
"""

from functools import partial

from axolotl_cvloss.command.scoring import score_example

gsm8k = partial(score_example, "gsm8k")
mathqa = partial(score_example, "mathqa")
openbookqa = partial(score_example, "openbookqa")
hellaswag = partial(score_example, "hellaswag")
