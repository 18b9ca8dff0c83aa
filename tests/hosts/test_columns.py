"""Columns of the dataset, and numbers of messages, through the preparation of TRL and Axolotl."""

import json
from types import SimpleNamespace

import dill
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig

pytest.importorskip("axolotl")

from axolotl.utils.data import sft, utils, wrappers
from axolotl.utils.dict import DictDefault

from axolotl_cvloss import CVLossSFTConfig, CVLossSFTTrainer
from axolotl_cvloss.hosts.axolotl_columns import carry
from axolotl_cvloss.hosts.chats import message_of_each_token
from axolotl_cvloss.objective.config import ConfigError, CVLossConfig

# Markers are words that are in the vocabulary, as the tokenizer of these tests knows nothing else.
PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + ' </s>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + ' ? ' }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' : ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant : ' }}{% endif %}"
)
ALTERNATING = (  # what many templates do to conversations that they do not know
    "{% if messages[-1]['role'] != 'assistant' or messages|length % 2 %}{{ raise_exception('roles') }}{% endif %}"
    + MARKED
)
THINKING = (  # the thoughts of all but the last message are taken away, and the last has some if it has none
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' : ' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ 'sort ' + (m['thoughts'] or '0') + ' sort ' }}{% endif %}"
    "{{ m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant : ' }}{% endif %}"
)
TEMPLATES = {"plain": PLAIN, "marked": MARKED, "alternating": ALTERNATING, "thinking": THINKING}
SAID = ["w1 w2", "w3", "w1 w2", "w4 w5 w6"]
ROLES = ["user", "assistant", "user", "assistant"]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_the_tokens_of_messages(template, tokenizer):
    """What a message says, and the token that ends it, are its tokens."""
    messages = [{"role": r, "content": s, "thoughts": None} for r, s in zip(ROLES, SAID, strict=True)]

    def render(messages, **more):
        return tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **more)

    ids = tokenizer(render(messages), add_special_tokens=False)["input_ids"]
    found = message_of_each_token(messages, ids, tokenizer, render)
    words = tokenizer.convert_ids_to_tokens(ids)
    assert len(found) == len(words)
    at = 0
    for number, said in enumerate(SAID, start=1):
        wanted = said.split()
        while words[at : at + len(wanted)] != wanted:
            at += 1
        ended = at + len(wanted) + (words[at + len(wanted) : at + len(wanted) + 1] == ["</s>"])
        assert set(found[at:ended]) == {number}
        at = ended
    if template == THINKING:  # an assistant's thoughts are its own
        assert [n for n, word in zip(found, words, strict=True) if word == "sort"] == [4, 4]


def test_tokens_that_are_not_those_of_the_text_are_refused(tokenizer):
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]

    def render(messages, **more):
        return tokenizer.apply_chat_template(messages, tokenize=False, chat_template=MARKED, **more)

    for which, ids in [(tokenizer, [5, 6]), (SimpleNamespace(is_fast=False), [5])]:
        with pytest.raises(ValueError, match="cannot be told apart: this takes a fast tokenizer"):
            message_of_each_token(messages, ids, which, render)


def conversations(count=12):
    """Of two rounds; every answer has a weight but some of the first, and some second ones are bad."""
    found = []
    for i in range(count):
        first = {"role": "assistant", "content": f"w{i} w{i + 1}", **({"weight": 0.5} if i % 3 else {})}
        second = {"role": "assistant", "content": " ".join(["w7"] * (1 + i % 4)), "weight": 0.0 if i % 2 else 2.0}
        if i % 4 == 2:
            second["bad"] = 1
        ask = [{"role": "user", "content": f"sort : w{i}"}, {"role": "user", "content": "sort : w2 w3"}]
        found.append({"messages": [ask[0], first, ask[1], second]})
    return found


def expected(rows):
    """What each word of the text of PLAIN counts, and where it is bad; written by hand for this template."""
    found = []
    for row in rows:
        for message in row["messages"]:
            answer = message["role"] == "assistant"
            weight = 1.0 if message.get("weight") is None else message["weight"]
            for word in [*message["content"].split(), "</s>" if answer else "?"]:
                found.append((word, weight, float(message.get("bad") or 0), answer))
    return found


KEY = {
    "terms": [{"loss": "cross_entropy"}, {"loss": "unlikelihood", "weight": 0.1, "where": "bad"}],
    "example_weights": "weight",
}
SFT = {
    "max_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "assistant_only_loss": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "logging_steps": 1,
}


def trainer_of(rows, make_model, tokenizer, monkeypatch, tmp_path, key=KEY, streamed=False, **arguments):
    monkeypatch.setattr(tokenizer, "chat_template", PLAIN)
    data = Dataset.from_list(rows)
    return CVLossSFTTrainer(
        model=make_model(),
        args=CVLossSFTConfig(output_dir=str(tmp_path), cv_loss=key, **{**SFT, **arguments}),
        train_dataset=data.to_iterable_dataset() if streamed else data,
        processing_class=tokenizer,
    )


WAYS = {
    "padded": {"per_device_train_batch_size": 12},
    "packed": {"packing": True, "max_length": 40, "per_device_train_batch_size": 12},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 30, "per_device_train_batch_size": 20},
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_messages_under_trl(way, make_model, tokenizer, monkeypatch, tmp_path):
    trainer = trainer_of(conversations(), make_model, tokenizer, monkeypatch, tmp_path, **way)
    (batch,) = trainer.get_train_dataloader()
    real = batch["input_ids"] != tokenizer.pad_token_id
    words = tokenizer.convert_ids_to_tokens(batch["input_ids"][real].tolist())
    seen = zip(words, batch["weight"][real].tolist(), batch["bad"][real].tolist(), strict=True)
    assert sorted(seen) == sorted(entry[:3] for entry in expected(conversations()))
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    # Documents may be cut, and nothing predicts what a line begins with.
    first = batch["labels"][:, 0] != -100
    answers = [bad for _, _, bad, answer in expected(conversations()) if answer]
    assert entry["cv_loss/unlikelihood/tokens"] == sum(answers) - int((first & (batch["bad"][:, 0] == 1)).sum())
    assert entry["cv_loss/cross_entropy/tokens"] == len(answers) - int(first.sum())
    assert entry["cv_loss/unlikelihood"] > 0


def test_messages_of_a_stream_under_trl(make_model, tokenizer, monkeypatch, tmp_path):
    rows = conversations()
    way = {"per_device_train_batch_size": 12, "streamed": True}
    trainer = trainer_of(rows, make_model, tokenizer, monkeypatch, tmp_path, **way)
    batch = next(iter(trainer.get_train_dataloader()))
    real = batch["input_ids"] != tokenizer.pad_token_id
    assert batch["weight"][real].tolist() == [weight for _, weight, _, _ in expected(rows)]


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ({"cross_entropy": {"where": "good"}}, r"cv_loss\.cross_entropy\.where: the training set has no column good"),
        ({"cross_entropy": 1.0, "example_weights": "w"}, r"cv_loss\.example_weights: the training set has no column w"),
    ],
)
def test_a_column_that_is_nowhere_is_said_before_the_model_is_loaded(key, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        CVLossSFTTrainer(
            model="no such model",
            args=CVLossSFTConfig(output_dir=str(tmp_path), cv_loss=key, **SFT),
            train_dataset=Dataset.from_list(conversations(2)),
        )


def test_an_evaluation_set_may_be_without_weights_alone(tmp_path):
    weighed, plain = ([{"text": "w1", **more}] for more in ({"weight": 2.0, "bad": 1}, {}))
    for key, said in [
        ({"cross_entropy": {"where": "bad"}}, "the evaluation set has no column bad"),
        ({"cross_entropy": 1.0, "example_weights": "weight"}, "no such model"),
    ]:
        with pytest.raises(Exception, match=said):
            CVLossSFTTrainer(
                model="no such model",
                args=CVLossSFTConfig(output_dir=str(tmp_path), cv_loss=key, bf16=False, use_cpu=True),
                train_dataset=Dataset.from_list(weighed),
                eval_dataset={"one": Dataset.from_list(plain)},
            )


def test_without_columns_nothing_is_prepared_otherwise(make_model, tokenizer, monkeypatch, tmp_path):
    from trl import SFTTrainer

    monkeypatch.setattr(tokenizer, "chat_template", PLAIN)
    options = {**SFT, "packing": True, "max_length": 40}
    theirs = SFTTrainer(
        model=make_model(),
        args=SFTConfig(output_dir=str(tmp_path), **options),
        train_dataset=Dataset.from_list(conversations()),
        processing_class=tokenizer,
    )
    with_columns = trainer_of(conversations(), make_model, tokenizer, monkeypatch, tmp_path, **WAYS["packed"])
    without = trainer_of(conversations(), make_model, tokenizer, monkeypatch, tmp_path, "focal", **WAYS["packed"])
    assert without.train_dataset[:] == theirs.train_dataset[:]
    for name, values in theirs.train_dataset[:].items():  # and beside the columns the data are the same
        assert with_columns.train_dataset[:][name] == values


# Axolotl


@pytest.fixture
def chats(make_config, tokenizer, files, tmp_path):
    """A config of chat data, whose tokenizer has the template."""

    def make(rows=None, **keys):
        path = tmp_path / "chats.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in (conversations(40) if rows is None else rows)))
        data = {
            "path": str(path),
            "ds_type": "json",
            "split": "train",
            "type": "chat_template",
            "roles_to_train": ["assistant"],
            "train_on_eos": "turn",
        }
        return make_config(
            **{
                "cv_loss": KEY,
                "chat_template": "jinja",
                "chat_template_jinja": PLAIN.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
                "datasets": [data],
                "test_datasets": [data],
                "dataset_prepared_path": str(tmp_path / "prepared"),
                **keys,
            }
        )

    return make


@pytest.mark.hosts
@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True], ids=["padded", "packed"])
def test_messages_under_axolotl(packed, chats, train, tokenizer):
    """The evaluation after the last step is that of the model that is saved: each word counts as its message says."""
    keys = {"sample_packing": True, "eval_sample_packing": True, "attn_implementation": "eager"} if packed else {}
    config = chats(**keys, eval_steps=12, micro_batch_size=1 if packed else 2)
    history, output, _ = train(config)
    model = AutoModelForCausalLM.from_pretrained(output)
    weighted, bad, answers = 0.0, 0, 0
    for row in conversations(40):
        words = expected([row])
        ids = torch.tensor([tokenizer.convert_tokens_to_ids([word for word, *_ in words])])
        with torch.no_grad():
            logp = model(ids).logits[0].log_softmax(-1)
        for t, (_, weight, is_bad, answer) in enumerate(words):
            if answer:
                weighted -= weight * float(logp[t - 1, ids[0, t]])
                bad, answers = bad + is_bad, answers + 1
    evaluation = [entry for entry in history if "eval_loss" in entry][-1]
    assert evaluation["eval_cv_loss/cross_entropy/tokens"] == answers
    assert evaluation["eval_cv_loss/unlikelihood/tokens"] == bad
    assert evaluation["eval_cv_loss/cross_entropy"] == pytest.approx(weighted / answers, rel=1e-4)


def prepared(rows, key, tokenizer, **fields):
    """What Axolotl makes of rows for a key, before it packs them; fields of its config for the dataset."""
    carry(CVLossConfig.parse(key))
    cfg = DictDefault(sequence_len=16, train_on_inputs=False, chat_template="tokenizer_default")
    given = DictDefault(path="rows", **fields)
    data, _ = wrappers.get_dataset_wrapper(given, tokenizer, cfg, fields["type"], Dataset.from_list(rows))
    return data


@pytest.fixture(autouse=True)
def nothing_is_carried_afterwards():
    yield
    carry(None)


WEIGHED = {"cross_entropy": 1.0, "example_weights": "importance"}


def test_a_number_an_example_through_prompts_of_this_package(tokenizer):
    rows = [
        {"question": "w1 w2", "answer": "<<1+1=2>> #### 2", "importance": 0.5},
        {"question": "w3", "answer": "#### 7", "importance": 2},
    ]
    kind = "axolotl_cvloss.hosts.axolotl_prompts.gsm8k"
    data = prepared(rows, WEIGHED, tokenizer, type=kind)
    assert [row["importance"] for row in data] == [
        [n] * len(row["input_ids"]) for n, row in zip((0.5, 2.0), data, strict=True)
    ]
    carry(None)
    plain, _ = wrappers.get_dataset_wrapper(
        DictDefault(path="rows", type=kind), tokenizer, DictDefault(sequence_len=16), kind, Dataset.from_list(rows)
    )
    assert plain.column_names == ["input_ids", "attention_mask", "labels"]
    assert plain["input_ids"] == data["input_ids"]


def test_a_long_text_makes_several_examples_of_its_number(tokenizer):
    rows = [{"text": " ".join(["w1"] * 40), "importance": 3}, {"text": "w2", "importance": 1}]
    data = prepared(rows, WEIGHED, tokenizer, type="completion")
    assert len(data) > len(rows)
    assert [set(row["importance"]) for row in data] == [{3.0}] * (len(data) - 1) + [{1.0}]
    assert all(len(row["importance"]) == len(row["input_ids"]) for row in data)


def load(rows, key, tokenizer, tmp_path, split, kind):
    """As Axolotl loads a dataset for training or for evaluation."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    carry(CVLossConfig.parse(key))
    data, _ = sft._load_and_process_single_dataset(
        dataset_config=DictDefault(path=str(path), ds_type="json", split="train", type=kind),
        cfg=DictDefault(sequence_len=16),
        tokenizer=tokenizer,
        split=split,
        seed=0,
    )
    return data


TOKENS = {"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [5, 6]}


@pytest.mark.parametrize(("row", "kind"), [({"text": "w1 w2"}, "completion"), (TOKENS, None)], ids=["text", "tokens"])
def test_axolotls_evaluation_set_may_be_without_weights_alone(row, kind, tokenizer, tmp_path):
    acting = {"cross_entropy": {"where": "importance"}}
    assert len(load([row], WEIGHED, tokenizer, tmp_path, "test", kind)) == 1
    for key, split in [(WEIGHED, "train"), (acting, "train"), (acting, "test")]:
        which = {"train": "training", "test": "evaluation"}[split]
        with pytest.raises(ValueError, match=f"the {which} set has no column importance"):
            load([row], key, tokenizer, tmp_path, split, kind)


def test_what_is_cut_is_cut_with_its_numbers(tokenizer):
    carry(CVLossConfig.parse(WEIGHED))
    batch = {"input_ids": [[1, 2, 3], [4]], "labels": [[1, 2, 3], [4]], "importance": [[0.1, 0.2, 0.3], [0.4]]}
    assert utils.truncate_long_seq(batch, sequence_len=2)["importance"] == [[0.1, 0.2], [0.4]]
    carry(None)
    batch = {"input_ids": [[1, 2, 3]], "importance": [[0.1, 0.2, 0.3]]}
    assert utils.truncate_long_seq(batch, sequence_len=2)["importance"] == [[0.1, 0.2, 0.3]]


def test_a_process_that_was_given_the_cut_alone_cuts_the_numbers():
    """What a worker gets that is started anew, with dill as ``datasets`` has it: nothing but the function."""
    carry(CVLossConfig.parse(WEIGHED))
    sent = dill.dumps(utils.truncate_long_seq)
    carry(None)
    batch = {"input_ids": [[1, 2, 3]], "importance": [[0.1, 0.2, 0.3]]}
    assert dill.loads(sent)(batch, sequence_len=2)["importance"] == [[0.1, 0.2]]


def test_data_that_were_prepared_without_the_columns_are_not_taken():
    cfg, data = DictDefault(sequence_len=16), [DictDefault(path="rows", type="completion")]
    names = []
    for key in (
        WEIGHED,
        {"cross_entropy": {"where": "importance"}},
        "cross_entropy",
        {"cross_entropy": {"where": "bad"}},
    ):
        carry(CVLossConfig.parse(key))
        names.append(sft.generate_dataset_hash_from_config(cfg, data, "tokenizer"))
    assert names[0] == names[1]
    assert len(set(names)) == 3


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "w1 w2", "importance": [1.0]}, {"text": "w1 w2", "importance": [1.0] * 9}], "has 9 numbers for"),
        ([{"text": "w1"}], "the training set has no column importance, and no messages with such a field; it has text"),
        (
            [{"text": "w1", "messages": [{"importance": 1.0}]}],
            "only datasets of type chat_template have it in messages",
        ),
    ],
)
def test_what_axolotl_cannot_carry(rows, said, tokenizer):
    with pytest.raises(Exception, match=rf"cv_loss\.example_weights: .*{said}"):
        prepared(rows, WEIGHED, tokenizer, type="completion")
