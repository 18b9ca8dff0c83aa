"""What the task files of this folder call: the package's prompts, targets and scorer."""

from axolotl_cvloss.command.scoring import score_example
from axolotl_cvloss.hosts.axolotl_prompts import gsm8k, hellaswag, mathqa, openbookqa

EXAMPLES = {module.__name__.rpartition(".")[2]: module.example for module in (gsm8k, hellaswag, mathqa, openbookqa)}


def _keep(name):
    return lambda dataset: dataset.filter(lambda row: EXAMPLES[name](row) is not None)


def _prompt(name):
    return lambda row: EXAMPLES[name](row)[0]


def _target(name):
    return lambda row: EXAMPLES[name](row)[1]


def _score(name):
    return lambda row, results: {
        metric: float(value) for metric, value in score_example(name, results[0], EXAMPLES[name](row)[1]).items()
    }


gsm8k_prompt, gsm8k_target, gsm8k_score = _prompt("gsm8k"), _target("gsm8k"), _score("gsm8k")
mathqa_prompt, mathqa_target, mathqa_score = _prompt("mathqa"), _target("mathqa"), _score("mathqa")
openbookqa_prompt, openbookqa_target = _prompt("openbookqa"), _target("openbookqa")
openbookqa_score, hellaswag_score = _score("openbookqa"), _score("hellaswag")
hellaswag_prompt, hellaswag_target = _prompt("hellaswag"), _target("hellaswag")
mathqa_rows, hellaswag_rows = _keep("mathqa"), _keep("hellaswag")  # the others keep every row
