"""The fused head with the causal language models of transformers, in tiny random versions, and with adapters."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

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
    "hyperclovax": {"logits_scaling": 0.125},  # multiplies by what Granite divides by
    "minicpm3": {  # divides before the head
        "dim_model_base": 8,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "recurrent_gemma": {"logits_soft_cap": 0.5, "num_hidden_layers": 3, "lru_width": 32, "head_dim": 8},
    "olmo2": {},
    "glm": {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bloom": {"n_layer": 2, "n_head": 4},
    # Its config has a scale for the attention, under a name that others give to the scale of logits.
    "mpt": {"n_layers": 2, "n_heads": 4, "d_model": 32, "max_seq_len": 64, "logit_scale": 0.25},
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


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "recurrent_gemma", "hyperclovax"])
def test_what_was_found_holds_when_the_head_has_grown(name):
    """At the first batch logits are so small that a cap does nothing."""
    model = tiny(name)
    install(model, objective({"cross_entropy": 1.0}, "fused"))
    step(model)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head *= 100
    fused, grads = step(model)
    uninstall(model)
    host, host_grads = step(model)
    torch.testing.assert_close(fused.loss, host.loss)
    assert grads.keys() == host_grads.keys()
    for name, grad in host_grads.items():  # sums over rows, of numbers that are rounded themselves
        eps = torch.finfo(grad.dtype).eps
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=256 * eps * float(grad.abs().max()))


def hooked(change, name="llama"):
    """A model with something done to its logits right after the head."""
    model = tiny(name)
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: change(output))
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z + torch.linspace(0, 1, 97),
        lambda z: z.clamp(-3, 3),
        lambda z: z * torch.linspace(1, 1.001, 97),
        lambda z: z.masked_fill(torch.arange(97) == 5, -1e4),
        lambda z: 30 * torch.tanh(z / 30) + 1e-3 * z,
    ],
    ids=["bias", "hard cap", "scale by column", "masked column", "leaking cap"],
)
def test_logits_that_are_more_than_scaled_and_capped_are_kept_with_a_warning(change, caplog):
    host, grads = step(hooked(change))
    model = install(hooked(change), objective({"cross_entropy": 1.0}, "auto"))
    outputs, ours = step(model)
    torch.testing.assert_close(outputs.loss, host.loss)
    same(ours, grads)
    assert outputs.logits is not None
    assert "kept in full, as it does more to the logits of its head than to scale and to cap them" in caplog.text
    model = install(hooked(change), objective({"cross_entropy": 1.0}, "fused"))
    with pytest.raises(RuntimeError, match=r"cv_loss\.head: fused is not possible with LlamaForCausalLM"):
        step(model)


def test_a_scale_that_trains_keeps_the_logits(caplog):
    scale = torch.nn.Parameter(torch.tensor(2.0))
    model = install(hooked(lambda z: z * scale), objective({"cross_entropy": 1.0}, "auto"))
    step(model)
    ours, scale.grad = scale.grad.clone(), None
    step(uninstall(model))
    torch.testing.assert_close(ours, scale.grad)
    assert "has weights that train" in caplog.text


def test_a_forward_that_fails_without_all_logits_keeps_them(caplog):
    """It takes the stand-in of the first look, which has all columns, and not the narrow one of training."""
    host, grads = step(hooked(lambda z: z + 0 * z[..., 5:6]))
    model = install(hooked(lambda z: z + 0 * z[..., 5:6]), objective({"cross_entropy": 1.0}, "auto"))
    outputs, ours = step(model)
    torch.testing.assert_close(outputs.loss, host.loss)
    same(ours, grads)
    assert "kept in full" in caplog.text


def test_a_scale_that_changes_stops_the_training():
    scale = [2.0]
    model = install(hooked(lambda z: z * scale[0]), objective({"cross_entropy": 1.0}, "fused"))
    step(model)
    scale[0] = 2.001
    with pytest.raises(RuntimeError, match="is another thing, unlike before; use head: logits"):
        step(model)


OTHER_LOSSES = {
    "prophetnet": (  # its head is called on the rows of several predictions at once
        {
            "num_decoder_layers": 1,
            "decoder_ffn_dim": 32,
            "num_decoder_attention_heads": 4,
            "num_encoder_layers": 1,
            "num_encoder_attention_heads": 4,
            "disable_ngram_loss": True,
        },
        "without a shift",
    ),
    "bart": (
        {"d_model": 32, "decoder_layers": 1, "decoder_ffn_dim": 32, "decoder_attention_heads": 4},
        "without a shift",
    ),
    "bamba": (
        {
            "z_loss_coefficient": 0.1,
            "attn_layer_indices": [1],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
        "adds something that it does not tell",
    ),
}


@pytest.mark.parametrize("head", ["auto", "fused", "logits"])
@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_a_model_with_another_loss_of_its_own_is_refused(name, head):
    config, why = OTHER_LOSSES[name]
    sizes = {k: v for k, v in SIZES.items() if (name, k) != ("prophetnet", "num_hidden_layers")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**sizes, **config})).train()
    install(model, objective(MIX, head))
    with pytest.raises(RuntimeError, match=f"cv_loss: {type(model).__name__} cannot be trained: .*{why}"):
        step(model)


def test_a_loss_that_is_switched_off_does_not_matter():
    config = {**SIZES, **OTHER_LOSSES["bamba"][0], "z_loss_coefficient": 0.0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bamba", **config)).train()
    host, grads = step(model)
    fused, ours = step(install(model, objective({"cross_entropy": 1.0}, "fused")))
    torch.testing.assert_close(fused.loss, host.loss)
    same(ours, grads)


def test_an_encoder_decoder_is_refused_at_once():
    config = T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        install(T5ForConditionalGeneration(config), objective(MIX, "auto"))


@pytest.mark.parametrize("head", ["auto", "logits"])
def test_logits_to_keep_cannot_go_with_labels(head):
    model = install(tiny("llama"), objective(MIX, head))
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM returns logits of the shape \(2, 5, 97\) for labels of \(2, 12\)"
    ):
        model(**inputs(), logits_to_keep=5)


@pytest.mark.parametrize("head", ["fused", "logits"])
def test_the_first_batch_is_as_the_others(head):
    """Looking at a model changes neither dropout nor random numbers, statistics or modes."""
    model = tiny("gpt2", resid_pdrop=0.3, embd_pdrop=0.3)
    model.transformer.wte.train(False)
    statistics = torch.nn.BatchNorm1d(32)
    model.transformer.drop.register_forward_hook(lambda m, i, o: statistics(o.flatten(0, 1)).view_as(o))
    model.transformer.statistics = statistics
    modes = [module.training for module in model.modules()]
    install(model, objective(MIX, head))
    first, grads = step(model)
    assert int(statistics.num_batches_tracked) == 1
    assert [module.training for module in model.modules()] == modes
    second, again = step(model)
    assert torch.equal(first.loss, second.loss)
    assert all(torch.equal(grad, again[name]) for name, grad in grads.items())


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
    """The head of the model is never asked for more than one row, which tells the number of its columns."""
    model = tiny("llama")
    seen = []
    original = type(model.lm_head).forward
    monkeypatch.setattr(
        type(model.lm_head), "forward", lambda self, x: seen.append((self, x.shape)) or original(self, x)
    )
    install(model, objective(MIX, "auto"))
    step(model)
    step(model)
    assert [tuple(shape[:-1]) for module, shape in seen if module is model.lm_head] == [(2, 1)]
