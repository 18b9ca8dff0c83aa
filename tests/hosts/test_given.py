"""What losses need beside logits and labels, found by the hosts: tokenizer, counts of labels, a weight column."""

import json

import pytest
import torch
from test_trainer import Gradients, collate, history, make_trainer, rows  # noqa: F401  (a fixture)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer

from axolotl_cvloss import Objective, attach, install

DATA = rows(8)


@pytest.fixture
def digits():
    """A tokenizer whose tokens 10 to 19 are the digits."""
    words = [*"abcdefghij", *"0123456789", *(f"w{i}" for i in range(20, 97))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="a")


def one_big_batch(make_model, config, data, weights=None, columns=None, **more):
    model = make_model().double()
    batch = collate(data)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    objective = Objective.from_config(config, **more)
    inputs = {"columns": columns, **{name: batch[name] for name in ("input_ids", "attention_mask")}}
    objective.from_logits(logits, batch["labels"], example_weights=weights, **inputs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def accumulated(make, config, data, **arguments):
    """The gradient of a step of two micro-batches."""
    gradients = Gradients()
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **arguments}
    trainer = make(config, data, callbacks=[gradients], attached=False, **options)
    return trainer, gradients


def trained(make, config, data, **arguments):
    """The same after a training with the objective."""
    trainer, gradients = accumulated(make, config, data, **arguments)
    install(trainer.model, Objective.from_config(config))
    attach(trainer)
    trainer.train()
    return trainer, gradients


def padded(data, name):
    """(B, T) the numbers that the rows have in a column."""
    found = torch.zeros(collate(DATA)["labels"].shape)
    for line, row in zip(found, data, strict=True):
        line[: len(row[name])] = torch.tensor(row[name])
    return found


def check(gradients, expected):
    (seen,) = gradients.seen
    for name, grad in expected.items():
        torch.testing.assert_close(seen[name], grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["number_token_wasserstein", "number_token_mse"])
def test_trainer_gives_its_tokenizer(loss, digits, make_trainer, make_model):  # noqa: F811
    config = {"cross_entropy": 0.5, loss: 0.5}
    trainer, gradients = accumulated(make_trainer, config, DATA)
    trainer.processing_class = digits
    install(trainer.model, Objective.from_config(config))
    attach(trainer)
    trainer.train()
    check(gradients, one_big_batch(make_model, config, DATA, tokenizer=digits))
    (entry,) = history(trainer)
    numbers = sum(int(((row["labels"][1:] >= 10) & (row["labels"][1:] < 20)).sum()) for row in DATA)
    assert entry[f"cv_loss/{loss}/tokens"] == numbers > 0


def test_no_tokenizer_is_said_before_training(make_trainer):  # noqa: F811
    trainer, _ = accumulated(make_trainer, "cross_entropy", DATA)
    install(trainer.model, Objective.from_config("number_token_mse"))
    with pytest.raises(RuntimeError, match="needs a tokenizer; give the trainer one as processing_class"):
        attach(trainer)


def test_trainer_counts_the_labels(make_trainer, make_model):  # noqa: F811
    _, gradients = trained(make_trainer, "ldam", DATA)
    labels = torch.cat([row["labels"] for row in DATA])
    counts = torch.bincount(labels[labels != -100])
    check(gradients, one_big_batch(make_model, "ldam", DATA, label_counts=counts))


def test_no_data_to_count_is_said_before_training(make_trainer):  # noqa: F811
    trainer, _ = accumulated(make_trainer, "cross_entropy", DATA)
    install(trainer.model, Objective.from_config("ldam"))
    trainer.train_dataset = None
    with pytest.raises(RuntimeError, match=r"it is streamed, or gets its labels in the collator.*Leave the loss out"):
        attach(trainer)


@pytest.mark.parametrize("loss", ["cross_entropy", "dice"])
def test_goldfish_under_accumulation(loss, make_trainer, make_model):  # noqa: F811
    config = {"terms": [{"loss": "cross_entropy"}, {"loss": loss, "goldfish": {"k": 3, "h": 2}}]}
    _, gradients = trained(make_trainer, config, DATA)
    check(gradients, one_big_batch(make_model, config, DATA))


@pytest.mark.parametrize("loss", ["cross_entropy", "dice"])
def test_a_weight_column_reaches_the_objective(loss, make_trainer, make_model):  # noqa: F811
    config = {loss: 1.0, "example_weights": "importance"}
    weights = torch.tensor([0.5, 1.0, 0.0, 2.5, 1.25, 0.75, 3.0, 1.5], dtype=torch.float64)
    data = [{**row, "importance": weight} for row, weight in zip(DATA, weights, strict=True)]
    trainer, gradients = trained(make_trainer, config, data)
    assert type(trainer) is not Trainer
    check(gradients, one_big_batch(make_model, config, DATA, weights=weights))


def one_step(examples, accumulation, make_trainer, make_model):  # noqa: F811
    """A step whose gradient is that of one big batch: its trainer, what it logs, and the evaluation before it."""
    config = {"cross_entropy": 0.6, "lovasz": 0.4, "examples": examples}
    arguments = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    more = {"evaluated": DATA, "eval_on_start": True, "eval_strategy": "steps", "per_device_eval_batch_size": 3}
    trainer, gradients = trained(make_trainer, config, DATA, **arguments, **more)
    check(gradients, one_big_batch(make_model, config, DATA))
    (entry,), (before, _) = history(trainer), history(trainer, "eval_loss")
    return trainer, entry, before


@pytest.mark.parametrize("accumulation", [1, 2, 8])
@pytest.mark.parametrize("normalize", ["examples", "square_root"])
def test_documents_count_alike_however_the_step_is_cut(normalize, accumulation, make_trainer, make_model):  # noqa: F811
    """In training; what is logged in evaluation is the mean over all documents too, not over batches."""
    trainer, entry, before = one_step({"normalize": normalize}, accumulation, make_trainer, make_model)
    for name in ("cross_entropy", "lovasz", "nll"):
        assert before[f"eval_cv_loss/{name}"] == pytest.approx(entry[f"cv_loss/{name}"], rel=1e-6)
    assert entry["loss"] == pytest.approx(0.6 * entry["cv_loss/cross_entropy"] + 0.4 * entry["cv_loss/lovasz"])
    sizes = torch.tensor([float((row["labels"][1:] != -100).sum()) for row in DATA])
    counts = sizes**0.5 if normalize == "square_root" else sizes**0
    said = [entry[f"cv_loss/examples/{what}"] for what in ("smallest", "largest", "effective")]
    known = [counts.min() / counts.mean(), counts.max() / counts.mean(), counts.sum() ** 2 / counts.square().sum()]
    assert said == pytest.approx([float(value) for value in known], rel=1e-5)
    # A user's own batch after the training is one step.
    batch = {**collate(DATA[:3]), "num_items_in_batch": 3.0 if normalize == "examples" else float(counts[:3].sum())}
    with torch.no_grad():
        assert float(trainer.model(**batch).loss) == pytest.approx(float(trainer.model(**collate(DATA[:3])).loss))


@pytest.mark.parametrize("accumulation", [1, 2, 8])
@pytest.mark.parametrize(
    "weights", [{"reweight": {"by": "linear", "warmup": 0}}, {"cvar": 0.4}], ids=["reweight", "cvar"]
)
def test_the_losses_of_a_step_are_looked_at_however_it_is_cut(weights, accumulation, make_trainer, make_model):  # noqa: F811
    """Of documents weighed by them; evaluation weighs all alike."""
    _, entry, before = one_step(weights, accumulation, make_trainer, make_model)
    assert entry["cv_loss/nll"] == pytest.approx(before["eval_cv_loss/nll"], rel=1e-6)
    assert entry["cv_loss/cross_entropy"] != pytest.approx(before["eval_cv_loss/cross_entropy"], rel=1e-4)
    assert entry["loss"] == pytest.approx(0.6 * entry["cv_loss/cross_entropy"] + 0.4 * entry["cv_loss/lovasz"])
    smallest, largest, effective = (entry[f"cv_loss/examples/{w}"] for w in ("smallest", "largest", "effective"))
    assert 0 <= smallest < 1 < largest
    assert effective < 7
    if "cvar" in weights:  # 3.2 of 8 documents: three of them whole, and a fifth of another
        assert (smallest, largest) == (0, pytest.approx(2.5))
        assert effective == pytest.approx(3.2**2 / (3 + 0.2**2))


def test_look_batch_compares_those_of_a_micro_batch(make_trainer, make_model):  # noqa: F811
    """Micro-batches of two documents, of which the worse one has all the weight."""
    config = {"cross_entropy": 1.0, "examples": {"cvar": 0.5, "look": "batch"}}
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer, _ = accumulated(make_trainer, config, DATA, seed=3, **arguments)
    install(trainer.model, Objective.from_config(config))
    attach(trainer)
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    (entry,) = history(trainer)
    model, expected = make_model().double(), []
    for batch in batches:
        lines = [{name: x[i : i + 1] for name, x in batch.items()} for i in range(2)]
        expected.append(max(float(model(**line).loss) for line in lines))
    assert entry["cv_loss/cross_entropy"] == pytest.approx(sum(expected) / 4, rel=1e-6)
    said = [entry[f"cv_loss/examples/{what}"] for what in ("smallest", "largest", "effective")]
    assert said == pytest.approx([0, 2, 4])


def test_a_loop_cannot_look_at_the_step(make_model):
    model = make_model()
    install(model, Objective.from_config({"cross_entropy": 1.0, "examples": {"cvar": 0.5}}))
    model.train()
    with pytest.raises(ValueError, match=r"look: step needs a look at all micro-batches.*take look: batch"):
        model(**collate(DATA[:2]), num_items_in_batch=4)
    assert model(**collate(DATA[:2])).loss.requires_grad  # a batch alone is a step


@pytest.mark.parametrize("loss", ["unlikelihood", "dice", "squentropy", "lovasz"])
def test_a_column_says_where_a_term_acts_under_accumulation(loss, make_trainer, make_model):  # noqa: F811
    """A number a token, cut and padded by nobody but the host; the micro-batches have different numbers of them."""
    config = {"cross_entropy": 1.0, loss: {"weight": 0.5, "where": "acts"}}
    data = [{**row, "acts": [int((i * n) % 3 == 0) for n in range(len(row["labels"]))]} for i, row in enumerate(DATA)]
    _, gradients = trained(make_trainer, config, data)
    check(gradients, one_big_batch(make_model, config, DATA, columns={"acts": padded(data, "acts")}))


@pytest.mark.parametrize(
    ("key", "name"),
    [({"example_weights": "importance"}, "example_weights"), ({"dice": {"where": "importance"}}, "dice.where")],
)
def test_a_missing_column_is_said(key, name, make_trainer):  # noqa: F811
    with pytest.raises(ValueError, match=rf"cv_loss\.{name}: the batch has no column importance, only"):
        trained(make_trainer, {"cross_entropy": 1.0, **key}, DATA)


def test_a_column_that_does_not_fit_is_said(make_trainer):  # noqa: F811
    key = {"cross_entropy": 1.0, "example_weights": "importance"}
    for given, message in [([1.0, 2.0], "has 2 numbers for"), ("much", "is 'much' in an example; give a number")]:
        with pytest.raises(ValueError, match=rf"cv_loss\.example_weights: importance {message}"):
            trained(make_trainer, key, [{**row, "importance": given} for row in DATA])


@pytest.mark.parametrize("loss", ["prior_weighted", "anchored", "importance_weighted"])
def test_a_reference_under_accumulation(loss, make_trainer, make_model):  # noqa: F811
    config = {loss: 1.0, "reference_logps": "base"}
    data = [
        {**row, "base": [-0.1 * (1 + (i + n) % 7) for n in range(len(row["labels"]))]} for i, row in enumerate(DATA)
    ]
    _, gradients = trained(make_trainer, config, data)
    check(gradients, one_big_batch(make_model, config, DATA, columns={"base": padded(data, "base")}))


def test_a_reference_that_is_not_there_is_said(make_trainer):  # noqa: F811
    with pytest.raises(RuntimeError, match=r"cv_loss\.anchored: it needs log p of each token under a reference model"):
        trained(make_trainer, "anchored", DATA)
    named = {"anchored": 1.0, "reference_logps": "base"}
    with pytest.raises(ValueError, match=r"cv_loss\.reference_logps: the batch has no column base, only"):
        trained(make_trainer, named, DATA)
    with pytest.raises(ValueError, match=r"cv_loss\.reference_logps: base has 1 numbers for"):
        trained(make_trainer, named, [{**row, "base": -1.0} for row in DATA])


@pytest.mark.hosts
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_axolotl(packed, make_config, train, tokenizer, problems, tmp_path):
    """A tokenized dataset with a weight column, goldfish, and a loss that counts labels."""
    lines = []
    for number, problem in enumerate(problems["train"]):
        prompt = tokenizer(problem["prompt"])["input_ids"]
        answer = tokenizer(problem["completion"], add_special_tokens=False)["input_ids"]
        ids = prompt + answer
        weight = 0.5 if number % 2 else 1.5
        line = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + answer}
        lines.append({**line, "importance": [weight] * len(ids) if packed else weight})
    path = tmp_path / "tokenized.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    keys = {"sample_packing": True, "pad_to_sequence_len": True, "micro_batch_size": 2} if packed else {}
    config = make_config(
        cv_loss={
            "cross_entropy": {"weight": 0.6, "goldfish": {"k": 3, "h": 2}},
            "ldam": 0.4,
            "example_weights": "importance",
            "examples": {"normalize": "square_root", "reweight": {"by": "linear", "warmup": 0.5}},
        },
        gradient_accumulation_steps=2,
        datasets=[{"path": str(path), "ds_type": "json", "split": "train", "type": None}],
        test_datasets=None,
        eval_steps=None,
        dataset_prepared_path=str(tmp_path / "prepared"),
        **keys,
    )
    entries, _, printed = train(config)
    losses = [entry for entry in entries if "cv_loss/ldam" in entry]
    assert len(losses) == 12
    for entry in losses:
        assert entry["cv_loss/cross_entropy/tokens"] < entry["cv_loss/ldam/tokens"]
        total = 0.6 * entry["cv_loss/cross_entropy"] + 0.4 * entry["cv_loss/ldam"]
        assert entry["loss"] == pytest.approx(total, abs=1e-4)
        assert entry["cv_loss/examples/smallest"] < 1 < entry["cv_loss/examples/largest"]
        assert 4 < entry["cv_loss/examples/effective"] < entry["cv_loss/ldam/tokens"] / 2
    assert losses[-1]["cv_loss/nll"] < losses[0]["cv_loss/nll"] - 0.3
    assert "counting labels" in printed
