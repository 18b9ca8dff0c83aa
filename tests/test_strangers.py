"""Losses of strangers with a slip: an error at the first step that names the loss; and names and counts of terms."""

import pytest
import torch
from helpers import temporary_losses

from axolotl_cvloss import Objective, register_loss

LABELS = torch.tensor([0, 1, 1, 2, 0])


@pytest.fixture(autouse=True)
def _forgotten():
    with temporary_losses():
        yield


def result(key, **more):
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    return Objective.from_config(key).from_logits(logits, LABELS, shift=False, **more)


@pytest.mark.parametrize(
    ("family", "function"),
    [
        ("token", lambda logp: -logp.detach()),
        ("row", lambda logits, labels: (logits.argmax(1) != labels).to(logits.dtype)),
        ("region", lambda intersection, labelled: 1 - intersection.detach() / labelled),
        ("document", lambda logp: -logp.detach().mean()),
        ("ranking", lambda errors, labelled: labelled * errors.detach().sum()),
        ("dense", lambda probabilities, labels: (probabilities.argmax(1) != labels).to(probabilities.dtype)),
    ],
)
@pytest.mark.parametrize("beside", [{}, {"cross_entropy": 1.0}], ids=["alone", "beside another"])
def test_a_value_that_does_not_depend_on_the_logits(family, function, beside):
    register_loss("stuck", family=family)(function)
    with pytest.raises(ValueError, match="'stuck' returns a value that does not depend on the logits"):
        result({"stuck": 1.0, **beside})
    with torch.no_grad():
        assert result({"stuck": 1.0}).loss.isfinite()  # an evaluation wants no gradient


@pytest.mark.parametrize(("given", "said"), [(None, "NoneType"), (1.0, "float")])
@pytest.mark.parametrize(
    ("family", "statistic"),
    [
        *(("token", "logp"), ("document", "logp"), ("region", "intersection")),
        *(("row", "logits"), ("dense", "logits"), ("ranking", "errors")),
    ],
)
def test_no_tensor(family, statistic, given, said):
    namespace = {"given": given}
    exec(f"def function({statistic}): return given", namespace)
    register_loss("odd", family=family)(namespace["function"])
    with pytest.raises(ValueError, match=rf"loss 'odd' must return .*, not {said}"):
        result("odd")


@pytest.mark.parametrize(
    ("family", "function", "allowed"),
    [
        ("document", lambda logp: -logp, "a scalar"),
        ("ranking", lambda errors: errors.sum(), r"one value a class, shape \(4,\)"),
        ("document", lambda logp, rows: -logp, r"one value a set, shape \(2,\)"),
        ("dense", lambda logits, labels: logits, r"a scalar or one value a row, shape \(\d,\)"),
    ],
)
def test_too_many_values(family, function, allowed):
    register_loss("many", family=family)(function)
    with pytest.raises(ValueError, match=rf"loss 'many' must return {allowed}, not \("):
        result("many", position_ids=torch.tensor([0, 1, 2, 0, 1]))


def test_the_second_use_of_a_loss_never_has_the_name_of_another_loss():
    register_loss("focal_2", family="token")(lambda logp: -2 * logp)
    names = [term.name for term in Objective.from_config({"terms": ["focal", "focal", "focal_2"]}).terms]
    assert names == ["focal", "focal_3", "focal_2"]


def test_a_mapping_of_counts_that_leaves_rows_out():
    """They are divided by their own number, and not by 1."""
    torch.testing.assert_close(result("focal", num_items_in_batch={}).loss, result("focal").loss)


def test_weights_of_tokens_are_shifted_with_the_labels_in_one_dimension_too():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([9.0, 1.0, 0.0, 2.0, 0.5])
    objective = Objective.from_config("cross_entropy")
    flat = objective.from_logits(logits, LABELS, example_weights=weights).loss
    torch.testing.assert_close(
        flat, objective.from_logits(logits[None], LABELS[None], example_weights=weights[None]).loss
    )
