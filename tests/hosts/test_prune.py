"""``prune``: the rule, and real trainers whose epochs leave out what it says."""

import math
from importlib.util import find_spec

import pytest
import torch
from helpers import naive_weights
from test_trainer import FLOAT32, collate, history, make_trainer, rows  # noqa: F401  (a fixture)
from transformers import TrainerCallback

from axolotl_cvloss import CVLossSFTConfig, install
from axolotl_cvloss.command.checking import check
from axolotl_cvloss.command.probing import probe
from axolotl_cvloss.hosts.pruning import FILE, Pruning, weights_of_epoch
from axolotl_cvloss.objective.config import ConfigError, CVLossConfig

COUNT, STEP = 24, 4
NEEDS_AXOLOTL = pytest.mark.skipif(find_spec("axolotl") is None, reason="axolotl is not installed")
PRUNE = {"cross_entropy": 1.0, "prune": {"share": 0.75, "until": 1.0}}


# The rule


def naive(losses, share, multiple):
    """After InfoBatch, section 3: which examples may be left out, how many are, and what the others of them weigh.

    The number that stays is that of the paper, and then as many more as fill the last step.
    """
    known = [loss for loss in losses if loss is not None]
    mean = math.fsum(known) / len(known) if known else None
    well = [i for i, loss in enumerate(losses) if loss is not None and loss < mean]
    stay = len(well) - math.floor(share * len(well))
    while (len(losses) - len(well) + stay) % multiple and stay < len(well):
        stay += 1
    if not well or (len(losses) - len(well) + stay) % multiple:  # the epoch cannot end with a whole step
        stay = len(well)
    return set(well), stay, (len(well) / stay if stay else 1.0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("multiple", [1, 3, 8])
@pytest.mark.parametrize("unknown", [0, 5, 40])
def test_the_rule(share, multiple, unknown):
    generator = torch.Generator().manual_seed(7)
    losses = torch.rand(40, generator=generator)
    losses[torch.randperm(40, generator=generator)[:unknown]] = math.nan
    weights = weights_of_epoch(losses, share, multiple, generator)
    well, stay, weight = naive([None if loss.isnan() else float(loss) for loss in losses], share, multiple)
    drawn = {i for i in well if weights[i] > 0}
    assert len(drawn) == stay
    for i, found in enumerate(weights.tolist()):
        assert found == pytest.approx(weight if i in drawn else 0.0 if i in well else 1.0, rel=1e-6)
    assert int(weights.count_nonzero()) in {40, *range(0, 41, multiple)}


def test_the_expected_sum_over_an_epoch_is_that_of_all_examples():
    """Over draws, of any gradients. Each sum is a mean of independent draws with the variance of one of them.

    The bound is six standard errors, beyond which a right rule is once in 500 million; a rule that forgot the weights
    would be away by a third of the sum of the examples below the mean.
    """
    generator = torch.Generator().manual_seed(3)
    losses, gradients = (
        torch.rand(30, generator=generator),
        torch.randn(30, 5, generator=generator, dtype=torch.float64),
    )
    sums = torch.stack([weights_of_epoch(losses, 0.7, 4, generator).double() @ gradients for _ in range(4000)])
    off = sums.mean(0) - gradients.sum(0)
    error = sums.std(0) / math.sqrt(len(sums))
    assert (error > 0).all()
    assert (off.abs() < 6 * error).all()
    unweighted = torch.stack(
        [(weights_of_epoch(losses, 0.7, 4, generator) > 0).double() @ gradients for _ in range(400)]
    ).mean(0)
    assert ((unweighted - gradients.sum(0)).abs() > 6 * error).any()


# The clock


@pytest.mark.parametrize(
    ("max_steps", "steps"), [(40, [10, 6, 7, 10]), (37, [10, 6, 7, 10]), (37, [10, 10, 10, 10]), (37, [10, 10, 10, 3])]
)
def test_the_clock_ends_where_whole_epochs_do(max_steps, steps):
    pruning = Pruning(CVLossConfig.parse(PRUNE).prune)
    pruning.start(100, max_steps, whole=10, multiple=10, seed=0)
    done, schedule = 0, 0
    for epoch, length in enumerate(steps):
        pruning.before, pruning.step, pruning.epoch, pruning.steps = done, 0, epoch, length
        assert pruning.last_step <= max_steps
        for step in range(length):
            assert schedule == pruning.position
            before, pruning.step = pruning.position, step + 1
            schedule += pruning.position - before
            done += 1
            if done == pruning.last_step:
                break
    assert done == pruning.last_step
    assert schedule == max_steps
    assert pruning.progress == 1.0


# Trainer


class Watch(TrainerCallback):
    """The examples of each epoch, in their order, with what they weigh; and the rate of each step."""

    def __init__(self, trainer, data):
        self.epochs, self.rates, self.trainer = [], [], trainer
        self.known = {tuple(row["input_ids"].tolist()): number for number, row in enumerate(data)}
        trainer.cv_loss.model.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, model, inputs, given):
        if model.training and self.trainer.cv_loss.looked is None:
            lines = [tuple(t for t in line if t) for line in given["input_ids"].tolist()]
            numbers = torch.tensor([self.known[line] for line in lines])
            assert (given["cv_loss_number"] == numbers).all()
            self.epochs[-1] += zip(numbers.tolist(), self.trainer._cv_pruning.weights_of(numbers).tolist(), strict=True)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epochs.append([])

    def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        self.rates.append(lr_scheduler.get_last_lr()[0])


@pytest.fixture
def pruned(make_trainer):  # noqa: F811
    """A trainer of four epochs that prunes, and what was seen of it."""

    def make(data=None, config=PRUNE, watched=True, **arguments):
        data = rows(COUNT) if data is None else data
        options = {
            "num_train_epochs": 4,
            "max_steps": -1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "lr_scheduler_type": "linear",
            **arguments,
        }
        trainer = make_trainer(config, data, **options)
        watch = Watch(trainer, rows(COUNT)) if watched else None
        if watched:
            trainer.add_callback(watch)
        return trainer, watch

    return make


def nll_of(model, row):
    with torch.no_grad():
        logp = model(row["input_ids"][None]).logits[0, :-1].log_softmax(-1)
    labels = row["labels"][1:]
    chosen = labels != -100
    return -float(logp[chosen].gather(1, labels[chosen][:, None]).mean())


def test_epochs_of_a_trainer(pruned, make_model):
    """With a rate of 0 the losses are those of the model that it began with."""
    trainer, watch = pruned(learning_rate=0.0)
    trainer.train()
    plain, data = make_model().double(), rows(COUNT)
    losses = [nll_of(plain, row) for row in data]
    well, stay, weight = naive(losses, 0.75, STEP)
    first, *others = watch.epochs
    assert sorted(number for number, _ in first) == list(range(COUNT))
    assert {w for _, w in first} == {1.0}
    assert 0 < stay < len(well)
    for epoch in others:
        assert len(epoch) == COUNT - len(well) + stay
        assert len({number for number, _ in epoch}) == len(epoch)
        assert {number for number, _ in epoch} >= set(range(COUNT)) - well
        assert all(w == pytest.approx(weight if number in well else 1.0) for number, w in epoch)
    assert len({frozenset(number for number, _ in epoch) for epoch in others}) > 1  # each draws anew
    steps = [len(epoch) // STEP for epoch in watch.epochs]
    assert trainer.state.global_step == sum(steps) == trainer.state.max_steps < 24
    assert trainer.state.epoch == pytest.approx(4.0)
    logs = history(trainer)
    assert logs[-1]["cv_loss/prune/left_out"] == pytest.approx(1 - sum(steps) / 24)
    assert logs[5]["cv_loss/prune/left_out"] == 0.0
    tokens = [int((row["labels"][1:] != -100).sum()) for row in data]
    seen = [example for epoch in watch.epochs for example in epoch]
    for step, entry in enumerate(logs):
        part = seen[step * STEP : (step + 1) * STEP]
        wanted = sum(w * tokens[i] * losses[i] for i, w in part) / sum(tokens[i] for i, _ in part)
        assert entry["loss"] == pytest.approx(wanted, rel=FLOAT32)
        wanted = sum(tokens[i] * losses[i] for i, _ in part) / sum(tokens[i] for i, _ in part)
        assert entry["cv_loss/nll"] == pytest.approx(wanted, rel=FLOAT32)


def test_the_rate_follows_the_epochs(pruned):
    trainer, watch = pruned()
    trainer.train()
    starts = [sum(len(epoch) // STEP for epoch in watch.epochs[:i]) for i in range(4)]
    whole = 0.1 * (1 - torch.arange(0, 24, 6) / 24)
    assert [watch.rates[start] for start in starts] == pytest.approx(whole.tolist())
    assert watch.rates == sorted(watch.rates, reverse=True)
    assert 0 < watch.rates[-1] < 0.1 * 4 / 24


def test_until_leaves_the_last_epochs_whole(pruned):
    trainer, watch = pruned(config={"cross_entropy": 1.0, "prune": True}, num_train_epochs=3)
    trainer.train()
    assert [len(epoch) for epoch in watch.epochs[::2]] == [COUNT, COUNT]
    assert len(watch.epochs[1]) < COUNT


def test_the_first_epoch_is_that_of_plain_training(pruned):
    losses = []
    for config in PRUNE, "cross_entropy":
        trainer, _ = pruned(config=config, watched=config is PRUNE, max_steps=18)
        trainer.train()
        losses.append([entry["loss"] for entry in history(trainer)])
    assert losses[0][:6] == losses[1][:6]
    assert len(losses[0]) < len(losses[1]) == 18


@pytest.mark.parametrize(
    "at",
    [
        pytest.param("in the first epoch", marks=pytest.mark.slow),
        "after it",
        "in a pruned one",
        pytest.param("after that", marks=pytest.mark.slow),
    ],
)
def test_resume_is_as_if_it_had_not_stopped(at, pruned, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3.5, "optim": "adamw_torch"}
    config = {**PRUNE, "lovasz": {"weight": {"from": 0.0, "to": 0.4}}}
    trainer, watch = pruned(config=config, **options)
    trainer.train()
    first, second = (len(epoch) // STEP for epoch in watch.epochs[:2])
    assert first == 6 > second > 1
    step = {"in the first epoch": 4, "after it": 6, "in a pruned one": 7, "after that": 6 + second}[at]
    again, _ = pruned(config=config, **options)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert again.state.global_step == trainer.state.global_step
    assert history(again) == history(trainer)
    for ours, theirs in zip(again.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_with_weights_of_the_data(pruned):
    """Both multiply; the weights of the data are 2, so the loss is."""
    losses = []
    for key in {}, {"example_weights": "importance"}:
        data = [{**row, "importance": torch.tensor(2.0)} for row in rows(COUNT)]
        trainer, _ = pruned(data, {**PRUNE, **key}, learning_rate=0.0)
        trainer.train()
        losses.append([entry["loss"] for entry in history(trainer)])
    assert losses[1] == pytest.approx([2 * loss for loss in losses[0]], rel=FLOAT32)


@pytest.mark.parametrize("examples", [{"normalize": "examples"}, {"cvar": 0.3}], ids=str)
def test_documents_that_are_weighed(examples, pruned, make_model):
    """Each counts 1, times what its loss among those of the step says, times what it weighs in the epoch.

    With a rate of 0 the losses are those of the model that it began with.
    """
    trainer, watch = pruned(config={**PRUNE, "examples": examples}, learning_rate=0.0)
    trainer.train()
    plain, data = make_model().double(), rows(COUNT)
    losses = torch.tensor([nll_of(plain, row) for row in data], dtype=torch.float64)
    seen = [seen for epoch in watch.epochs for seen in epoch]
    assert len({weight for _, weight in seen}) > 1
    logs = history(trainer)
    assert len(seen) == STEP * len(logs)
    for step, entry in enumerate(logs):
        numbers, weights = (torch.tensor(x) for x in zip(*seen[STEP * step : STEP * (step + 1)], strict=True))
        own = losses[numbers]
        if "cvar" in examples:
            weights = weights * naive_weights(own, torch.ones(STEP), {"cvar": {"share": 0.3}})
        assert entry["loss"] == pytest.approx(float((weights * own).mean()), rel=FLOAT32)


def test_an_example_without_labels_stays(pruned):
    trainer, watch = pruned(rows(COUNT, untrained=(3,)))
    trainer.train()
    assert all(3 in dict(epoch) for epoch in watch.epochs)
    assert trainer._cv_pruning.losses.isnan().nonzero().flatten().tolist() == [3]


def test_a_probe(pruned):
    """It has no callbacks, and takes the objective out of the model at last."""
    trainer, _ = pruned(watched=False)
    assert probe(trainer, 2)["terms"][0]["rows"] > 0


# What is refused


def test_a_checkpoint_of_another_run(pruned, tmp_path):
    trainer, _ = pruned(save_strategy="steps", save_steps=2, num_train_epochs=3)
    trainer.train()
    again, _ = pruned(per_device_train_batch_size=4, num_train_epochs=3)
    with pytest.raises(RuntimeError, match=r"checkpoint-2 was trained with 6 steps an epoch, and now there are 3"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (tmp_path / "checkpoint-2" / FILE).unlink()
    again, _ = pruned(num_train_epochs=3)
    with pytest.raises(RuntimeError, match="so it was not trained with prune"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train_epochs": 2}, r"cv_loss\.prune cannot be used with num_train_epochs: 2: .*3 epochs or more"),
        ({"ignore_data_skip": True}, "cannot be used with ignore_data_skip"),
        ({"accelerator_config": {"dispatch_batches": True}}, "leave dispatch_batches"),
        ({"max_steps": 11}, "needs 3 epochs or more, and 11 steps are 1.83"),
        (
            {"config": {"cross_entropy": 1, "prune": {"until": 0.4}}},
            r"prune\.until: 0\.4 of 4 epochs .* allowed: 0\.5 to 1",
        ),
    ],
)
def test_refused_by_a_trainer(arguments, message, pruned):
    with pytest.raises(RuntimeError, match=message):  # noqa: PT012  (some are known only when training begins)
        trainer, _ = pruned(watched=False, **arguments)
        trainer.train()


def test_a_streamed_dataset_is_refused(pruned):
    class Streamed(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows(4))

    with pytest.raises(RuntimeError, match="cannot be used with a streamed dataset"):
        pruned(Streamed(), watched=False, max_steps=30)


def test_a_model_without_a_trainer_that_prunes(make_model):
    model = install(make_model().double(), PRUNE)
    with pytest.raises(ValueError, match=r"no trainer leaves examples out here; call attach\(trainer\)"):
        model(**collate(rows(2)))
    model.eval()
    assert model(**collate(rows(2))).loss > 0


@NEEDS_AXOLOTL
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sample_packing": True, "num_epochs": 3}, "sample_packing: a packed line has many examples"),
        ({"pretraining_dataset": "x", "num_epochs": 3}, "pretraining_dataset: examples are left out by their numbers"),
        ({}, "num_epochs: 1: the first epoch finds the losses"),
    ],
)
def test_refused_in_a_config_of_axolotl(keys, message, make_config, manager):
    (error,) = check({"base_model": "x", "plugins": ["axolotl_cvloss.CVLossPlugin"], "cv_loss": PRUNE, **keys}).errors
    assert message in error
    from test_axolotl_keys import validated

    if "pretraining_dataset" not in keys:
        with pytest.raises(ValueError, match=message):
            validated(make_config(cv_loss=PRUNE, max_steps=None, **keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"packing": True}, "packing: a packed line has many examples"),
        ({"num_train_epochs": 2}, "num_train_epochs: 2: the first epoch finds the losses"),
    ],
)
def test_refused_in_a_config_of_trl(keys, message, tmp_path):
    (error,) = check({"model_name_or_path": "x", "cv_loss": PRUNE, **keys}, "trl").errors
    assert message in error
    with pytest.raises(ConfigError, match=message):
        CVLossSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, cv_loss=PRUNE, **keys)


def test_refused_with_the_paper_s_code():
    with pytest.raises(ConfigError, match=r"cv_loss\.reference: the paper's code knows no prune; leave it out"):
        CVLossConfig.parse({"cross_entropy": 1, "prune": True, "reference": True})


def test_the_field():
    for given in True, {}, {"share": 0.5, "until": 0.875}:
        dumped = CVLossConfig.parse({"cross_entropy": 1, "prune": given}).dump()
        assert dumped["prune"] == {"share": 0.5, "until": 0.875}
        assert CVLossConfig.parse(dumped).dump() == dumped
    assert "prune" not in CVLossConfig.parse({"cross_entropy": 1, "prune": False}).dump()
    with pytest.raises(
        ConfigError, match=r"prune: must be true, false, or a mapping such as \{share: 0\.5, until: 0\.875\}"
    ):
        CVLossConfig.parse({"cross_entropy": 1, "prune": 0.5})
    with pytest.raises(ConfigError, match=r"prune\.share: must be a finite number > 0 and < 1, not 1"):
        CVLossConfig.parse({"cross_entropy": 1, "prune": {"share": 1}})


# Axolotl; TRL is in test_trl.py


@NEEDS_AXOLOTL
@pytest.mark.hosts
def test_axolotl(make_config, train):
    """`num_epochs: 3`; Axolotl gives its trainer the steps of three whole epochs."""
    key = {"cross_entropy": 0.6, "lovasz": 0.4, "prune": {"share": 0.9}}
    entries, folder, _ = train(make_config(cv_loss=key, num_epochs=3, max_steps=None, save_steps=100))
    losses = [entry for entry in entries if "cv_loss/nll" in entry]
    assert 2 * 16 < len(losses) < 3 * 16
    assert losses[15]["cv_loss/prune/left_out"] == 0.0
    assert losses[-1]["cv_loss/prune/left_out"] == pytest.approx(1 - len(losses) / 48)
    assert losses[-1]["epoch"] == pytest.approx(3.0)
    (saved,) = folder.glob(f"checkpoint-*/{FILE}")
    assert saved.parent.name == f"checkpoint-{len(losses)}"
