"""`reference: true` gives the values of the paper's code, and the default differs where that is wrong."""

import pytest
import torch
from helpers import IGNORE, Batch, make_batch
from listed import close, evaluate, naive, objective

PAPER = ["cross_entropy", "focal", "self_adjusting_dice", "generalized_dice", "lovasz"]
GOLDEN_CASES = ["all_classes_present", "masked_prompt", "wide_vocab", "confident", "one_token"]


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_reference_mode_gives_the_papers_values(golden, case, name):
    batch = Batch(golden[f"{case}/logits"], golden[f"{case}/labels"], None, {"shift": False})
    leaf = batch.logits.clone().requires_grad_()
    result = batch.result(objective({"loss": name}, reference=True), leaf)
    result.loss.backward()
    torch.testing.assert_close(result.loss.detach(), golden[f"{case}/{name}/value"], rtol=1e-5, atol=1e-25)
    grad = leaf.grad.flatten(0, 1)[golden[f"{case}/rows"]]
    torch.testing.assert_close(grad, golden[f"{case}/{name}/grad"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PAPER)
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_the_default_differs_from_the_papers_code_where_that_is_wrong(golden, case, name):
    labels = golden[f"{case}/labels"]
    batch = Batch(golden[f"{case}/logits"], labels, None, {"shift": False})
    # The paper takes the whole batch as the set of lovasz, and each line as one of generalized_dice.
    per = {"lovasz": {"per": "batch"}}.get(name, {})
    result, gradient = evaluate(batch, {"loss": name, **per})
    value, its_gradient, its_norm = (golden[f"{case}/{name}/{what}"] for what in ("value", "grad", "norm"))
    ours = gradient.flatten(0, 1)[golden[f"{case}/rows"]]
    masked = bool((labels == IGNORE).any())
    # In "confident" token 0 is a label too, and an error of 1 already, so masked rows cannot make it worse.
    blind = (case, name) == ("confident", "lovasz")
    same = name == "cross_entropy" or (name != "generalized_dice" and not masked) or blind
    equal = torch.isclose(result.loss, value, rtol=1e-5) and (ours - its_gradient).norm() < 1e-4 * ours.norm()
    assert bool(equal) == same
    if name == "generalized_dice" and case != "all_classes_present":
        # Absent classes drown the paper's, which trains nothing.
        assert its_norm < 1e-10 < 1e-4 < gradient.norm()


def test_reference_mode_in_a_mixture():
    """The paper's recipe: cross-entropy over prompt and answer, the other loss over the answer."""
    batch = make_batch("padded", 19)
    terms = [{"loss": "cross_entropy", "weight": 0.6, "scope": "sequence"}, {"loss": "lovasz", "weight": 0.4}]
    result = batch.result(objective(*terms, reference=True))
    parts = [batch.result(objective({**t, "weight": 1.0}, reference=True)) for t in terms]
    close(result.loss, 0.6 * parts[0].loss + 0.4 * parts[1].loss, 1e-12)
    close(parts[0].loss, naive(batch, {"loss": "cross_entropy", "scope": "sequence"})[0])
    close(result.nll, naive(batch, {"loss": "cross_entropy"})[0])
    assert result.counts == {"cross_entropy": len(batch.rows("sequence")), "lovasz": len(batch.rows())}
