"""The cv_loss key: every spelling means the same, and whatever is wrong is said in one message."""

import copy
import random
from typing import Annotated, get_args

import pytest
import yaml
from annotated_types import Ge, Le
from helpers import temporary_losses
from pydantic import create_model

from axolotl_cvloss import available_losses, register_loss
from axolotl_cvloss.objective.config import MOST_PROBLEMS, ConfigError, CVLossConfig, TermConfig, allowed

LOSSES = available_losses()
NAMES = ", ".join(LOSSES)
MIX = [
    {"loss": "cross_entropy", "weight": 0.6, "scope": "completion", "label_smoothing": 0.0},
    {"loss": "lovasz", "weight": 0.4, "scope": "completion", "per": "document", "reduce": "local", "tolerance": 0.0},
]


def term(loss, **fields):
    """A term in full: the defaults of the key and of the loss, and what is given."""
    sets = {"per": "document", "reduce": "local"} if LOSSES[loss].per_set else {}
    defaults = {name: field.default for name, field in LOSSES[loss].parameters.model_fields.items()}
    return {"loss": loss, "weight": 1.0, "scope": "completion", **sets, **defaults, **fields}


# Spellings


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("lovasz", [term("lovasz")]),
        ("{cross_entropy: 0.6, lovasz: 0.4}", MIX),
        ("{cross_entropy: 0.6, lovasz: {weight: 0.4}}", MIX),
        (
            "{cross_entropy: 0.6, focal: {weight: 0.4, gamma: 3.0}}",
            [term("cross_entropy", weight=0.6), term("focal", weight=0.4, gamma=3.0)],
        ),
        ("{focal: {gamma: 3}}", [term("focal", gamma=3.0)]),
        ("{focal: {}}", [term("focal")]),
        ("terms: [lovasz]", [term("lovasz")]),
        ("terms: [{loss: cross_entropy, weight: 0.6}, {loss: lovasz, weight: 0.4}]", MIX),
        (
            "terms: [{loss: cross_entropy, scope: sequence}, {loss: lovasz, per: batch, tolerance: 0.1}]",
            [term("cross_entropy", scope="sequence"), term("lovasz", per="batch", tolerance=0.1)],
        ),
        (
            "terms: [{loss: focal, gamma: 1}, {loss: focal, gamma: 4}]",
            [term("focal", gamma=1.0), term("focal", gamma=4.0)],
        ),
        # PyYAML follows YAML 1.1, where a number without a point before its exponent is a text.
        ("{focal: 1e-5}", [term("focal", weight=1e-5)]),
        ("{generalized_dice: {smooth: 1e-6}}", [term("generalized_dice", smooth=1e-6)]),
        # A term with weight 0 is computed and logged, not trained.
        ("{cross_entropy: 1, lovasz: 0}", [term("cross_entropy"), term("lovasz", weight=0.0)]),
    ],
)
def test_spellings(text, terms):
    config = CVLossConfig.parse(yaml.safe_load(text))
    assert config.dump() == {"terms": terms, "head": "auto", "reference": False}


@pytest.mark.parametrize(
    "terms", ["{lovasz: 1, head: logits, reference: true}", "{terms: [lovasz], head: logits, reference: true}"]
)
def test_options_stand_beside_the_losses(terms):
    config = CVLossConfig.parse(yaml.safe_load(terms))
    assert config.dump() == {"terms": [term("lovasz")], "head": "logits", "reference": True}


def test_a_parsed_key_is_parsed_already():
    config = CVLossConfig.parse("lovasz")
    assert CVLossConfig.parse(config) is config


def test_the_given_key_is_left_as_it_was():
    given = {"terms": [{"loss": "focal", "gamma": "3"}], "head": "auto"}
    before = copy.deepcopy(given)
    CVLossConfig.parse(given).dump()["terms"].clear()
    assert given == before


# A seeded walk over valid keys


def valid_value(rng, field):
    """A value for a parameter, from its annotation and bounds."""
    if field.annotation is bool:
        return rng.random() < 0.5
    if choices := get_args(field.annotation):
        return rng.choice(choices)
    low, high = -3.0, 3.0
    for bound in field.metadata:
        low = max(low, getattr(bound, "ge", low), getattr(bound, "gt", low) + 1e-3)
        high = min(high, getattr(bound, "le", high), getattr(bound, "lt", high) - 1e-3)
    if field.annotation is int:
        return rng.randint(int(low) + 1, 9)
    assert field.annotation is float, "a new kind of parameter: give it a value here"
    return rng.choice([round(rng.uniform(low, high), 3), rng.uniform(low, high), high])


def valid_terms(rng):
    terms = []
    for name in rng.choices(list(LOSSES), k=rng.randint(1, 4)):
        given = {"loss": name, "weight": rng.choice([1.0, 0.4, 1e-5, 3, rng.uniform(0.01, 2)])}
        if rng.random() < 0.4:
            given["scope"] = rng.choice(["completion", "sequence"])
        if LOSSES[name].per_set and rng.random() < 0.4:
            given["per"] = rng.choice(["document", "batch"])
        for parameter, field in LOSSES[name].parameters.model_fields.items():
            if rng.random() < 0.5:
                given[parameter] = valid_value(rng, field)
        terms.append(given)
    return terms


def as_text(value):
    """Numbers as texts, as YAML hands some of them over."""
    if isinstance(value, dict):
        return {key: as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_text(item) for item in value]
    return repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def spellings(terms):
    """Everything that says the same as these terms."""
    yield {"terms": terms}
    yield {"terms": tuple(terms)}
    yield as_text({"terms": terms})
    yield yaml.safe_load(yaml.safe_dump({"terms": terms}))
    names = [given["loss"] for given in terms]
    if len(set(names)) == len(names):
        short = {}
        for given in terms:
            rest = {key: value for key, value in given.items() if key != "loss"}
            short[given["loss"]] = rest["weight"] if list(rest) == ["weight"] else rest
        yield short
        yield as_text(short)
        yield yaml.safe_load(yaml.safe_dump(short, sort_keys=False))
    if len(terms) == 1 and terms[0] == {"loss": names[0], "weight": 1.0}:
        yield names[0]
        yield {"terms": [names[0]]}


def test_valid_keys_mean_the_same_in_every_spelling():
    rng = random.Random(0)
    for _ in range(100):
        terms = valid_terms(rng)
        wanted = [term(**given) for given in terms]
        for spelling in spellings(terms):
            config = CVLossConfig.parse(spelling)
            assert config.dump()["terms"] == wanted, spelling
            assert CVLossConfig.parse(config.dump()) == config
            assert CVLossConfig.parse(yaml.safe_load(yaml.safe_dump(config.dump()))) == config


# What is wrong, and what is said


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lovazs", f"cv_loss: unknown loss 'lovazs'; did you mean lovasz? allowed: {NAMES}"),
        ({"Focal": 1}, f"cv_loss.Focal: unknown loss 'Focal'; did you mean focal? allowed: {NAMES}"),
        ({"haed": "auto", "focal": 1}, f"cv_loss.haed: unknown loss 'haed'; did you mean head? allowed: {NAMES}"),
        ({"term": ["focal"]}, f"cv_loss.term: unknown loss 'term'; did you mean terms? allowed: {NAMES}"),
        (
            {"terms": [{"loss": "fokal"}]},
            f"cv_loss.terms[0]: unknown loss 'fokal'; did you mean focal? allowed: {NAMES}",
        ),
        ({"terms": ["focal", {"weight": 1}]}, f"cv_loss.terms[1]: names no loss; allowed: {NAMES}"),
        ({}, f"cv_loss: names no loss; allowed: {NAMES}"),
        ({"head": "auto"}, f"cv_loss: names no loss; allowed: {NAMES}"),
        ({1: 0.5}, f"cv_loss.1: 1 is not the name of a loss; allowed: {NAMES}"),
        (
            None,
            "cv_loss: None is not a loss; give the name of a loss, a mapping of losses to weights, "
            "or a mapping with terms",
        ),
        (
            ["focal"],
            "cv_loss: ['focal'] is not a loss; a list of terms goes under cv_loss.terms; give the name of a loss, "
            "a mapping of losses to weights, or a mapping with terms",
        ),
        ({"terms": []}, "cv_loss.terms: is empty; give at least one term such as {loss: lovasz}"),
        (
            {"terms": {"focal": 1}},
            "cv_loss.terms: must be a list of terms such as {loss: lovasz, weight: 0.4}, not {'focal': 1}",
        ),
        ({"terms": [3]}, "cv_loss.terms[0]: must be a mapping such as {loss: lovasz, weight: 0.4}, not 3"),
        (
            {"terms": ["focal"], "hed": 1},
            "cv_loss.hed: unknown field; did you mean head? "
            "allowed: terms, head, example_weights, examples, prune, reference_logps, reference",
        ),
        (
            {"terms": ["focal"], 1: 1},
            "cv_loss.1: unknown field; "
            "allowed: terms, head, example_weights, examples, prune, reference_logps, reference",
        ),
        (
            {"terms": ["focal"], "lovasz": 1},
            "cv_loss.lovasz: unknown field; "
            "allowed: terms, head, example_weights, examples, prune, reference_logps, reference",
        ),
        ({"focal": {"loss": "lovasz"}}, "cv_loss.focal.loss: the loss is named by the key already; leave it out"),
        ({"focal": -1}, "cv_loss.focal.weight: must be a finite number >= 0, not -1"),
        ({"focal": "heavy"}, "cv_loss.focal.weight: must be a finite number >= 0, not 'heavy'"),
        ({"focal": float("nan")}, "cv_loss.focal.weight: must be a finite number >= 0, not nan"),
        ({"focal": "inf"}, "cv_loss.focal.weight: must be a finite number >= 0, not 'inf'"),
        ({"focal": True}, "cv_loss.focal.weight: must be a finite number >= 0, not True"),
        ({"focal": None}, "cv_loss.focal.weight: must be a finite number >= 0, not None"),
        ({"focal": 0}, "cv_loss: every weight is 0, so nothing would be trained; give one term a weight above 0"),
        (
            {"terms": ["lovasz", {"loss": "focal", "gamma": -1}]},
            "cv_loss.terms[1].gamma: must be a finite number >= 0, not -1",
        ),
        ({"focal": {"alpha": 0}}, "cv_loss.focal.alpha: must be a finite number > 0, not 0"),
        (
            {"cross_entropy": {"label_smoothing": 1.5}},
            "cv_loss.cross_entropy.label_smoothing: must be a finite number >= 0 and <= 1, not 1.5",
        ),
        (
            {"self_adjusting_dice": {"detach_weight": 2}},
            "cv_loss.self_adjusting_dice.detach_weight: must be true or false, not 2",
        ),
        (
            {"focal": {"gama": 3}},
            "cv_loss.focal.gama: unknown parameter of focal; did you mean gamma? "
            "allowed: gamma, alpha, weight, scope, goldfish, where",
        ),
        (
            {"focal": {"wieght": 3}},
            "cv_loss.focal.wieght: unknown parameter of focal; did you mean weight? "
            "allowed: gamma, alpha, weight, scope, goldfish, where",
        ),
        ({"focal": {"scope": "prompt"}}, "cv_loss.focal.scope: must be one of completion, sequence, not 'prompt'"),
        ({"lovasz": {"per": "row"}}, "cv_loss.lovasz.per: must be one of document, batch, not 'row'"),
        (
            {"focal": {"per": "batch"}},
            "cv_loss.focal.per: focal has one value a row, so it knows no sets; leave per out",
        ),
        ({"focal": 1, "head": "fussed"}, "cv_loss.head: must be one of auto, fused, logits, not 'fussed'"),
        ({"focal": 1, "reference": "yes"}, "cv_loss.reference: must be true, false or adapter_off, not 'yes'"),
        ({"focal": 1, "reference": 1}, "cv_loss.reference: must be true, false or adapter_off, not 1"),
        (
            {"focal": 1, "reference": True, "head": "fused"},
            "cv_loss.head: reference: true needs the logits; allowed with it: auto, logits",
        ),
        (
            {"lovasz": {"tolerance": 0.1}, "reference": True},
            "cv_loss.reference: lovasz of the paper's code has no tolerance; leave it out",
        ),
        (
            {"self_adjusting_dice": {"detach_weight": True}, "reference": True},
            "cv_loss.reference: self_adjusting_dice of the paper's code has no detach_weight; leave it out",
        ),
    ],
    ids=str,
)
def test_message(key, message):
    with pytest.raises(ConfigError) as error:
        CVLossConfig.parse(key)
    assert str(error.value) == message


def test_reference_of_a_loss_that_the_paper_does_not_have():
    with temporary_losses():
        register_loss("not_in_the_paper", family="token")(lambda logp: -logp)
        with pytest.raises(ConfigError) as error:
            CVLossConfig.parse({"not_in_the_paper": 1, "reference": True})
    there = ", ".join(name for name, loss in LOSSES.items() if loss.reference)
    assert str(error.value) == (
        f"cv_loss.reference: the paper's code has no not_in_the_paper; allowed with it: {there}"
    )


def test_all_problems_at_once():
    with pytest.raises(ConfigError) as error:
        CVLossConfig.parse(
            {
                "terms": [{"loss": "focl"}, {"loss": "focal", "gamma": -1, "alpa": 1, "weight": "x", "scope": 3}, 7],
                "head": "x",
                "reference": None,
                "teh": 1,
            }
        )
    wrong = [line.split(": ")[0].removeprefix("cv_loss.") for line in str(error.value).splitlines()]
    fields = ["weight", "scope", "gamma", "alpa"]
    assert sorted(wrong) == sorted(
        ["terms[0]", *(f"terms[1].{f}" for f in fields), "terms[2]", "head", "reference", "teh"]
    )


def test_very_many_problems_are_cut_short():
    with pytest.raises(ConfigError) as error:
        CVLossConfig.parse({"terms": [{"loss": "nope"}] * 1000})
    lines = str(error.value).splitlines()
    assert len(lines) == MOST_PROBLEMS + 1
    assert lines[-1] == f"cv_loss: {1000 - MOST_PROBLEMS} more problems"


# A seeded walk over malformed keys: valid terms, and one thing (or several) made wrong


def deep(levels=3000):
    value = []
    for _ in range(levels):
        value = [value]
    return value


NOT_A_NUMBER = [
    None, True, False, "high", "", "1,5", "0x", "nan", "inf", "-inf", [], [1.0], (), {}, {"weight": 1}, set(), 1j,
    float("nan"), float("inf"), float("-inf"), 10**400, -(10**400), 10**5000, b"\xff", object(), object, deep(),
    "9" * 99999,
]  # fmt: skip
NOT_A_BOOL = [None, 2, -1, 0.5, "maybe", "", [], {}, float("nan"), object(), deep(), "true " * 9999]
NOT_A_CHOICE = [
    None,
    True,
    0,
    1.5,
    "",
    "Sequence",
    "documents",
    "all",
    [],
    ["document"],
    {},
    object(),
    deep(),
    "x" * 99999,
]
NOT_A_NAME = ["", " ", "focal ", "FOCAL", "dice loss", "losses", "null", "cv_loss", "lovász", "a\nb", "-", "x" * 99999]
NOT_A_LOSS = [*NOT_A_NAME, 0, 1.5, True, ["focal"], {"focal": 1}, {"loss": "focal"}, b"focal", object(), deep()]
NOT_A_KEY = [None, True, 0, 1, 2.5, (), ("focal", 1), b"focal", 10**5000, frozenset(), object()]
NOT_A_MAPPING = [None, True, 0, 0.4, [], ["focal"], [["focal"]], (), {"focal"}, b"focal", object(), deep()]


def out_of_bounds(rng, field):
    step = rng.choice([1, 1e-3, 1e6]) if field.annotation is not int else 1
    bounds = [(k, getattr(m, k)) for m in field.metadata for k in ("ge", "gt", "le", "lt") if hasattr(m, k)]
    if not bounds:
        return rng.choice(NOT_A_BOOL if field.annotation is bool else NOT_A_NUMBER)
    kind, bound = rng.choice(bounds)
    return {"ge": bound - step, "gt": bound - rng.choice([0, step]), "le": bound + step, "lt": bound}[kind]


def malformed_field(rng, given):
    """Make one thing in a term wrong. Returns the name of the field that the message must give."""
    loss = LOSSES[given["loss"]]
    kind = rng.choice(["weight", "scope", "per", "parameter", "bounds", "unknown", "no string"])
    if kind == "weight":
        given["weight"] = rng.choice([*NOT_A_NUMBER, -1, -1e-9, "-0.5", -1e300])
        return "weight"
    if kind in ("scope", "per"):
        given[kind] = rng.choice(NOT_A_CHOICE)
        return kind
    parameters = loss.parameters.model_fields
    if kind in ("parameter", "bounds") and parameters:
        name, field = rng.choice(list(parameters.items()))
        wrong = NOT_A_BOOL if field.annotation is bool else NOT_A_NUMBER
        given[name] = out_of_bounds(rng, field) if kind == "bounds" else rng.choice(wrong)
        return name
    if kind == "no string":
        given[rng.choice(NOT_A_KEY)] = rng.choice([1.0, *NOT_A_NUMBER])
        return ""
    known = {*parameters, *TermConfig.model_fields} - {"parameters"}
    name = rng.choice([*sorted(known), "parameters", "gammma", "x" * 99999, "", "a b"])
    name = misspelt(rng, name) if name in known else name
    if name in known:
        name += "_"
    given[name] = rng.choice([1.0, 0.5, *NOT_A_NUMBER])
    return name if len(name) < 60 and name.isidentifier() else ""


def misspelt(rng, name):
    i = rng.randrange(len(name))
    wrong = rng.choice([name[:i] + name[i + 1 :], name[:i] + "x" + name[i:], name.upper(), name + "s", name + "_loss"])
    return wrong + "_" if wrong in LOSSES else wrong


def malformed_key(rng):
    """A malformed key, and the path that the message must name."""
    terms = valid_terms(rng)
    i = rng.randrange(len(terms))
    key = {"terms": terms}
    short = {t["loss"]: {k: v for k, v in t.items() if k != "loss"} for t in terms}
    kind = rng.choice(
        ["field", "field", "field", "several", "short", "short loss", "loss", "no loss", "whole", "terms", "term",
         "option", "extra", "nested", "no weight", "key", "reference", "text"]
    )  # fmt: skip
    if kind == "field":
        return key, f"cv_loss.terms[{i}].{malformed_field(rng, terms[i])}"
    if kind == "several":
        fields = [malformed_field(rng, t) for t in terms]
        return key, f"cv_loss.terms[{i}].{fields[i]}"
    if kind == "short":
        name = rng.choice(list(short))
        field = malformed_field(rng, whole := {"loss": name, **short[name]})
        return {**short, name: {k: v for k, v in whole.items() if k != "loss"}}, f"cv_loss.{name}.{field}"
    if kind == "short loss":
        name = misspelt(rng, rng.choice(list(short)))
        return {**short, name: rng.choice([1, {}, {"gamma": 2}, deep()])}, f"cv_loss.{name}: unknown loss"
    if kind == "loss":
        terms[i]["loss"] = rng.choice([*NOT_A_LOSS, misspelt(rng, terms[i]["loss"])])
        return key, f"cv_loss.terms[{i}]: unknown loss"
    if kind == "no loss":
        terms[i] = rng.choice([{}, {"weight": 1}, {"los": "focal"}, {"loss": None}, {"focal": 1}, {None: "focal"}])
        return key, f"cv_loss.terms[{i}]: names no loss"
    if kind == "whole":
        return rng.choice([*NOT_A_MAPPING, 1j, {}]), "cv_loss: "
    if kind == "terms":
        key["terms"] = rng.choice([*(x for x in NOT_A_MAPPING if x != ["focal"]), "focal", {}, {"loss": "focal"}, 1j])
        return key, "cv_loss.terms"
    if kind == "term":
        terms[i] = rng.choice([*NOT_A_MAPPING, 1j])
        return key, f"cv_loss.terms[{i}]: must be"
    if kind == "option":
        option = rng.choice(["head", "reference"])
        value = rng.choice(NOT_A_CHOICE if option == "head" else [*NOT_A_BOOL, 1, 0, "true", "false", "yes"])
        return {**rng.choice([key, short]), option: value}, f"cv_loss.{option}: must be"
    if kind == "extra":
        name = rng.choice([misspelt(rng, "head"), misspelt(rng, "reference"), "weight", "loss", *LOSSES])
        return {**key, name: rng.choice([1, "auto", deep(), {}])}, f"cv_loss.{name}: unknown field"
    if kind == "nested":
        key = rng.choice([{"cv_loss": key}, {"loss": key}, {"cv_loss": "focal"}, {"loss": "focal"}, {"losses": short}])
        return key, f"cv_loss.{next(iter(key))}: unknown loss"
    if kind == "no weight":
        return {"terms": [{**t, "weight": 0} for t in terms]}, "cv_loss: every weight is 0"
    if kind == "key":
        return {**rng.choice([key, short]), rng.choice(NOT_A_KEY): rng.choice([1, "focal", deep()])}, "cv_loss."
    if kind == "reference":
        return {**key, "reference": True, "head": "fused"}, "cv_loss.head: reference: true needs"
    return rng.choice([*NOT_A_NAME, misspelt(rng, rng.choice(list(LOSSES)))]), "cv_loss: unknown loss"


@pytest.mark.parametrize("loss", LOSSES)
def test_every_parameter_refuses_every_wrong_value(loss):
    for name, field in {**LOSSES[loss].parameters.model_fields, "weight": TermConfig.model_fields["weight"]}.items():
        wrong = NOT_A_BOOL if field.annotation is bool else NOT_A_NUMBER
        for value in [*wrong, *(out_of_bounds(random.Random(i), field) for i in range(10))]:
            with pytest.raises(ConfigError, match=rf"^cv_loss\.{loss}\.{name}: must be [^\n]+, not [^\n]+$"):
                CVLossConfig.parse({loss: {name: value}})


TELLS = ("allowed: ", "allowed with it: ", "must be ", "leave it out", "leave per out", "give ", " more problems")


def test_a_thousand_malformed_keys_give_a_thousand_clear_errors():
    rng = random.Random(0)
    for number in range(1000):
        key, path = malformed_key(rng)
        try:
            config = CVLossConfig.parse(key)
        except ConfigError as error:
            message = str(error)
        except Exception as error:
            pytest.fail(f"key {number}, {path}: {type(error).__name__} instead of a ConfigError")
        else:
            pytest.fail(f"key {number}, {path}: accepted as {config.dump()}")
        lines = message.splitlines()
        assert path in message, number
        assert all(line.startswith("cv_loss") for line in lines), number
        assert all(any(tell in line for tell in TELLS) for line in lines), (number, message)
        assert len(lines) <= MOST_PROBLEMS + 1, number
        assert max(map(len, lines)) < 350 + len(NAMES), (number, message)


def test_bounds_are_written_in_one_way_whoever_made_the_annotation_first():
    """typing keeps one object for equal annotations, so that 0 may come back as 0.0."""
    fields = {"near": (Annotated[float, Ge(0.0), Le(2.5)], 1.0)}
    assert allowed(create_model("Bounds", **fields), "near") == "a finite number >= 0 and <= 2.5"
