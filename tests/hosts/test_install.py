"""An objective in a model: what the model returns then, and what does not change."""

import copy
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, JetMoeConfig, JetMoeForCausalLM, MixtralConfig, MixtralForCausalLM

from axolotl_cvloss import Objective, install, uninstall
from axolotl_cvloss.model.installation import Evaluation, installation

MIX = {"cross_entropy": 0.6, "lovasz": 0.4}
HEADS = ("fused", "logits")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("masked", [True, False])
def test_rows_after_the_first_count_as_padding(masked, head, make_model, batch):
    """Such as accelerate repeats to fill the last batch of an evaluation."""
    if not masked:
        batch.pop("attention_mask")
    terms = [{"loss": "cross_entropy", "scope": "sequence"}, {"loss": "lovasz"}]
    model = install(make_model(), Objective.from_config({"terms": terms, "head": head})).train()
    seen = []
    installed = installation(model)
    installed.listeners.append(seen.append)
    model(**{name: value[:1] for name, value in batch.items()})
    installed.evaluation = Evaluation(keep_logits=False, first_rows=1)
    model(**batch)
    installed.evaluation = Evaluation(keep_logits=False, first_rows=0)
    model(**batch)
    alone, first, none = seen
    torch.testing.assert_close(first.loss, alone.loss)
    assert first.counts == alone.counts
    assert first.counts["cross_entropy"] == 11
    assert not any(none.counts.values())


def test_nan_in_the_first_batch_says_nothing_against_the_head(make_model, batch, caplog):
    """One rank that went back to full logits would leave the others waiting under FSDP."""
    model = install(make_model(), objective(head="fused")).train()
    hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output * float("nan"))
    assert model(**batch).loss.isnan()
    hook.remove()
    assert model(**batch).logits is None
    assert not caplog.records


def test_an_objective_that_needs_all_logits_says_what_it_costs(make_model, caplog):
    for head in "auto", "logits":
        caplog.clear()
        install(make_model(), Objective.from_config({"lovasz": 1.0, "reference": True, "head": head}))
        assert ("needs all logits of a batch at once, which takes more memory" in caplog.text) == (head == "auto")


def objective(config=MIX, head="auto"):
    terms = [{"loss": name, "weight": weight} for name, weight in config.items()]
    return Objective.from_config({"terms": terms, "head": head})


@pytest.fixture
def batch():
    """Two rows with a prompt; the second one is shorter and padded on the right."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 90, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    ids[mask == 0] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def accelerator():
    """One of bf16; not that of a Trainer before."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def expected_loss(model, batch, config=MIX):
    """From the model's own logits."""
    with torch.no_grad():
        logits = model(**without_labels(batch)).logits
    return objective(config).from_logits(logits, batch["labels"]).loss


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model, **inputs):
    """Loss and gradients of one training step."""
    model.train()
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(one, other, **tolerance):
    torch.testing.assert_close(one[0], other[0], **tolerance)
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        torch.testing.assert_close(grad, other[1][name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# The loss


@pytest.mark.parametrize("head", HEADS)
def test_cross_entropy_is_the_models_own(make_model, batch, head):
    host = step(make_model(), **batch)
    assert_same(step(install(make_model(), objective({"cross_entropy": 1.0}, head)), **batch), host)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_at_the_edge_of_padding_count_as_the_model_counts_them(make_model, batch, side, head):
    """The first token of all after padding on the left, the end of text where padding is the same token."""
    mask = batch["attention_mask"].flip(1) if side == "left" else batch["attention_mask"]
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    if side == "right":
        labels[1, 8] = 2
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask, "labels": labels}
    host = step(make_model(), **inputs)
    model = install(make_model(), objective({"cross_entropy": 1.0}, head))
    assert_same(step(model, **inputs), host)
    trained = int((labels[:, 1:] != -100).sum())
    assert_same(step(model, **inputs, num_items_in_batch=trained), host)


@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradient_are_those_of_the_logits(make_model, batch, head):
    plain = make_model().train()
    loss = objective().from_logits(plain(**without_labels(batch)).logits, batch["labels"]).loss
    loss.backward()
    assert_same(step(install(make_model(), objective(head=head)), **batch), (loss.detach(), gradients(plain)))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("labelled_by", ["keyword", "position", "shift_labels", "both"])
def test_ways_to_give_labels(make_model, batch, head, labelled_by):
    model = make_model()
    expected = expected_loss(model, batch)
    install(model, objective(head=head)).train()
    inputs, labels = without_labels(batch), batch["labels"]
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    if labelled_by == "position":
        outputs = model(inputs["input_ids"], inputs["attention_mask"], None, None, None, labels)
    else:
        given = {
            "keyword": {"labels": labels},
            "shift_labels": {"shift_labels": shifted},
            "both": {"labels": labels, "shift_labels": shifted},
        }
        outputs = model(**inputs, **given[labelled_by])
    torch.testing.assert_close(outputs.loss.detach(), expected)


@pytest.mark.parametrize("head", HEADS)
def test_tuples(make_model, batch, head):
    model = make_model()
    expected = expected_loss(model, batch)
    outputs = install(model, objective(head=head)).train()(**batch, return_dict=False)
    assert isinstance(outputs, tuple)
    torch.testing.assert_close(outputs[0].detach(), expected)


def test_evaluation_keeps_the_logits(make_model, batch):
    model = make_model().eval()
    logits = model(**without_labels(batch)).logits
    outputs = install(model, objective())(**batch)
    assert torch.equal(outputs.logits, logits)
    assert next(iter(outputs)) == "loss"


@pytest.mark.parametrize("head", HEADS)
def test_packed_documents_keep_to_themselves(make_model, batch, head):
    """The host lets the end of a document predict the start of the next one; the objective does not."""
    ids = batch["input_ids"][:1]
    inputs = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]])}
    starts_masked = ids.clone()
    starts_masked[:, 7] = -100
    host = make_model()
    model = install(make_model(), objective({"cross_entropy": 1.0}, head))
    ours = step(model, **inputs, labels=ids)
    assert_same(ours, step(host, **inputs, labels=starts_masked))
    assert not torch.isclose(ours[0], step(host, **inputs, labels=ids)[0])


@pytest.mark.parametrize("head", HEADS)
def test_num_items_in_batch(make_model, batch, head):
    model = install(make_model(), objective(head=head))
    trained = int((batch["labels"][:, 1:] != -100).sum())
    loss, grads = step(model, **batch)
    half = step(model, **batch, num_items_in_batch=torch.tensor(2 * trained))
    assert_same(half, (loss / 2, {name: grad / 2 for name, grad in grads.items()}))


@pytest.mark.parametrize("head", HEADS)
def test_nothing_to_train(make_model, batch, head):
    model = install(make_model(), objective(head=head))
    loss, grads = step(model, **{**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert loss == 0
    assert all(torch.count_nonzero(grad) == 0 for grad in grads.values())
    assert grads  # connected to the graph


@pytest.mark.parametrize("kwargs", [{"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_gradient_checkpointing(make_model, batch, kwargs):
    expected = step(install(make_model(), objective()), **batch)
    model = install(make_model(), objective())
    model.gradient_checkpointing_enable(kwargs)
    model.enable_input_require_grads()
    assert_same(step(model, **batch), expected)


@pytest.mark.parametrize("head", HEADS)
def test_a_checkpoint_around_the_whole_forward(make_model, batch, head):
    """It runs the model once more in the backward pass, for what was saved, and no more often."""
    expected = step(install(make_model(), objective(head=head)), **batch)
    model, calls = install(make_model(), objective(head=head)).train(), []
    with torch.no_grad():
        model(**batch)  # the first batch with labels is looked at in a forward of its own
    model.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    loss = checkpoint(lambda ids: model(**{**batch, "input_ids": ids}).loss, batch["input_ids"], use_reentrant=False)
    assert len(calls) == 1
    loss.backward()
    assert_same((loss.detach(), gradients(model)), expected)
    assert len(calls) == 2


MOE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 93,
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (MixtralForCausalLM, MixtralConfig(**MOE, num_attention_heads=4, router_aux_loss_coef=0.5)),
        (JetMoeForCausalLM, JetMoeConfig(**MOE, kv_channels=8, num_local_experts=4, aux_loss_coef=0.5)),
    ],
    ids=["mixtral", "jetmoe"],
)
def test_auxiliary_loss_of_a_mixture_of_experts(model_class, config, batch, head):
    torch.manual_seed(0)
    model = model_class(config)
    batch["output_router_logits"] = True
    host = step(model, **batch)
    auxiliary = 0.5 * model(**batch).aux_loss
    assert auxiliary > 0.1
    install(model, objective({"cross_entropy": 1.0}, head))
    assert_same(step(model, **batch), host)
    uninstall(model)
    count = 2 * (batch["labels"][:, 1:] != -100).sum().reshape(1)  # the rows of this batch are half of the step's
    torch.testing.assert_close(
        step(install(model, objective({"cross_entropy": 1.0}, head)), **batch, num_items_in_batch=count)[0], host[0] / 2
    )
    uninstall(model)
    expected = expected_loss(model, batch) + auxiliary.detach()
    torch.testing.assert_close(step(install(model, objective(head=head)), **batch)[0], expected)


# What does not change


def test_without_labels_nothing_changes(make_model, batch):
    inputs = without_labels(batch)
    plain, model = make_model().train(), install(make_model(), objective()).train()
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(model(inputs["input_ids"], num_items_in_batch=3).logits, plain(inputs["input_ids"]).logits)
    assert isinstance(model(**inputs, return_dict=False), tuple)
    assert model(**inputs).loss is None
    generate = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.eval().generate(**inputs, **generate), plain.eval().generate(**inputs, **generate))


@pytest.mark.parametrize("head", HEADS)
def test_uninstall(make_model, batch, head):
    plain, model = make_model(), make_model()
    install(model, objective(head=head))
    step(model, **batch)
    uninstall(model)
    assert installation(model) is None
    for one, other in zip(model.modules(), plain.modules(), strict=True):
        assert vars(one).keys() == vars(other).keys()
        assert "forward" not in vars(one)
    first, second = step(model, **batch), step(plain, **batch)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(grad, second[1][name]) for name, grad in first[1].items())
    assert uninstall(model) is model  # once more does no harm


def test_an_instance_forward_comes_back(make_model, batch):
    """Hosts put forwards of their own on the instance, Liger for example."""
    model = make_model()
    own = model.forward = type(model).forward.__get__(model)
    expected = expected_loss(model, batch)
    install(model, objective())
    torch.testing.assert_close(model(**batch).loss, expected)
    uninstall(model)
    assert model.forward == own


def test_installing_again_replaces(make_model, batch):
    model = install(install(make_model(), objective()), objective({"focal": 1.0}))
    torch.testing.assert_close(model(**batch).loss, expected_loss(make_model(), batch, {"focal": 1.0}))
    assert "forward" not in vars(uninstall(model))


@pytest.mark.parametrize("head", HEADS)
def test_again_and_away_where_accelerate_has_wrapped_the_forward(make_model, batch, head, accelerator):
    """accelerate puts autocast around our forward. Another objective, or none, must not take that away."""
    dtypes = []

    def prepared(model):
        layer = model.model.layers[0].mlp.down_proj
        layer.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
        return accelerator.prepare(model)

    first = objective({"focal": 1.0}, head)
    expected = step(prepared(install(make_model(), objective(head=head))), **batch)
    model = prepared(install(make_model(), first))
    assert_same(step(install(model, objective(head=head)), **batch), expected)
    assert_same(step(uninstall(model), **batch), step(prepared(make_model()), **batch))
    assert installation(model) is None
    assert_same(step(install(model, objective(head=head)), **batch), expected)
    assert set(dtypes) == {torch.bfloat16}
    bare = accelerator.unwrap_model(uninstall(model), keep_fp32_wrapper=False)
    assert_same(step(bare, **batch), step(make_model(), **batch))


@pytest.mark.parametrize("head", HEADS)
def test_threads_share_a_model(make_model, batch, head):
    """One thread trains with labels and one reads logits, at the same time."""
    model = install(make_model(), objective(head=head)).train()
    expected = [float(model(**{**batch, "labels": batch["labels"].roll(i, 0)}).loss.detach()) for i in range(2)]
    logits = model(**without_labels(batch)).logits
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: time.sleep(0.002))

    def run(i):
        if i == 2:
            return torch.equal(model(**without_labels(batch)).logits, logits)
        return float(model(**{**batch, "labels": batch["labels"].roll(i, 0)}).loss.detach()) == expected[i]

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(run, [0, 1, 2] * 10))
    assert "forward" not in vars(model.get_output_embeddings())


def test_a_head_with_dropout_can_be_fused(make_model, batch, caplog):
    """What the first batch is looked at with is one draw, not two."""
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, init_lora_weights=False, lora_dropout=0.5, **LORA["head"])
    model = install(get_peft_model(make_model(), config), objective(head="fused")).train()
    assert model(**batch).logits is None
    assert not caplog.records


@pytest.mark.parametrize("head", HEADS)
def test_a_copy_stands_alone(make_model, batch, head):
    """A deep copy computes with its own weights, its own head's too, and tells no trainer."""
    model = install(make_model(), objective(head=head))
    step(model, **batch)
    heard = []
    installation(model).listeners.append(heard.append)
    expected = step(model, **batch)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(step(copied, **batch), expected)
    assert len(heard) == 1
    uninstall(copied)
    assert "forward" not in vars(copied)
    assert installation(model) is not None


def test_pickling_says_what_to_do(make_model):
    model = install(make_model(), objective())
    with pytest.raises(TypeError, match=r"call uninstall\(model\) before"):
        pickle.dumps(vars(model)["_cv_loss_installation"])


@pytest.mark.parametrize("head", HEADS)
def test_save_and_load(make_model, batch, head, tmp_path):
    model = install(make_model(), objective(head=head))
    step(model, **batch)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert "forward" not in vars(loaded)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


# Wrappers


LORA = {
    "linear": {"target_modules": ["q_proj", "v_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("head", HEADS)
def test_offloaded_weights(make_model, batch, head):
    """accelerate brings the weights of a module for its forward alone; before and after it they are nowhere."""
    expected = expected_loss(make_model(), batch)
    model = cpu_offload(install(make_model(), objective(head=head)).train(), execution_device="cpu")
    assert model.get_output_embeddings().weight.is_meta
    torch.testing.assert_close(model(**batch).loss.detach(), expected)


@pytest.mark.parametrize("mixed", ["autocast", "bfloat16"])
def test_an_adapted_head_computes_in_the_precision_of_its_host(make_model, batch, mixed, accelerator):
    """In bfloat16 as the host's own cross-entropy does, so that they differ by its rounding of a logit at most."""
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, init_lora_weights=False, **LORA["head"])

    def made():
        torch.manual_seed(1)
        model = get_peft_model(make_model().to(torch.bfloat16 if mixed == "bfloat16" else torch.float32), config)
        return model.train()

    seen = []
    model = install(made(), objective({"cross_entropy": 1.0}, head="fused"))
    model.get_output_embeddings().lora_B["default"].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed == "autocast"):
        found, expected = step(model, **batch), step(made(), **batch)
    assert set(seen) == {torch.bfloat16 if mixed == "autocast" else torch.float32}  # peft keeps adapters in float32
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(found[0].float(), expected[0].float(), rtol=eps, atol=0)
    for name, grad in found[1].items():
        assert (grad - expected[1][name]).norm() <= 4 * eps * expected[1][name].norm(), name


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("first", ["peft", "objective"])
@pytest.mark.parametrize("kind", LORA)
def test_peft(make_model, batch, head, first, kind):
    def wrapped(model):
        torch.manual_seed(1)
        return get_peft_model(
            model, LoraConfig(task_type=TaskType.CAUSAL_LM, r=2, init_lora_weights=False, **LORA[kind])
        )

    plain = wrapped(make_model()).train()
    loss = objective().from_logits(plain(**without_labels(batch)).logits, batch["labels"]).loss
    loss.backward()
    expected = (loss.detach(), gradients(plain))
    assert all("lora_" in name or "modules_to_save" in name for name in expected[1])

    o = objective(head=head)
    model = install(wrapped(make_model()), o) if first == "peft" else wrapped(install(make_model(), o))
    assert_same(step(model, **batch), expected)
    merged = model.merge_and_unload()
    assert installation(merged) is not None
    torch.testing.assert_close(merged(**batch).loss.detach(), expected[0])
    uninstall(merged)
    assert "forward" not in vars(merged)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile(make_model, batch, head, backend):
    expected = step(install(make_model(), objective(head=head)), **batch)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = install(make_model(), objective(head=head))
    compiled = torch.compile(model, backend=backend)
    heard = []
    installation(model).listeners.append(heard.append)
    for _ in range(4):
        loss, grads = step(compiled, **batch)
        grads = {name.removeprefix("_orig_mod."): grad for name, grad in grads.items()}
        assert_same((loss, grads), expected)
    assert len(heard) == 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # something was compiled
    once = dict(torch._dynamo.utils.counters["stats"])
    for _ in range(12):  # more than the limit of recompilations
        step(compiled, **batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == once["unique_graphs"]


@pytest.mark.parametrize("head", HEADS)
def test_mixed_precision_of_accelerate(make_model, batch, head, accelerator):
    """accelerate wraps the forward in autocast, and takes the wrapper off at the end."""
    expected = step(install(make_model(), objective(head=head)), **batch)
    model = accelerator.prepare(install(make_model(), objective(head=head)))
    assert_same(step(model, **batch), expected, rtol=0.05, atol=0.02)
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert_same(step(bare, **batch), expected)


def test_install_takes_what_stands_behind_the_key(make_model, batch):
    expected = step(install(make_model(), Objective.from_config(MIX)), **batch)
    assert_same(step(install(make_model(), MIX), **batch), expected)
    with pytest.raises(ValueError, match="did you mean lovasz"):
        install(make_model(), {"lovas": 1})
    with pytest.raises(ValueError, match="cv_loss: 3 is not a loss; give the name of a loss, a mapping"):
        install(make_model(), 3)


def test_install_refuses_what_is_no_language_model():
    message = "install takes a causal language model, and Linear is none: its forward takes input, and no input_ids"
    with pytest.raises(TypeError, match=message):
        install(torch.nn.Linear(3, 4), MIX)
