"""A package of somebody else's, tests/guest, really installed: its losses train with nothing but their formula."""

import json
import sys

import pytest
import torch
from helpers import GUEST_MIX

# The formulas again, by the definition, on tensors.
VALUES = """
import math, torch
from axolotl_cvloss import Objective, available_losses
logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
labels = torch.tensor([0, 1, 1, 2, 0, 3, 3, 3, 1])
p = logits.softmax(1)
own = p.gather(1, labels[:, None])[:, 0].tolist()
huberised = sum(-math.log(q) if q > 0.2 else math.log(5) + 1 - 5 * q for q in own) / 9
assert min(own) < 0.2 < max(own)
of = lambda c: p[labels == c, c].sum() / (p[:, c].sum() * (labels == c).sum()).sqrt()
fowlkes_mallows = 1 - sum(of(c) for c in range(4)) / 4
result = Objective.from_config(MIX).from_logits(logits, labels, shift=False)
torch.testing.assert_close(result.loss, 0.6 * huberised + 0.4 * fowlkes_mallows)
print(available_losses()["huberised"].function.__module__)
"""

# Trainer on as many processes as torchrun starts; the first one writes what it logged.
TRAINER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from axolotl_cvloss import Objective, attach, install
model_path, batch, output = sys.argv[1], int(sys.argv[2]), sys.argv[3]
generator = torch.Generator().manual_seed(0)
data = []
for i in range(16):
    ids = torch.randint(4, 40, (12,), generator=generator)
    labels = ids.clone()
    labels[: 1 + i % 9] = -100
    data.append({"input_ids": ids, "labels": labels})
model = AutoModelForCausalLM.from_pretrained(model_path)
install(model, Objective.from_config(MIX))
arguments = TrainingArguments(output_dir=output, per_device_train_batch_size=batch,
    per_device_eval_batch_size=2, max_steps=4, logging_steps=1, learning_rate=1e-2,
    lr_scheduler_type="constant", report_to=[], save_strategy="no", use_cpu=True, seed=0)
trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:7])
attach(trainer)
trainer.train()
evaluated = trainer.evaluate()
if trainer.is_world_process_zero():
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    json.dump([arguments.world_size, history, evaluated], open(output + ".json", "w"))
"""


def program(path, text):
    path.write_text(f"MIX = {GUEST_MIX!r}\n{text}")
    return path


@pytest.mark.hosts
def test_values(guest, run_program, tmp_path):
    result = run_program(sys.executable, program(tmp_path / "values.py", VALUES), PYTHONPATH=guest)
    assert result.returncode == 0, result.stdout
    assert result.stdout.split()[-1] == "cvloss_guest"


@pytest.mark.hosts
@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_axolotl(packed, guest, make_config, train):
    pytest.importorskip("axolotl")
    keys = {"sample_packing": True, "eval_sample_packing": False, "attn_implementation": "sdpa"} if packed else {}
    config = make_config("packed" if packed else "padded", cv_loss={**GUEST_MIX, "head": "fused"}, **keys)
    history, _, printed = train(config, PYTHONPATH=guest)
    assert "0.6 huberised" in printed
    logged = [entry for entry in history if "loss" in entry]
    for entry in logged:
        mix = 0.6 * entry["cv_loss/huberised"] + 0.4 * entry["cv_loss/fowlkes_mallows"]
        assert entry["loss"] == pytest.approx(mix, abs=1e-5)
    assert logged[-1]["cv_loss/huberised"] < logged[0]["cv_loss/huberised"] - 0.2


@pytest.mark.hosts
def test_two_processes(guest, run_program, files, tmp_path):
    """Two processes of two rows train as one of four does."""
    script = program(tmp_path / "trainer.py", TRAINER)
    found, evaluated = {}, {}
    for count in 1, 2:
        output = tmp_path / f"processes{count}"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
        command = [*launcher, script, files / "model", 4 // count, output]
        result = run_program(*command, PYTHONPATH=guest, CUDA_VISIBLE_DEVICES="")
        assert result.returncode == 0, result.stdout[-5000:]
        size, found[count], evaluated[count] = json.loads(output.with_suffix(".json").read_text())
        assert size == count
    for one, two in zip(found[1], found[2], strict=True):
        for name in "cv_loss/huberised", "cv_loss/fowlkes_mallows", "grad_norm":
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
    # Of 7 rows the second process is given one again.
    for name in "loss", "cv_loss/huberised", "cv_loss/fowlkes_mallows", "cv_loss/fowlkes_mallows/tokens":
        one, two = (evaluated[count][f"eval_{name}"] for count in (1, 2))
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)


@pytest.mark.hosts
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "from axolotl_cvloss import register_loss\n"
            "@register_loss('huberised', family='token')\n"
            "def huberised(logp):\n    return -logp\n",
            "'huberised' is registered already, by ",
        ),
        ("import not_there", "second-losses, a package with losses, cannot be imported: No module named 'not_there'"),
    ],
    ids=["taken name", "broken package"],
)
def test_a_second_package_that_is_faulty(source, message, guest, run_program, tmp_path):
    (tmp_path / "second_losses.py").write_text(source)
    info = tmp_path / "second_losses-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: second-losses\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[axolotl_cvloss]\nsecond = second_losses\n")
    code = "import axolotl_cvloss; axolotl_cvloss.available_losses()"
    result = run_program(sys.executable, "-c", code, PYTHONPATH=f"{guest}:{tmp_path}")
    assert result.returncode != 0
    error = result.stdout.strip().splitlines()[-1]
    assert message in error
    if "registered" in message:  # whichever comes first, both are named
        assert "cvloss_guest" in error
        assert "second_losses" in error
