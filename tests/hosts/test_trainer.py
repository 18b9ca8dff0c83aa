"""transformers' own Trainer with an objective: exact gradients however a batch is cut up, and what is logged."""

import gc
import math
import re
import weakref

import pytest
import torch
from helpers import temporary_losses
from sampling import pairwise
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from axolotl_cvloss import Objective, ObjectiveResult, install, register_loss
from axolotl_cvloss.hosts.transformers import attach

SEQUENCE_MIX = {
    "terms": [
        {"loss": "cross_entropy", "weight": 0.6, "scope": "sequence"},
        {"loss": "lovasz", "weight": 0.4},
    ]
}
FLOAT32 = 2e-6  # Trainer adds up its losses in float32

OBJECTIVES = {
    "cross_entropy": "cross_entropy",
    "focal": "focal",
    "lovasz": "lovasz",
    "generalized_dice": "generalized_dice",
    "sequence mix": SEQUENCE_MIX,
}


def rows(count, untrained=()):
    """Rows of many lengths, with prompts; those in ``untrained`` have no label at all."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        length = int(torch.randint(6, 20, (), generator=generator))
        prompt = int(torch.randint(1, length - 1, (), generator=generator))
        ids = torch.randint(4, 40, (length,), generator=generator)
        labels = ids.clone()
        labels[: length if i in untrained else prompt] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def collate(batch):
    """Padded on the right, as far as the longest row of the micro-batch."""

    def pad(name, value):
        return torch.nn.utils.rnn.pad_sequence([row[name] for row in batch], batch_first=True, padding_value=value)

    ids = pad("input_ids", 0)
    return {"input_ids": ids, "labels": pad("labels", -100), "attention_mask": (ids != 0).long()}


class Gradients(TrainerCallback):
    """The gradient that each step of the optimizer sees."""

    def __init__(self):
        self.seen = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen.append({name: p.grad.clone() for name, p in model.named_parameters()})


@pytest.fixture
def make_trainer(make_model, tmp_path):
    """A Trainer in float64 with an objective."""

    def make(config, data, trainer_class=Trainer, callbacks=(), evaluated=None, attached=True, model=None, **arguments):
        model = model or make_model().double()
        if attached:
            install(model, Objective.from_config(config))
        trainer = trainer_class(
            model=model,
            train_dataset=data,
            data_collator=collate,
            eval_dataset=evaluated,
            callbacks=list(callbacks),
            args=TrainingArguments(
                **{
                    "output_dir": str(tmp_path),
                    "optim": "sgd",
                    "learning_rate": 0.1,
                    "lr_scheduler_type": "constant",
                    "max_grad_norm": 0,
                    "max_steps": 1,
                    "logging_steps": 1,
                    "save_strategy": "no",
                    "report_to": [],
                    "use_cpu": True,
                    "disable_tqdm": True,
                    **arguments,
                }
            ),
        )
        if attached:
            attach(trainer)
        return trainer

    return make


def history(trainer, key="loss"):
    return [entry for entry in trainer.state.log_history if key in entry]


# One big batch


def gradient_of_one_big_batch(model, config, data):
    """From the model's own logits; nothing of Trainer."""
    batch = collate(data)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    others = {name: batch[name] for name in ("input_ids", "attention_mask")}
    loss = Objective.from_config(config).from_logits(logits, batch["labels"], **others).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


CUTS = {f"{steps}x{size}": (size, steps) for size, steps in ((8, 1), (4, 2), (2, 4), (1, 8), (3, 3))}


@pairwise(config=OBJECTIVES, cut=CUTS, untrained={"all rows": (), "some rows untrained": (2, 5)})
def test_accumulation_is_one_big_batch(config, cut, untrained, make_trainer, make_model):
    """However the rows are cut into micro-batches, and where a micro-batch has no trained token."""
    data = rows(8, untrained)
    size, steps = cut
    gradients = Gradients()
    trainer = make_trainer(
        config,
        data,
        callbacks=[gradients],
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        num_train_epochs=1,
        max_steps=-1,
    )
    trainer.train()
    (seen,) = gradients.seen
    loss, expected = gradient_of_one_big_batch(make_model().double(), config, data)
    for name, grad in expected.items():
        torch.testing.assert_close(
            seen[name], grad, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name} {text}"
        )
    (entry,) = history(trainer)
    assert entry["loss"] == pytest.approx(float(loss), abs=FLOAT32)


def test_columns_keep_their_digits_where_inputs_are_cast(make_trainer):
    """FSDP casts what is not whole among the inputs of the model to the type of its parameters, such as bfloat16."""

    def cast(module, args, given):
        return args, {k: x.bfloat16() if torch.is_floating_point(x) else x for k, x in given.items()}

    data = [{**row, "third": 1 / 3, "said": [-7.77] * len(row["labels"])} for row in rows(4)]
    config = {"terms": [{"loss": "anchored"}], "example_weights": "third", "reference_logps": "said"}
    found = []
    for hook in None, cast:
        trainer = make_trainer(config, data, evaluated=data, eval_strategy="steps", eval_steps=1)
        if hook is not None:
            trainer.model.register_forward_pre_hook(hook, with_kwargs=True)
        trainer.train()
        found.append([trainer.state.log_history[0]["loss"], trainer.state.log_history[1]["eval_loss"]])
    assert found[0] == found[1]


def test_without_the_count_it_stops(make_trainer):
    """The gradient would be the mean of means of micro-batches, which have other numbers of tokens."""
    trainer = make_trainer("focal", rows(8), gradient_accumulation_steps=8, per_device_train_batch_size=1)
    trainer.model_accepts_loss_kwargs = False
    with pytest.raises(RuntimeError, match=r"0\.125 times the objective where 0\.\d+ times would be right"):
        trainer.train()


# The log


@pytest.mark.parametrize("steps", [1, 2])
def test_loss_is_the_weighted_sum_of_the_terms(steps, make_trainer):
    """Over several steps between two logs, and the micro-batches of each."""
    trainer = make_trainer(
        SEQUENCE_MIX,
        rows(24),
        max_steps=6,
        logging_steps=3,
        gradient_accumulation_steps=steps,
        per_device_train_batch_size=2,
    )
    trainer.train()
    entries = history(trainer)
    assert [entry["step"] for entry in entries] == [3, 6]
    for entry in entries:
        total = 0.6 * entry["cv_loss/cross_entropy"] + 0.4 * entry["cv_loss/lovasz"]
        assert entry["loss"] == pytest.approx(total, abs=FLOAT32)
        assert entry["cv_loss/nll"] != entry["cv_loss/cross_entropy"]  # the prompt belongs to the latter


def test_it_says_with_what_it_trains(make_trainer, caplog):
    make_trainer({"cross_entropy": 0.6, "lovasz": 0.4}, rows(2))
    (line,) = [record.getMessage() for record in caplog.records if "training with" in record.getMessage()]
    assert line.startswith("cv_loss: training with 0.6 cross_entropy + 0.4 lovasz; ")


@pytest.mark.parametrize("labelled", [1, 2, 3])
def test_it_says_so_once_where_answers_are_too_short_for_an_overlap(labelled, make_trainer, caplog):
    data = rows(8)
    for row in data:
        row["labels"][:-labelled] = -100
        row["labels"][-labelled:] = row["input_ids"][-labelled:]
    key = {"cross_entropy": 0.4, "lovasz": 0.2, "dice": {"weight": 0.2, "per": "batch"}, "tversky": 0.2}
    trainer = make_trainer(key, data, max_steps=3)
    trainer.train()
    told = [record.getMessage() for record in caplog.records if "no overlap" in record.getMessage()]
    assert len(told) == (labelled <= 2)
    assert all("have one labelled token" in line and "value of lovasz and tversky" in line for line in told)
    if labelled == 1:
        entry = history(trainer)[0]
        assert entry["cv_loss/lovasz/tokens"] == entry["cv_loss/lovasz/sets"] == 8


def test_a_loss_that_comes_twice_is_logged_twice(make_trainer):
    terms = [{"loss": "focal", "gamma": 0.0}, {"loss": "focal", "gamma": 2.0, "weight": 0.5}]
    trainer = make_trainer({"terms": terms}, rows(8))
    trainer.train()
    (entry,) = history(trainer)
    assert entry["cv_loss/focal"] == pytest.approx(entry["cv_loss/nll"])
    assert entry["loss"] == pytest.approx(entry["cv_loss/focal"] + 0.5 * entry["cv_loss/focal_2"], abs=FLOAT32)


def test_evaluation(make_trainer, make_model):
    """Over all rows, each token counting the same, in the middle of training and with a prefix of one's own."""
    train, test = rows(16), rows(5)
    trainer = make_trainer(
        "lovasz",
        train,
        max_steps=4,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=2,
        evaluated={"one": test, "two": train},
    )
    trainer.train()
    assert len(history(trainer, "eval_one_loss")) == len(history(trainer, "eval_two_loss")) == 4
    last = history(trainer, "eval_one_cv_loss/nll")[-1]
    _, _, labels = batch = [collate(test)[name] for name in ("input_ids", "attention_mask", "labels")]
    with torch.no_grad():
        logits = trainer.model(input_ids=batch[0], attention_mask=batch[1]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert last["eval_one_cv_loss/nll"] == pytest.approx(float(expected), abs=1e-9)
    lovasz = Objective.from_config("lovasz").from_logits(logits, labels).loss
    assert last["eval_one_cv_loss/lovasz"] == pytest.approx(float(lovasz), abs=1e-9)
    # Evaluations in between do not reach the training terms.
    for entry in history(trainer):
        assert entry["loss"] == pytest.approx(entry["cv_loss/lovasz"], abs=FLOAT32)
    metrics = trainer.evaluate(test, metric_key_prefix="final")
    assert metrics["final_cv_loss/nll"] == pytest.approx(float(expected), abs=1e-9)


def test_compute_metrics_gets_the_logits(make_trainer):
    trainer = make_trainer("lovasz", rows(8), per_device_eval_batch_size=2)
    trainer.compute_metrics = lambda prediction: {"width": prediction.predictions.shape[-1]}
    assert trainer.evaluate(rows(4))["eval_width"] == trainer.model.config.vocab_size
    trainer.train()
    assert trainer.predict(rows(4)).predictions.shape[0] == 4


def test_best_model_by_nll(make_trainer):
    """The terms and the NLL can choose the checkpoint, or stop the training, like any metric."""
    trainer = make_trainer(
        "lovasz",
        rows(16),
        evaluated=rows(4),
        max_steps=6,
        learning_rate=20.0,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        metric_for_best_model="cv_loss/nll",
        greater_is_better=False,
        load_best_model_at_end=True,
    )
    trainer.train()
    best = min(entry["eval_cv_loss/nll"] for entry in history(trainer, "eval_loss"))
    assert trainer.state.best_metric == best
    assert trainer.evaluate()["eval_cv_loss/nll"] == pytest.approx(best)


class Break(TrainerCallback):
    """Put a NaN, or an infinity, into the model before a step."""

    def __init__(self, step, value=math.nan):
        self.step, self.value = step, value

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                model.lm_head.weight[7, 0] = self.value


@pytest.mark.parametrize(("filtered", "value"), [(True, math.nan), (False, math.nan), (False, -math.inf)])
def test_nan_is_reported_once_and_stays_visible(filtered, value, make_trainer, caplog):
    """Trainer replaces a NaN of its own loss by the mean of the others, unless told not to."""
    options = {"max_steps": 6, "logging_steps": 2, "logging_nan_inf_filter": filtered}
    trainer = make_trainer(SEQUENCE_MIX, rows(16), callbacks=[Break(3, value)], **options)
    trainer.train()
    (message,) = [record.getMessage() for record in caplog.records if "NaN" in record.getMessage()]
    assert "cross_entropy, lovasz, nll became NaN or infinite in step 3 on rank 0" in message
    first, *others = [entry["cv_loss/nll"] for entry in history(trainer)]
    assert math.isfinite(first)
    assert all(math.isnan(value) for value in others)


class Sometimes(TrainerCallback):
    """NaN in the value of a loss, not in its gradient, in some steps."""

    def __init__(self, steps):
        self.steps, self.now = steps, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = math.nan if state.global_step + 1 in self.steps else 0.0


@pytest.fixture
def make_sometimes(make_trainer):
    """A trainer with such a loss."""

    def make(steps, **options):
        callback = Sometimes(steps)
        register_loss("sometimes", family="token")(lambda logp: callback.now - logp)
        config = {"sometimes": 0.5, "focal": 0.5}
        trainer = make_trainer(config, rows(4), callbacks=[callback], logging_steps=10, **options)
        trainer.sometimes = callback
        return trainer

    with temporary_losses():
        yield make


def test_nan_of_a_loss_is_told_apart(make_sometimes, caplog):
    make_sometimes({3}, max_steps=4).train()
    (message,) = [record.getMessage() for record in caplog.records if "NaN" in record.getMessage()]
    assert "cv_loss: sometimes became NaN or infinite in step 3 on rank 0" in message
    assert "not the model but the loss" in message
    assert "logits there hold" not in message


def test_a_run_of_nan_stops_before_it_is_saved(make_sometimes, tmp_path, monkeypatch):
    trainer = make_sometimes(range(26, 1000), max_steps=60, save_strategy="steps", save_steps=50)
    with pytest.raises(RuntimeError, match=r"NaN in all 25 steps from 26 to 50, .*resume_from_checkpoint"):
        trainer.train()
    assert trainer.state.global_step == 50
    monkeypatch.setenv("CVLOSS_GO_ON", "1")
    trainer.train()
    assert trainer.state.global_step == 60


def test_one_sound_step_among_those_of_nan_is_enough(make_sometimes):
    trainer = make_sometimes({*range(1, 25), *range(26, 50)}, max_steps=60)
    trainer.train()
    assert trainer.state.global_step == 60


def test_another_training_is_not_stopped_by_the_nan_of_the_last(make_sometimes):
    trainer = make_sometimes(range(1, 26), max_steps=25)
    trainer.train()
    trainer.sometimes.steps = set()
    trainer.args.max_steps = 30
    trainer.train()
    assert trainer.state.global_step == 30


def test_without_logging_nothing_is_kept_and_nan_is_reported(make_trainer, caplog):
    kept = []

    class Watched(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            kept.append(sum(isinstance(thing, ObjectiveResult) for thing in gc.get_objects()))
            return loss

    options = {"max_steps": 40, "logging_strategy": "no", "per_device_train_batch_size": 1}
    trainer = make_trainer("focal", rows(8), trainer_class=Watched, callbacks=[Break(38)], **options)
    trainer.train()
    assert kept[-1] <= kept[2]
    (message,) = [record.getMessage() for record in caplog.records if "NaN" in record.getMessage()]
    assert "focal, nll became NaN or infinite in step 38 on rank 0" in message


def test_the_auxiliary_loss_of_experts_is_an_entry(make_trainer):
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    set_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**shape, **heads, output_router_logits=True, router_aux_loss_coef=0.5))
    options = {"max_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    evaluating = {"evaluated": rows(3), "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer({"cross_entropy": 0.6, "dice": 0.4}, rows(8), model=model, **options, **evaluating)
    trainer.train()
    for key, prefix in ("loss", ""), ("eval_loss", "eval_"):
        for entry in history(trainer, key):
            mix = 0.6 * entry[f"{prefix}cv_loss/cross_entropy"] + 0.4 * entry[f"{prefix}cv_loss/dice"]
            assert entry[f"{prefix}cv_loss/aux_loss"] > 0.5
            assert entry[key] == pytest.approx(mix + entry[f"{prefix}cv_loss/aux_loss"], abs=FLOAT32)


def test_nan_in_an_evaluation(make_trainer, caplog):
    trainer = make_trainer("focal", rows(8))
    trainer.train()
    Break(1).on_step_begin(None, type(trainer.state)(), None, model=trainer.model)
    assert math.isnan(trainer.evaluate(rows(4))["eval_cv_loss/focal"])
    assert "focal, nll became NaN or infinite in the evaluation after step 1" in caplog.text


# What cannot work


class LossOfItsOwn(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
        return (loss, {"logits": logits}) if return_outputs else loss


class StepOfItsOwn(LossOfItsOwn):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, inputs)
        loss.backward()
        return loss.detach()


class LossBesideTheModels(Trainer):
    """Asks the model for its loss, and trains with another."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        _, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].mT, inputs["labels"][:, 1:])
        return (loss, outputs) if return_outputs else loss


class StepBesideTheModels(LossBesideTheModels):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        loss.backward()
        return loss.detach()


OWN = [LossOfItsOwn, StepOfItsOwn, LossBesideTheModels, StepBesideTheModels]


@pytest.mark.parametrize("trainer_class", OWN)
def test_a_trainer_with_a_loss_of_its_own_is_stopped(trainer_class, make_trainer):
    trainer = make_trainer({"lovasz": 1.0, "head": "logits"}, rows(8), trainer_class=trainer_class)
    with pytest.raises(RuntimeError, match=f"{trainer_class.__name__} computes a loss of its own"):
        trainer.train()


class Changes(Trainer):
    """Does something to the loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = self.change(loss, model)
        return (loss, outputs) if return_outputs else loss


class Half(Changes):
    def change(self, loss, model):
        return 0.5 * loss


class HalfLater(Half):
    def change(self, loss, model):
        return loss if self.state.global_step < 3 else super().change(loss, model)


class Adds(Changes):
    def change(self, loss, model):
        return loss + 1e-1 * model.lm_head.weight.square().sum()


class NoCount(Trainer):
    """As in many examples."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def test_a_part_of_the_objective_is_not_the_objective(make_trainer):
    with pytest.raises(RuntimeError, match=r"Half trains with 0\.5 times the objective where 1 times would be right"):
        make_trainer("lovasz", rows(8), trainer_class=Half).train()
    later = make_trainer("lovasz", rows(8), trainer_class=HalfLater, max_steps=40, logging_strategy="no")
    with pytest.raises(RuntimeError, match="HalfLater trains with 0"):
        later.train()


def test_without_passing_the_count_on_one_micro_batch_makes_a_step(make_trainer):
    make_trainer("lovasz", rows(8), trainer_class=NoCount).train()
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = make_trainer("lovasz", rows(8), trainer_class=NoCount, **options)
    with pytest.raises(RuntimeError, match="must pass num_items_in_batch on to the model"):
        trainer.train()


def test_what_a_trainer_adds_is_told(make_trainer, caplog):
    trainer = make_trainer("lovasz", rows(8), trainer_class=Adds, max_steps=2)
    trainer.train()
    first, _ = history(trainer)
    (added,) = re.findall(r"Adds or an adapter adds (\S+) to the objective", caplog.text)
    assert float(added) == pytest.approx(first["loss"] - first["cv_loss/lovasz"], rel=1e-5)


class DividesAgain(Trainer):
    """To Trainers from 5.24 on: training_step is to divide by the accumulation steps."""

    loss_is_scaled_for_ga = False


def test_the_count_decides_about_accumulation(make_trainer, make_model):
    gradients = Gradients()
    options = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}
    make_trainer("focal", rows(8), trainer_class=DividesAgain, callbacks=[gradients], **options).train()
    _, expected = gradient_of_one_big_batch(make_model().double(), "focal", rows(8))
    torch.testing.assert_close(gradients.seen[0]["lm_head.weight"], expected["lm_head.weight"], rtol=1e-9, atol=1e-12)


def test_refused_at_once(make_trainer):
    trainer = make_trainer("lovasz", rows(2), attached=False)
    with pytest.raises(RuntimeError, match="no objective is installed"):
        attach(trainer)
    with pytest.raises(RuntimeError, match="label_smoothing_factor"):
        make_trainer("lovasz", rows(2), label_smoothing_factor=0.1)
    trainer = make_trainer("lovasz", rows(2), attached=False)
    install(trainer.model, Objective.from_config("lovasz"))
    trainer.compute_loss_func = lambda *args, **kwargs: None
    with pytest.raises(RuntimeError, match="compute_loss_func"):
        attach(trainer)


def test_after_training_the_model_lets_go_of_the_trainer(make_trainer):
    """And so of the optimizer, which is twice as large as the model."""
    trainer = make_trainer("lovasz", rows(4))
    trainer.train()
    model, gone = trainer.model, [weakref.ref(trainer), weakref.ref(trainer.optimizer)]
    del trainer
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    assert model(**collate(rows(2))).loss.isfinite()


def test_trainer_stays_what_it_was(make_trainer):
    class Custom(Trainer):
        pass

    trainer = make_trainer("lovasz", rows(2), trainer_class=Custom)
    assert isinstance(trainer, Custom)
    assert type(trainer).__name__ == "Custom"
    assert type(make_trainer("lovasz", rows(2), trainer_class=Custom, attached=False)) is Custom


# What is counted, and what changes


def test_tokens_sets_and_classes_of_a_step_are_logged(make_trainer):
    data = rows(6)
    key = {
        "terms": [{"loss": "cross_entropy", "scope": "sequence"}, {"loss": "dice"}, {"loss": "lovasz", "per": "batch"}]
    }
    trainer = make_trainer(
        key,
        data,
        evaluated=data,
        eval_strategy="steps",
        eval_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
    )
    trainer.train()
    (entry,), (evaluation,) = history(trainer), history(trainer, "eval_loss")
    answers = [[label for label in row["labels"][1:].tolist() if label != -100] for row in data]
    expected = {
        "cross_entropy/tokens": sum(len(row["labels"]) - 1 for row in data),
        "dice/tokens": sum(map(len, answers)),
        "dice/sets": 6,
        "dice/classes": sum(len(set(answer)) for answer in answers) / 6,
        "lovasz/sets": 3,
    }
    assert {name: entry[f"cv_loss/{name}"] for name in expected} == pytest.approx(expected)
    assert entry["cv_loss/lovasz/classes"] != evaluation["eval_cv_loss/lovasz/classes"]
    assert evaluation["eval_cv_loss/dice/sets"] == 6


def test_a_schedule_follows_the_steps_and_survives_resume(make_trainer, tmp_path):
    key = {"cross_entropy": 0.6, "lovasz": {"weight": {"from": 0.0, "to": 0.4, "over": 0.5}}}
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
    whole = make_trainer(key, rows(8), **options)
    whole.train()
    assert [e["cv_loss/lovasz/weight"] for e in history(whole)] == pytest.approx([0.0, 0.2, 0.4, 0.4])
    for entry in history(whole):
        total = 0.6 * entry["cv_loss/cross_entropy"] + entry["cv_loss/lovasz/weight"] * entry["cv_loss/lovasz"]
        assert entry["loss"] == pytest.approx(total, abs=FLOAT32)
    resumed = make_trainer(key, rows(8), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name in ("loss", "cv_loss/lovasz/weight", "cv_loss/lovasz"):
        assert [e[name] for e in history(resumed)] == [e[name] for e in history(whole)]


# The share of a term


def share(model, config, batch):
    """By autograd on the logits of a batch, whose rows are fewer than a sample has."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.detach()
    norms = {}
    for name, weight in config.items():
        leaf = logits.clone().requires_grad_()
        given = {"attention_mask": batch["attention_mask"]}
        loss = Objective.from_config({name: weight}).from_logits(leaf, batch["labels"], **given).loss
        norms[name] = float(torch.autograd.grad(loss, leaf)[0].norm())
    return {name: norm / sum(norms.values()) for name, norm in norms.items()}


def test_the_share_of_a_term_is_that_of_the_gradient_of_the_logits(make_trainer):
    """Of the last micro-batch; only where steps are logged."""
    config, data = {"cross_entropy": 0.6, "lovasz": 0.4}, rows(4)

    sampled = []

    class Counting(Trainer):
        def compute_loss(self, *args, **kwargs):
            sampled.append(self.cv_loss.sample)
            return super().compute_loss(*args, **kwargs)

    options = {"max_steps": 4, "logging_steps": 2, "learning_rate": 0.0, "gradient_accumulation_steps": 2}
    trainer = make_trainer(config, [*data, *data], Counting, per_device_train_batch_size=4, **options)
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader([*data, *data], 4, collate_fn=collate)
    trainer.train()
    assert sampled == [False, False, False, True] * 2
    expected = share(trainer.model, config, collate(data))
    for entry in history(trainer):
        assert {name: entry[f"cv_loss/{name}/share"] for name in config} == pytest.approx(expected)
    assert len(history(trainer)) == 2


def test_the_share_of_one_term_is_not_told(make_trainer):
    trainer = make_trainer("lovasz", rows(4))
    trainer.train()
    assert not any(name.endswith("/share") for entry in history(trainer) for name in entry)
