"""`cvloss reference`: the column is log p of the base model, and training on it begins where that is the model."""

import pytest
import torch
import yaml
from click.testing import CliRunner
from datasets import load_dataset
from test_probing import sft  # noqa: F401
from transformers import AutoModelForCausalLM

pytest.importorskip("trl")

from axolotl_cvloss.command import referencing
from axolotl_cvloss.command.cli import cli
from axolotl_cvloss.hosts.trl_cli import built

EPS = torch.finfo(torch.float32).eps
CLOSE = 1e3 * EPS  # sums over a few dozen tokens behind a model of two layers, in batches of another shape
THREE = {"importance_weighted": 0.5, "prior_weighted": 0.3, "dft": 0.2}


def made(config, out):
    """What the command prints, which is also beside the data."""
    done = CliRunner().invoke(cli, ["reference", str(config), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout == (out / "config.yaml").read_text()
    assert not (out / ".unfinished").exists()
    return yaml.safe_load(done.stdout)


def plain(model, input_ids):
    """Log p of each token of an example alone, by the model's own logits; 0 for the first."""
    ids = torch.tensor(input_ids)
    with torch.no_grad():
        logp = model(ids[None]).logits[0, :-1].log_softmax(1)
    return [0.0, *logp.gather(1, ids[1:, None]).squeeze(1).tolist()]


def step(config, folder, cv_loss):
    """What the first micro-batch logs, and its gradient, under SFTTrainer."""
    trainer = built(config, str(folder), {"report_to": "none", "cv_loss": cv_loss})
    batch = next(iter(trainer.get_train_dataloader()))
    batch = trainer._prepare_inputs(batch)
    count = trainer._get_num_items_in_batch([batch], trainer.args.device)
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, batch, count)
    return trainer._cv_last, [p.grad for p in trainer.model.parameters()], batch


@pytest.mark.usefixtures("sft")
def test_under_trl(sft, files, tmp_path):  # noqa: F811
    config = sft("importance_weighted", packing=True, max_length=48, eval_strategy="steps", eval_steps=2)
    out = tmp_path / "out"
    changed = made(config, out)
    assert changed["cv_loss"] == {"importance_weighted": 1.0, "reference_logps": "reference_logps"}
    assert changed["packing"] is True
    model = AutoModelForCausalLM.from_pretrained(files / "model").eval()
    data = load_dataset(str(out))
    assert {name: len(rows) for name, rows in data.items()} == {"train": 16, "test": 12}
    for row in [*data["train"], *data["test"]]:
        torch.testing.assert_close(row["reference_logps"], plain(model, row["input_ids"]), rtol=CLOSE, atol=CLOSE)
        assert -100 in row["labels"]

    # At the start the model is its reference.
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(changed))
    folders = iter([tmp_path / name for name in "abcd"])
    for folder in "abcd":
        (tmp_path / folder).mkdir()
    own = {"reference_logps": "reference_logps"}
    for one, other in (("importance_weighted", "cross_entropy"), ("prior_weighted", "dft")):
        result, gradients, batch = step(path, next(folders), {one: 1.0, **own})
        assert int((batch["position_ids"] == 0).sum()) > len(batch["position_ids"])  # packed
        wanted, wanted_gradients, same = step(path, next(folders), {other: 1.0, **own})
        assert torch.equal(batch["input_ids"], same["input_ids"])
        torch.testing.assert_close(result.loss, wanted.loss, rtol=CLOSE, atol=0)
        for gradient, wanted_gradient in zip(gradients, wanted_gradients, strict=True):
            torch.testing.assert_close(
                gradient, wanted_gradient, rtol=0, atol=CLOSE * float(wanted_gradient.abs().max())
            )


@pytest.mark.hosts
def test_under_axolotl(files, make_config, train, tmp_path):
    keys = {"sample_packing": True, "pad_to_sequence_len": True, "eval_sample_packing": False, "micro_batch_size": 2}
    keys["sdp_attention"] = True  # without it Axolotl lets packed documents see each other
    config = make_config(cv_loss={**THREE, "reference": "adapter_off"}, max_steps=6, eval_steps=6, save_steps=6, **keys)
    config |= {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "lora_dropout": 0.2}
    config |= {f"lora_{kernel}_kernel": False for kernel in ("mlp", "qkv", "o", "embedding")}  # for GPUs
    path = tmp_path / "before.yaml"
    path.write_text(yaml.safe_dump(config))
    changed = made(path, tmp_path / "data")
    assert changed["cv_loss"] == {**THREE, "reference_logps": "reference_logps"}
    entries, _, _ = train(changed)
    first, *_, last = [entry for entry in entries if "loss" in entry]
    assert first["cv_loss/importance_weighted"] == pytest.approx(first["cv_loss/nll"], rel=CLOSE)
    assert first["cv_loss/prior_weighted"] == pytest.approx(first["cv_loss/dft"], rel=CLOSE)
    assert last["cv_loss/importance_weighted"] > last["cv_loss/nll"] * (1 + 1e-3)
    assert [entry for entry in entries if "eval_cv_loss/prior_weighted" in entry]


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(referencing, "SHARD", 4)
    tokens = [list(range(n)) for n in (3, 5, 2, 9, 4, 1, 7, 6, 8)]
    seen = []

    def of_batch(some, dies_at=None):
        if dies_at is not None and len(seen) >= dies_at:
            raise KeyboardInterrupt
        seen.extend(len(ids) for ids in some)
        return [[-float(n) for n in ids] for ids in some]

    with pytest.raises(KeyboardInterrupt):
        referencing._of_all(lambda some: of_batch(some, 6), tokens, 2, tmp_path / "train", "train")
    assert seen == [9, 5, 3, 2, 7, 6]  # the longest of a shard first
    seen.clear()
    found = referencing._of_all(of_batch, tokens, 2, tmp_path / "train", "train")
    assert seen == [7, 6, 4, 1, 8]
    assert found == [[-float(n) for n in ids] for ids in tokens]


def test_a_folder_is_begun_once_and_for_one_config(tmp_path):
    config, out = tmp_path / "sft.yaml", tmp_path / "out"
    config.write_text("a: 1")
    referencing.begin(out, config)
    referencing.begin(out, config)
    config.write_text("a: 2")
    with pytest.raises(SystemExit, match="is not empty, and not an unfinished reference of"):
        referencing.begin(out, config)


@pytest.mark.parametrize(
    ("key", "error"),
    [
        ("anchord", "cv_loss.anchord: unknown loss 'anchord'; did you mean anchored?"),
        ({"lovasz": {"per": "row"}}, "cv_loss.lovasz.per: must be one of document, batch"),
    ],
)
def test_a_wrong_key_is_said(key, error, sft, tmp_path):  # noqa: F811
    done = CliRunner().invoke(cli, ["reference", str(sft(key)), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert error in done.output
