"""The lines of docs/migration.md train with the gradient of the code that they take the place of."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_docs import DOCS

from axolotl_cvloss import Objective

ROWS = re.findall(r"^\| (\w.*?) \| (.*?) \|", (DOCS / "migration.md").read_text(encoding="utf-8"), re.MULTILINE)


def config(beginning):
    """The key in the row of the page that begins so."""
    (here,) = [here for there, here in ROWS if there.startswith(beginning)]
    return yaml.safe_load(re.fullmatch(r"`(cv_loss: .*)`", here)[1])["cv_loss"]


def test_every_line_is_a_key():
    lines = [here[1:-1] for _, here in ROWS if here.startswith("`cv_loss")]
    assert len(lines) > 10
    for line in lines:
        Objective.from_config(yaml.safe_load(line)["cv_loss"])


def axolotl_eaft(outputs, labels):
    return pytest.importorskip("axolotl.monkeypatch.loss.eaft").eaft_loss(outputs, labels)


def trl_dft(outputs, labels):
    return pytest.importorskip("trl.trainer.sft_trainer").dft_loss(outputs, labels.clone())


def label_smoother(outputs, labels):
    smoother = pytest.importorskip("transformers.trainer_pt_utils").LabelSmoother(epsilon=0.1)
    return smoother({"logits": outputs.logits}, labels, shift_labels=True)


def causal_lm(outputs, labels):
    loss = pytest.importorskip("transformers.loss.loss_utils").ForCausalLMLoss
    return loss(outputs.logits, labels, vocab_size=outputs.logits.shape[-1])


def llama_factory_eaft(outputs, labels):
    """``_eaft_cross_entropy`` of LLaMA-Factory, which is not installed, after its formula."""
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    logits, labels = logits[labels != -100], labels[labels != -100]
    top = logits.detach().topk(20).values.log_softmax(-1)
    weights = -(top.exp() * top).sum(-1) / 3.0
    return (weights * torch.nn.functional.cross_entropy(logits, labels, reduction="none")).mean()


def xtuner(power):
    """``CELossContext.build_batches`` of xtuner, which is not installed: each document's rows weigh n^-power."""

    def loss(outputs, labels):
        rows = zip(outputs.logits[:, :-1], labels[:, 1:], strict=True)
        sums, weights = [], []
        for logits, targets in rows:
            weight = float((targets != -100).sum()) ** -power
            sums.append(weight * torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            weights.append(weight * float((targets != -100).sum()))
        return sum(sums) / sum(weights)

    return loss


@pytest.mark.parametrize(
    ("row", "theirs", "digits"),
    [
        ("Axolotl: `use_eaft`", axolotl_eaft, 4),  # the digits of the weight in the row
        ("LLaMA-Factory: `use_eaft_loss`", llama_factory_eaft, 4),
        ("TRL: `loss_type: dft`", trl_dft, None),
        ("TRL: `loss_type: nll`", causal_lm, None),
        ("Trainer, TRL: `label_smoothing_factor", label_smoother, None),
        ("xtuner: `loss_reduction: sample`", xtuner(1.0), None),
        ("xtuner: `loss_reduction: square`", xtuner(0.5), None),
    ],
)
def test_the_gradient_is_theirs(row, theirs, digits):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 30, generator=generator, requires_grad=True)
    labels = torch.randint(0, 30, (2, 9), generator=generator)
    labels[0, :4] = -100
    ours = Objective.from_config(config(row)).from_logits(logits, labels).loss
    losses = [theirs(SimpleNamespace(logits=logits), labels), ours]
    wanted, found = (torch.autograd.grad(loss, logits)[0] for loss in losses)
    eps = torch.finfo(torch.float32).eps
    rtol = 16 * math.sqrt(30) * eps if digits is None else 10.0**-digits
    # Axolotl adds 1e-10 within its logarithm, which is less than a rounding.
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))
