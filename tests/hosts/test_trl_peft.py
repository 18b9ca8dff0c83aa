"""Adapters of peft that change what comes to the model, under SFTTrainer: virtual tokens, and LLaMA-Adapter."""

import pytest

pytest.importorskip("trl")

import torch
from datasets import Dataset
from peft import (
    AdaptionPromptConfig,
    CPTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import set_seed

from axolotl_cvloss import CVLossSFTConfig, CVLossSFTTrainer, Objective, install, uninstall

FOCAL_AND_LOVASZ = {"focal": 0.6, "lovasz": 0.4}
TASK = {"task_type": "CAUSAL_LM"}
PROMPTS = {
    "prompt tuning": PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "P-tuning": PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, **TASK),
    "prefix tuning": PrefixTuningConfig(num_virtual_tokens=3, **TASK),
}
ADAPTION = AdaptionPromptConfig(adapter_len=3, adapter_layers=1, **TASK)
BOTH_SCOPES = {
    "terms": [
        {"loss": "cross_entropy", "scope": "sequence", "weight": 0.6},
        {"loss": "focal", "weight": 0.4, "goldfish": {"k": 3, "h": 2}},
    ]
}


@pytest.fixture
def make_trainer(make_model, tokenizer, problems, tmp_path):
    def make(objective, adapter, text=True, more=None, **arguments):
        rows = problems["train"]
        if text:
            rows = [{"text": f"{row['prompt']} {row['completion']}"} for row in rows]
        rows = [{**row, **(more or {})} for row in rows]
        args = CVLossSFTConfig(
            **{
                "output_dir": str(tmp_path),
                "cv_loss": objective,
                "max_steps": 2,
                "logging_steps": 1,
                "learning_rate": 1e-2,
                "max_grad_norm": 0.0,
                "save_strategy": "no",
                "use_cpu": True,
                "bf16": False,
                "report_to": "none",
                "disable_tqdm": True,
                "gradient_checkpointing": False,
                **arguments,
            }
        )
        model = make_model()
        set_seed(0)  # adapters start with random weights
        return CVLossSFTTrainer(
            model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=adapter
        )

    return make


def logged(trainer):
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("adapter", PROMPTS.values(), ids=PROMPTS)
def test_the_loss_is_the_sum_of_its_terms(adapter, make_trainer):
    """Where all of a text is trained, the last virtual token predicts the first word, so it is a row that counts."""
    for entry in logged(make_trainer(FOCAL_AND_LOVASZ, adapter)):
        terms = sum(weight * entry[f"cv_loss/{name}"] for name, weight in FOCAL_AND_LOVASZ.items())
        assert entry["loss"] == pytest.approx(terms, rel=1e-5)


def test_accumulation_with_virtual_tokens_is_one_big_batch(make_trainer):
    """Micro-batches have as many examples, and not as many tokens."""
    norms = []
    for size, steps in [(8, 1), (2, 4)]:
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        (entry,) = logged(make_trainer(FOCAL_AND_LOVASZ, PROMPTS["prompt tuning"], **cut))
        norms.append([entry["loss"], entry["grad_norm"]])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.parametrize("adapter", PROMPTS)
@pytest.mark.parametrize("weights", [{"reweight": {"by": "extremes", "warmup": 0}}, {"cvar": 0.3}], ids=str)
def test_documents_are_weighed_by_their_losses_however_a_step_is_cut(weights, adapter, make_trainer):
    """A look at micro-batches finds the rows of their documents, with the one that a virtual token predicts."""
    found = []
    for size, steps in [(8, 1), (2, 4)]:
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        (entry,) = logged(make_trainer({**FOCAL_AND_LOVASZ, "examples": weights}, PROMPTS[adapter], **cut))
        names = ["loss", "grad_norm", *(f"cv_loss/examples/{name}" for name in ("smallest", "largest", "effective"))]
        found.append([entry[name] for name in names])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0][-1] < 7.9  # of 8: they differ


def test_scopes_and_goldfish_with_prefix_tuning(make_trainer):
    """The virtual tokens are in the mask, and in nothing else."""
    trainer = make_trainer(BOTH_SCOPES, PROMPTS["prefix tuning"], text=False, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    (entry,) = logged(trainer)
    whole, kept = (entry[f"cv_loss/{name}/tokens"] for name in ("cross_entropy", "focal"))
    assert whole == (batch["attention_mask"].sum(1) - 1).sum()
    assert 0 < kept < (batch["labels"][:, 1:] != -100).sum()
    assert entry["loss"] == pytest.approx(0.6 * entry["cv_loss/cross_entropy"] + 0.4 * entry["cv_loss/focal"], rel=1e-5)


@pytest.mark.parametrize("adapter", ["prompt tuning", "P-tuning"])
def test_scopes_and_goldfish_that_need_the_tokens_are_refused(adapter, make_trainer):
    with pytest.raises(
        RuntimeError, match="scope: sequence of cross_entropy and goldfish of focal cannot be used with"
    ):
        make_trainer(BOTH_SCOPES, PROMPTS[adapter])


@pytest.mark.parametrize("adapter", PROMPTS)
def test_example_weights_where_virtual_tokens_come_before_them_are_refused(adapter, make_trainer):
    objective, weights = {**FOCAL_AND_LOVASZ, "example_weights": "importance"}, {"importance": 0.5}
    if adapter == "prefix tuning":
        (entry,) = logged(make_trainer(objective, PROMPTS[adapter], more=weights, max_steps=1))
        (all_,) = logged(make_trainer(FOCAL_AND_LOVASZ, PROMPTS[adapter], max_steps=1))
        assert entry["loss"] == pytest.approx(0.5 * all_["loss"], rel=1e-5)
        return
    with pytest.raises(RuntimeError, match=r"cv_loss\.example_weights cannot be used with peft's Prompt"):
        make_trainer(objective, PROMPTS[adapter], more=weights)


def test_a_loss_of_peft_s_own_is_refused(make_trainer):
    adapter = CPTConfig(cpt_token_ids=[4, 5], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], **TASK)
    with pytest.raises(RuntimeError, match="peft's CPTConfig: it computes a loss of its own; use PromptTuningConfig"):
        make_trainer("focal", adapter)


def test_llama_adapter_trains(make_trainer):
    trainer = make_trainer({**FOCAL_AND_LOVASZ, "lovasz": 0.2}, ADAPTION, max_steps=1)
    (entry,) = logged(trainer)
    assert entry["loss"] == pytest.approx(0.6 * entry["cv_loss/focal"] + 0.2 * entry["cv_loss/lovasz"], rel=1e-5)


def test_llama_adapter_is_left_as_it_was(make_model):
    model = get_peft_model(make_model(), ADAPTION).eval()
    ids = torch.arange(4, 16)[None]
    with torch.no_grad():
        own, logits = model(input_ids=ids, labels=ids)[:2]
        expected = Objective.from_config("focal").from_logits(logits, ids).loss
        assert install(model, "focal")(input_ids=ids, labels=ids).loss.item() == pytest.approx(
            expected.item(), rel=1e-6
        )
        assert expected != own
        assert uninstall(model)(input_ids=ids, labels=ids).loss == own
