"""The reference model is the model without its adapters: the same loss and gradient as with its log p given."""

import pytest

pytest.importorskip("peft")

import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

from axolotl_cvloss import Objective, attach, install

KEY = {"anchored": {"weight": 0.5, "coefficient": 2.0}, "importance_weighted": {"weight": 0.3}, "prior_weighted": 0.2}
OFF = {**KEY, "reference": "adapter_off"}
LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_dropout": 0.0}
ADAPTERS = {
    "layers": LoraConfig(**LORA, target_modules="all-linear"),
    "head": LoraConfig(**LORA, target_modules=["q_proj", "lm_head"]),
    "a copy of the head": LoraConfig(**LORA, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "copies of embedding and norm": LoraConfig(
        **LORA, target_modules=["q_proj"], modules_to_save=["embed_tokens", "norm"]
    ),
    "tokens": LoraConfig(**LORA, target_modules=["q_proj"], trainable_token_indices=[5, 6, 7]),
    "DoRA": LoraConfig(**LORA, target_modules=["v_proj"], use_dora=True),
}


def batch():
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(4, 40, (2, 9), generator=generator)
    labels = input_ids.clone()
    labels[:, :3] = -100
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]] * 2)  # packed
    return {"input_ids": input_ids, "labels": labels, "position_ids": positions}


@pytest.fixture
def adapted(make_model):
    """A model with an adapter that has learnt something already, in training mode and with dropout."""

    def make(adapter, checkpointing=False):
        model = get_peft_model(make_model(attention_dropout=0.2, attn_implementation="eager"), adapter)
        set_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn_like(parameter)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        return model.train()

    return make


def step(model, **more):
    """Loss and gradients of a forward whose dropout is the same every time."""
    set_seed(2)
    model.zero_grad()
    loss = model(**batch(), **more).loss
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def of_the_base(model):
    """Log p of each token, (B, T), by peft's own way to switch adapters off, on full logits."""
    given = {name: x for name, x in batch().items() if name != "labels"}
    training = model.training
    with torch.no_grad(), model.disable_adapter():
        logp = model.eval()(**given, use_cache=False).logits.log_softmax(-1)
    model.train(training)
    found = torch.zeros(given["input_ids"].shape)
    found[:, 1:] = logp[:, :-1].gather(2, given["input_ids"][:, 1:, None]).squeeze(2)
    return found


def with_logps(model, logps):
    """The same objective, told what it would find."""
    objective = Objective.from_config(KEY)
    for name in ("from_hidden", "from_logits"):
        own = getattr(objective, name)
        setattr(objective, name, lambda *a, own=own, **k: own(*a, **{**k, "reference_logps": logps}))
    install(model, objective)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_loss_and_gradient_are_those_with_the_log_p_of_the_base_model(adapter, adapted):
    model = adapted(adapter)
    logps = of_the_base(model)
    with_logps(model, logps)
    wanted, gradients = step(model)
    assert gradients
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    install(model, OFF)
    for _ in range(2):  # the first batch looks at the model
        loss, found = step(model)
        torch.testing.assert_close(loss, wanted)
        torch.testing.assert_close(found, gradients)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    with_logps(model, logps - 1)
    assert not torch.isclose(step(model)[0], wanted)


@pytest.mark.parametrize("case", ["checkpointing", "logits", "evaluation", "no gradient"])
def test_however_the_model_runs(case, adapted):
    model = adapted(ADAPTERS["head"], case == "checkpointing").train(case != "evaluation")
    head = {"head": "logits"} if case == "logits" else {}
    with_logps(model, of_the_base(model))
    with torch.set_grad_enabled(case != "no gradient"):
        wanted = step(model)
        install(model, {**OFF, **head})
        torch.testing.assert_close(step(model), wanted)
    assert model.training == (case != "evaluation")
    assert bool(wanted[1]) == (case != "no gradient")


def test_random_numbers_are_as_without_a_reference(adapted):
    model = adapted(ADAPTERS["layers"])
    install(model, {"cross_entropy": 1.0})
    wanted, after = step(model), torch.rand(3)
    install(model, {"cross_entropy": 1.0, "prior_weighted": 0.0, "reference": "adapter_off"})
    torch.testing.assert_close(step(model), wanted)
    assert torch.equal(torch.rand(3), after)


REFUSED = {
    "no adapter": (None, "the model has no adapter that can be switched off"),
    "prefix tuning": (
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "the model has no adapter that can be switched off",
    ),
    "PiSSA": (LoraConfig(**LORA, init_lora_weights="pissa"), "init_lora_weights: pissa changes the weights under"),
    "biases": (
        LoraConfig(**LORA, target_modules=["q_proj"], bias="all"),
        r"model\.layers\.0\.self_attn\.q_proj\.base_layer\.bias trains too, and is no adapter",
    ),
}


@pytest.mark.parametrize(("adapter", "why"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("host", ["loop", "Trainer"])
def test_a_model_that_is_not_its_base_without_adapters_is_refused(adapter, why, host, make_model, tmp_path):
    model = make_model(attention_bias=True)
    model = model if adapter is None else get_peft_model(model, adapter)
    install(model, OFF)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    start = (lambda: model(**batch())) if host == "loop" else (lambda: attach(Trainer(model, arguments)))
    with pytest.raises(RuntimeError, match=rf"cv_loss\.reference: adapter_off cannot be used here: {why}"):
        start()


def test_under_sfttrainer_the_first_step_is_cross_entropy(make_model, tokenizer, problems, tmp_path):
    """Where adapters begin at 0 the model is its reference, whatever the dropout of the adapters."""
    pytest.importorskip("trl")
    from axolotl_cvloss import CVLossSFTConfig, CVLossSFTTrainer

    args = CVLossSFTConfig(
        output_dir=str(tmp_path),
        cv_loss={"importance_weighted": 1.0, "reference": "adapter_off"},
        packing=True,
        max_length=48,
        max_steps=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=4,
        learning_rate=5e-2,
        lr_scheduler_type="constant",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    data = {part: Dataset.from_list(rows) for part, rows in problems.items()}
    adapter = LoraConfig(task_type="CAUSAL_LM", r=8, lora_dropout=0.3, target_modules="all-linear")
    more = {"processing_class": tokenizer, "peft_config": adapter}
    trainer = CVLossSFTTrainer(make_model(), args, train_dataset=data["train"], eval_dataset=data["test"], **more)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    eps = torch.finfo(torch.float32).eps
    assert logs[0]["loss"] == pytest.approx(logs[0]["cv_loss/nll"], rel=64 * eps)
    # Later the documents are likelier than under the reference, so they weigh more.
    for loss, nll in [(entry["cv_loss/importance_weighted"], entry["cv_loss/nll"]) for entry in logs[2:]]:
        assert loss > nll * (1 + 1e-3)
    (evaluated,) = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert evaluated["eval_cv_loss/importance_weighted"] > evaluated["eval_cv_loss/nll"] * (1 + 1e-3)
