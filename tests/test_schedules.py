"""Weights and parameters that change over training."""

import math

import pytest
import torch

from axolotl_cvloss import Objective
from axolotl_cvloss.objective.config import ConfigError, CVLossConfig

RISING = {"from": 0.0, "to": 0.4, "over": 0.3}


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (RISING, {0.0: 0.0, 0.15: 0.2, 0.3: 0.4, 0.9: 0.4}),
        ({"from": 1.0, "to": 0.5}, {0.0: 1.0, 0.5: 0.75, 1.0: 0.5}),
        (
            {"from": 0.0, "to": 2.0, "over": 0.5, "shape": "cosine"},
            {0.0: 0.0, 0.125: 1 - math.cos(math.pi / 4), 0.25: 1.0, 0.5: 2.0, 1.0: 2.0},
        ),
    ],
)
def test_weight(schedule, values):
    logits, labels = torch.randn(6, 9, dtype=torch.float64), torch.arange(6)
    objective = Objective.from_config({"cross_entropy": 0.6, "lovasz": {"weight": schedule}})
    for progress, weight in values.items():
        result = objective.from_logits(logits, labels, shift=False, progress=progress)
        expected = 0.6 * result.terms["cross_entropy"] + weight * result.terms["lovasz"]
        torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=1e-15)


def test_parameter():
    logits, labels = torch.randn(6, 9, dtype=torch.float64), torch.arange(6)
    objective = Objective.from_config({"focal": {"gamma": {"from": 0, "to": 4, "over": 0.5}}})
    for progress, gamma in {0.0: 0.0, 0.25: 2.0, 0.5: 4.0, 1.0: 4.0}.items():
        same = Objective.from_config({"focal": {"gamma": gamma}})
        changing = objective.from_logits(logits, labels, shift=False, progress=progress)
        assert changing.loss == same.from_logits(logits, labels, shift=False).loss


def test_it_survives_the_long_form():
    config = CVLossConfig.parse({"focal": {"weight": RISING, "gamma": {"from": 0.0, "to": 3.0, "shape": "cosine"}}})
    assert CVLossConfig.parse(config.dump()).dump() == config.dump()
    assert config.dump()["terms"][0]["weight"] == {**RISING, "shape": "linear"}


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"gamma": {"from": 0, "to": -2}}, "cv_loss.focal.gamma: must be a finite number >= 0, not -2.0"),
        ({"weight": {"from": -1, "to": 1}}, "cv_loss.focal.weight: must be a finite number >= 0, not -1.0"),
        ({"gamma": {"from": 0}}, "cv_loss.focal.gamma.to: is missing; give a finite number"),
        ({"gamma": {"from": 0, "to": True}}, "cv_loss.focal.gamma.to: must be a finite number, not True"),
        ({"weight": {"from": 0, "to": 1, "over": 0}}, "weight.over: must be a finite number > 0 and <= 1, not 0"),
        ({"weight": {"from": 0, "to": 1, "over": 1.5}}, "weight.over: must be a finite number > 0 and <= 1, not 1.5"),
        ({"weight": {"from": 0, "to": 1, "shape": "round"}}, "weight.shape: must be one of linear, cosine"),
        ({"weight": {"from": 0, "to": 1, "ovr": 1}}, "weight.ovr: unknown field; did you mean over?"),
        ({"scope": {"from": 0, "to": 1}}, "cv_loss.focal.scope: must be one of completion, sequence"),
    ],
)
def test_mistakes_are_named(term, message):
    with pytest.raises(ConfigError) as error:
        CVLossConfig.parse({"focal": term})
    assert message in str(error.value)


def test_a_truth_value_has_no_schedule():
    with pytest.raises(ConfigError, match="detach_weight: must be true or false"):
        CVLossConfig.parse({"self_adjusting_dice": {"detach_weight": {"from": 0, "to": 1}}})
