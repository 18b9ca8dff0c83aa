"""What a stranger writes by mistake, and what is said to them."""

import pytest

import axolotl_cvloss
from axolotl_cvloss.command.checking import check
from axolotl_cvloss.objective.config import ConfigError, CVLossConfig

AXOLOTL = {"base_model": "some/model", "plugins": ["axolotl_cvloss.CVLossPlugin"]}


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        *dict.fromkeys(["ce", "xent", "nll", "CE-loss"], "cross_entropy").items(),
        *dict.fromkeys(["iou", "IoU", "mIoU", "iou_loss"], "jaccard").items(),
        ("ohem", "topk_cross_entropy"),
        ("f1", "dice"),
        ("gdl", "generalized_dice"),
        ("z-loss", "z_regularized"),
    ],
)
def test_other_names_of_losses(word, meant):
    with pytest.raises(ConfigError, match=rf"did you mean {meant}\?"):
        CVLossConfig.parse({word: 1})


def test_the_name_of_the_plugin():
    with pytest.raises(AttributeError, match=r"has no attribute 'CVLoss'; did you mean CVLossPlugin\?"):
        axolotl_cvloss.CVLoss  # noqa: B018


@pytest.mark.parametrize(
    ("key", "more", "warning"),
    [
        ({"cross_entropy": 0.6, "generalized_dice": 0.4, "reference": True}, {}, "so it changes nothing"),
        ({"focal": 0.5, "dft": 0.5}, {}, "together they undo each other"),
        (
            {"focal": 1, "reference": "adapter_off"},
            {"adapter": "lora"},
            "adapter_off changes nothing, as no term looks at a reference model",
        ),
        (
            {"focal": 1, "reference_logps": "base"},
            {},
            "reference_logps: base changes nothing, as no term looks at a reference model",
        ),
        (
            {"cross_entropy": 0.6, "dice": {"weight": 0.4, "per": "batch"}},
            {"micro_batch_size": 1},
            "cv_loss.dice.per: batch is the micro-batch, and that is of one example",
        ),
    ],
)
def test_check_warns(key, more, warning):
    assert any(warning in line for line in check({**AXOLOTL, **more, "cv_loss": key}).warnings)


NEEDED = "it needs log p of each token under a reference model"
TRL = {"model_name_or_path": "some/model", "dataset_name": "some/data"}


@pytest.mark.parametrize(
    ("host", "key", "error"),
    [
        ({**AXOLOTL, "adapter": "lora"}, "anchored", f"cv_loss.anchored: {NEEDED}"),
        (TRL, {"cross_entropy": 0.5, "importance_weighted": 0.5}, f"cv_loss.importance_weighted: {NEEDED}"),
        (AXOLOTL, {"anchored": 1, "reference": "adapter_off"}, "cv_loss.reference: adapter_off needs an adapter"),
        (TRL, {"anchored": 1, "reference": "adapter_off"}, "cv_loss.reference: adapter_off needs an adapter"),
        (AXOLOTL, {"anchored": 1, "reference_logps": "base"}, None),
        (TRL, {"prior_weighted": 1, "reference_logps": "base"}, None),
        (
            {**TRL, "use_peft": True},
            {"anchored": 1, "reference_logps": "base", "reference": "adapter_off"},
            "cv_loss.reference: adapter_off is another reference than reference_logps; leave one of them out",
        ),
        ({**AXOLOTL, "adapter": "qlora"}, {"anchored": 1, "reference": "adapter_off"}, None),
        ({**TRL, "use_peft": True}, {"prior_weighted": 1, "reference": "adapter_off"}, None),
    ],
)
def test_check_knows_where_the_reference_is(host, key, error):
    report = check({**host, "cv_loss": key})
    assert [line.startswith(error) for line in report.errors] == ([True] if error else [])
    if report.config is not None:
        assert report.config.dump() == CVLossConfig.parse(report.config.dump()).dump()


def test_plugins_as_a_text():
    (error,) = check({**AXOLOTL, "plugins": "axolotl_cvloss.CVLossPlugin", "cv_loss": "focal"}).errors
    assert error.startswith("plugins: must be a list, such as [axolotl_cvloss.CVLossPlugin]")


def test_a_config_of_axolotl_for_trl():
    (error,) = check({**AXOLOTL, "cv_loss": "focal"}, "trl").errors
    assert error.startswith("base_model and plugins are keys of Axolotl, which TRL does not know")
