"""The fused head with the causal language models of transformers, in tiny random versions, and with adapters."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from axolotl_cvloss import Objective, install, uninstall

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
MODELS = {
    "llama": {},
    "mistral": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    "gemma3_text": {"head_dim": 8, "final_logit_softcapping": 0.5},
    "falcon": {},
    "gpt_neox": {},  # RedPajama, Pythia
    "stablelm": {},
    "phi": {},  # a head with a bias
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "output_router_logits": True},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
    "falcon_h1": {
        "lm_head_multiplier": 0.5,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "head_dim": 8,
    },
    "olmo2": {},
    "glm": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bloom": {"n_layer": 2, "n_head": 4},
}
MIX = {"cross_entropy": 0.6, "lovasz": 0.4}


def tiny(name, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, **MODELS[name], **more})
    return AutoModelForCausalLM.from_config(config).train()


def inputs():
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, 97, (2, 12), generator=generator)
    labels = input_ids.clone()
    labels[:, :4] = -100
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def objective(config, head):
    terms = [{"loss": loss, "weight": weight} for loss, weight in config.items()]
    return Objective.from_config({"terms": terms, "head": head})


def step(model):
    model.zero_grad()
    torch.manual_seed(2)
    outputs = model(**inputs())
    outputs.loss.backward()
    return outputs, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(grads, others):
    assert grads.keys() == others.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, others[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_fused_equals_the_models_own_loss_and_full_logits(name):
    model = tiny(name)
    host, host_grads = step(model)
    install(model, objective({"cross_entropy": 1.0}, "fused"))
    fused, grads = step(model)
    assert fused.logits is None
    torch.testing.assert_close(fused.loss, host.loss)
    same(grads, host_grads)
    install(model, objective(MIX, "logits"))
    full, full_grads = step(model)
    assert full.logits is not None
    install(model, objective(MIX, "fused"))
    for _ in range(2):  # the first batch looks at the model's own logits, the second trusts what it saw
        fused, grads = step(model)
        torch.testing.assert_close(fused.loss, full.loss)
        same(grads, full_grads)
    uninstall(model)


def test_logits_the_config_does_not_explain_are_kept_with_a_warning(caplog):
    model = tiny("granite")
    host, _ = step(model)
    config = model.config.logits_scaling
    model.config.logits_scaling = 1.0  # what the model divides by was read by nobody
    install(model, objective({"cross_entropy": 1.0}, "auto"))
    model.config.logits_scaling = config
    outputs, _ = step(model)
    torch.testing.assert_close(outputs.loss, host.loss)
    assert outputs.logits is not None
    assert "kept in full, as its logits are not those of its head" in caplog.text
    model.config.logits_scaling = 1.0
    install(model, objective({"cross_entropy": 1.0}, "fused"))
    model.config.logits_scaling = config
    with pytest.raises(RuntimeError, match=r"cv_loss\.head: fused is not possible with GraniteForCausalLM"):
        step(model)


@pytest.mark.parametrize("config", [{"cross_entropy": 1.0}, MIX], ids=["cross_entropy", "mix"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("adapter", ["frozen_head", "lora_head", "modules_to_save"])
def test_adapters(adapter, when, config):
    results = {}
    for head in ("logits", "fused"):
        model = tiny("llama")
        if when == "before":
            install(model, objective(config, head))
        lora = LoraConfig(
            r=4,
            target_modules=["q_proj", *(["lm_head"] if adapter == "lora_head" else [])],
            modules_to_save=["lm_head"] if adapter == "modules_to_save" else None,
            init_lora_weights=False,
        )
        torch.manual_seed(1)
        peft_model = get_peft_model(model, lora)
        if when == "after":
            install(peft_model, objective(config, head))
        results[head] = step(peft_model)
    assert results["fused"][0].logits is None
    torch.testing.assert_close(results["fused"][0].loss, results["logits"][0].loss)
    same(results["fused"][1], results["logits"][1])


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile(backend):
    model = tiny("llama")
    install(model, objective(MIX, "fused"))
    plain, grads = step(model)
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        outputs, compiled_grads = step(compiled)
        torch.testing.assert_close(outputs.loss, plain.loss)
        same({n.removeprefix("_orig_mod."): g for n, g in compiled_grads.items()}, grads)


def test_evaluation_has_logits():
    model = tiny("llama")
    install(model, objective(MIX, "fused"))
    with torch.no_grad():
        trained = model(**inputs())
        model.eval()
        evaluated = model(**inputs())
    assert trained.logits is None
    assert evaluated.logits.shape == (2, 12, 97)
    torch.testing.assert_close(evaluated.loss, trained.loss)


def test_no_full_logits_exist_in_training(monkeypatch):
    """The head of the model is never asked for more than the few rows that are compared on the first batch."""
    model = tiny("llama")
    seen = []
    original = type(model.lm_head).forward
    monkeypatch.setattr(
        type(model.lm_head), "forward", lambda self, x: seen.append((self, x.shape)) or original(self, x)
    )
    install(model, objective(MIX, "auto"))
    step(model)
    step(model)
    assert [tuple(shape[:-1]) for module, shape in seen if module is model.lm_head] in ([], [(1, 4)], [(1, 4)] * 2)
