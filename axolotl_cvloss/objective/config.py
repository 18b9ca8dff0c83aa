"""The ``cv_loss`` key: its models, its spellings, and messages that say what was wrong and what is allowed."""

import importlib.util
import inspect
import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError
from pydantic.fields import FieldInfo

from ..losses.registry import Loss, available_losses, nearest

KEY = "cv_loss"
NEEDS_LOGITS = "needs all logits of a batch at once, which takes more memory than fused losses do"
ADAPTER_OFF = "adapter_off"
NO_REFERENCE = (
    "it needs log p of each token under a reference model; cvloss reference CONFIG.yaml --out DIR makes it a column, "
    "reference_logps: COLUMN names that; with LoRA, reference: adapter_off takes it from the model without its adapters"
)
SET_FIELDS = ("per", "reduce")  # of a term, where its loss has one value a set
MOST_PROBLEMS = 10  # that one message lists


class ConfigError(ValueError):
    """The ``cv_loss`` key is wrong; the message lists every problem."""


class Schedule(BaseModel):
    """A number that changes over training."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, populate_by_name=True)

    start: float = Field(alias="from", description="The value at the beginning.")
    to: float = Field(description="The value it comes to, and keeps.")
    over: float = Field(1.0, gt=0, le=1, description="The fraction of training after which it is there.")
    shape: Literal["linear", "cosine"] = "linear"

    def __str__(self) -> str:
        return f"({self.start:g} to {self.to:g})"

    def at(self, progress: float) -> float:
        """The value after a fraction of training."""
        way = min(1.0, progress / self.over)
        if self.shape == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return self.start + (self.to - self.start) * way


class GoldfishConfig(BaseModel):
    """Rows that a term leaves out; see ``rows.Goldfish``."""

    model_config = ConfigDict(extra="forbid")

    k: int = Field(4, ge=2, le=10**9, description="One token in k is left out.")
    h: int = Field(13, ge=1, le=10**6, description="The number of tokens before it that decide whether one is.")


class PruneConfig(BaseModel):
    """Examples that epochs leave out; see ``hosts/pruning.py``."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    share: float = Field(0.5, gt=0, lt=1, description="The share of them that an epoch leaves out.")
    until: float = Field(0.875, gt=0, le=1, description="The fraction of the epochs after which none is left out.")


class TermConfig(BaseModel):
    """One weighted loss. The parameters of the loss stand beside these fields in the YAML."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    loss: str = Field(description="Name of a loss; `available_losses()` lists them.")
    weight: float = Field(1.0, ge=0, description="What the value is multiplied by in the sum.")
    scope: Literal["completion", "sequence"] = Field(
        "completion", description="Rows: those with a label, or every token that is not padding, the prompt too."
    )
    per: Literal["document", "batch"] = Field(
        "document", description="What one set is for a set-level loss: a document, or the micro-batch."
    )
    reduce: Literal["local", "global"] = Field(
        "local", description="With per: batch, whether a set is the micro-batch of one process, or of all together."
    )
    goldfish: GoldfishConfig | None = Field(
        None, description="Leave one token in k out, always the same after the same text: true, or {k: 4, h: 13}."
    )
    where: str | None = Field(
        None, min_length=1, description="A column of the dataset, 0 or 1 an example or a token: this term acts at 1."
    )
    parameters: dict[str, Any] = Field(default_factory=dict, exclude=True)
    schedules: dict[str, Schedule] = Field(default_factory=dict, exclude=True)

    def dump(self) -> dict[str, Any]:
        """The long form, every value spelt out."""
        fields = self.model_dump(exclude_none=True)
        if not available_losses()[self.loss].per_set:
            fields = {name: value for name, value in fields.items() if name not in SET_FIELDS}
        schedules = {name: schedule.model_dump(by_alias=True) for name, schedule in self.schedules.items()}
        return {**fields, **self.parameters, **schedules}


# What may stand in the YAML beside the parameters of the loss.
TERM_FIELDS = tuple(name for name, field in TermConfig.model_fields.items() if not field.exclude)


class ReweightConfig(BaseModel):
    """Weights of documents by their losses; see ``examples.reweighted``."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    by: Literal["linear", "quadratic", "extremes"] = Field(
        "linear", description="Less weight where the loss is low, where it is far from the middle, or where it is near."
    )
    r: float = Field(0.4, gt=0, description="How near to equal the weights are: for r above 0, larger is nearer.")
    warmup: float = Field(0.1, ge=0, lt=1, description="The fraction of training in which all weights are 1.")

    def __str__(self) -> str:
        return f"{self.by}, r {self.r:g}, after {self.warmup:.0%} of training"


class CVaRConfig(BaseModel):
    """The documents with the largest losses alone; see ``examples.worst``."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    share: float = Field(0.5, gt=0, le=1, description="The share of the documents that counts.")
    reg: float = Field(0.0, ge=0, description="0: no others count; above: a smooth passage, so many nats wide.")

    def __str__(self) -> str:
        return f"the worst {self.share:g}{f', reg {self.reg:g}' if self.reg else ''}"


class ExamplesConfig(BaseModel):
    """How the documents of a step are weighed against each other, for all terms."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    normalize: Literal["tokens", "examples", "square_root"] = Field(
        "tokens",
        description="What a document with n rows counts by: n, 1, or the square root of n; with reweight or cvar 1 is "
        "the default.",
    )
    reweight: ReweightConfig | None = Field(
        None, description="Weights by the losses of the documents: true, linear, or {by: linear, r: 0.4, warmup: 0.1}."
    )
    cvar: CVaRConfig | None = Field(
        None, description="The documents with the largest losses alone: true, 0.5, or {share: 0.5, reg: 0.0}."
    )
    look: Literal["step", "batch"] | None = Field(
        None,
        description="With reweight or cvar: whose losses are compared, those of the whole step (the default), which "
        "takes a forward pass more where it has several micro-batches, or of each micro-batch.",
    )

    def weighs(self, progress: float) -> bool:
        """Whether losses of documents are asked for after a fraction of training."""
        return self.cvar is not None or (self.reweight is not None and progress >= self.reweight.warmup)

    def __str__(self) -> str:
        fields = ((name, getattr(self, name)) for name in type(self).model_fields)
        return ", ".join(f"{name}: {value}" for name, value in fields if value is not None)


class CVLossConfig(BaseModel):
    """The whole key in its long form."""

    model_config = ConfigDict(extra="forbid")

    terms: list[TermConfig] = Field(min_length=1, description="Weighted losses; the same loss may come twice.")
    head: Literal["auto", "fused", "logits"] = Field(
        "auto", description="fused: logits are never kept; logits: computed from the model's logits; auto: chosen."
    )
    example_weights: str | None = Field(
        None, min_length=1, description="A column of the dataset with a weight for each example, or for each token."
    )
    examples: ExamplesConfig | None = Field(
        None, description="How the documents of a step are weighed, such as {normalize: examples}."
    )
    prune: PruneConfig | None = Field(
        None,
        description="Leave out, in each epoch, a share of the examples whose loss is below the mean: true, or "
        "{share: 0.5, until: 0.875}.",
    )
    reference_logps: str | None = Field(
        None,
        min_length=1,
        description="A column of the dataset with log p of each token under a reference model, as cvloss reference "
        "makes it.",
    )
    reference: StrictBool | Literal["adapter_off"] = Field(
        False,
        description="true: the paper's code, its slips included, to replicate its experiments; adapter_off: the "
        "reference model of losses that need one is the model without its adapters.",
    )

    @classmethod
    def parse(cls, value: Any) -> "CVLossConfig":
        """The key in any of its spellings.

        ``lovasz``; ``{cross_entropy: 0.6, lovasz: 0.4}``; ``{focal: {weight: 0.4, gamma: 3.0}}``; or the long form
        ``{terms: [{loss: focal, weight: 0.4, gamma: 3.0}], head: auto, reference: false}``.

        Raises:
            ConfigError: With one line for each problem, naming the key, what was wrong and what is allowed.
        """
        if isinstance(value, cls):
            return value
        problems: list[str] = []
        fields = _fields(value, problems)
        if "prune" in fields:
            fields["prune"] = _switch(PruneConfig, fields["prune"], f"{KEY}.prune", problems)
        terms = [_term(term, where, problems) for where, term in fields.pop("terms")]
        if "examples" in fields:
            fields["examples"] = _examples(fields["examples"], problems)
        config = _validate(cls, {"terms": [], **fields}, KEY, problems, skip="terms")
        if not terms and not problems:
            problems.append(f"{KEY}: names no loss; allowed: {', '.join(available_losses())}")
        if not problems:
            assert config is not None
            config.terms = [term for term in terms if term is not None]
            _check_whole(config, problems)
        if problems:
            more = len(problems) - MOST_PROBLEMS
            raise ConfigError("\n".join(problems[:MOST_PROBLEMS] + [f"{KEY}: {more} more problems"] * (more > 0)))
        assert config is not None
        return config

    @property
    def papers_code(self) -> bool:
        return self.reference is True

    @property
    def adapter_off(self) -> bool:
        """Whether the reference of losses that need one is the model without its adapters."""
        return self.reference == ADAPTER_OFF

    @property
    def with_reference(self) -> list[str]:
        """The losses that need log p under a reference model."""
        return [term.loss for term in self.terms if available_losses()[term.loss].needs_reference]

    def without_reference(self) -> list[str]:
        """What is wrong in a host where a loss needs a reference model and the key does not say where that is."""
        given = self.adapter_off or self.reference_logps is not None
        return [] if given else [f"{KEY}.{name}: {NO_REFERENCE}" for name in self.with_reference]

    @property
    def needs_logits(self) -> bool:
        """Whether some term cannot do without the logits of all rows. ``NEEDS_LOGITS`` says so to users."""
        return self.papers_code or any(available_losses()[term.loss].kind.on_logits for term in self.terms)

    @property
    def given_by(self) -> dict[str, str]:
        """Inputs of an objective that columns of the dataset give, and the names of these columns."""
        named = {"example_weights": self.example_weights, "reference_logps": self.reference_logps}
        return {keyword: name for keyword, name in named.items() if name is not None}

    @property
    def columns(self) -> dict[str, str]:
        """The columns of the dataset that a batch must have, and for each the key that names it."""
        named = {name: f"{KEY}.{keyword}" for keyword, name in self.given_by.items()}
        acting = {term.where: f"{KEY}.{term.loss}.where" for term in self.terms if term.where is not None}
        return {**acting, **named}

    def dump(self) -> dict[str, Any]:
        """The long form as plain data; ``parse`` reads it back."""
        more = self.model_dump(include={"examples", "prune"}, exclude_none=True)
        terms = [term.dump() for term in self.terms]
        return {"terms": terms, "head": self.head, **self.given_by, **more, "reference": self.reference}


def _fields(value: Any, problems: list[str]) -> dict[str, Any]:
    """The fields of the long form; terms as pairs of where they stand and what stands there."""
    if isinstance(value, str):
        return {"terms": [(KEY, {"loss": value})]}
    if not isinstance(value, Mapping):
        hint = "a list of terms goes under cv_loss.terms; " if isinstance(value, list | tuple) else ""
        problems.append(
            f"{KEY}: {_show(value)} is not a loss; {hint}give the name of a loss, a mapping of losses to weights, "
            f"or a mapping with terms"
        )
        return {"terms": []}
    value = dict(value)
    if "terms" in value:
        terms = value.pop("terms")
        if not isinstance(terms, list | tuple):
            problems.append(
                f"{KEY}.terms: must be a list of terms such as {{loss: lovasz, weight: 0.4}}, not {_show(terms)}"
            )
            terms = []
        elif not terms:
            problems.append(f"{KEY}.terms: is empty; give at least one term such as {{loss: lovasz}}")
        fields = {_word(name): given for name, given in value.items()}
        return {"terms": [(f"{KEY}.terms[{i}]", term) for i, term in enumerate(terms)], **fields}
    options = {name: value.pop(name) for name in CVLossConfig.model_fields if name in value}
    terms = []
    for name, given in value.items():
        where = f"{KEY}.{_word(name)}"
        if not isinstance(name, str):
            problems.append(
                f"{where}: {_show(name)} is not the name of a loss; allowed: {', '.join(available_losses())}"
            )
        elif isinstance(given, Mapping):
            if "loss" in given:
                problems.append(f"{where}.loss: the loss is named by the key already; leave it out")
            terms.append((where, {**given, "loss": name}))
        else:
            terms.append((where, {"loss": name, "weight": given}))
    return {"terms": terms, **options}


def _term(given: Any, where: str, problems: list[str]) -> TermConfig | None:
    if isinstance(given, str):
        given = {"loss": given}
    if not isinstance(given, Mapping):
        problems.append(f"{where}: must be a mapping such as {{loss: lovasz, weight: 0.4}}, not {_show(given)}")
        return None
    losses = available_losses()
    name = given.get("loss")
    if not isinstance(name, str) or name not in losses:
        what = "names no loss" if name is None else f"unknown loss {_show(name)}"
        also = [field for field in CVLossConfig.model_fields if where == f"{KEY}.{_word(name)}"]
        hint = "" if name is None else nearest(_word(name), [*losses, *also])
        problems.append(f"{where}: {what}; {hint}allowed: {', '.join(losses)}")
        return None
    loss = losses[name]
    if loss.requires and importlib.util.find_spec(loss.requires) is None:
        problems.append(
            f"{where}: {name} needs the package {loss.requires}, which is not installed; pip install {loss.requires}"
        )
        return None
    given = {_word(key): value for key, value in given.items()}
    numbers = {"weight", *(n for n, field in loss.parameters.model_fields.items() if field.annotation is float)}
    scheduled = {key for key, value in given.items() if key in numbers and _is_schedule(value)}
    schedules = {key: _validate(Schedule, given[key], f"{where}.{key}", problems) for key in scheduled}
    if None in schedules.values():
        return None
    # Both ends of a schedule must be allowed.
    given = {**given, **{key: schedule.start for key, schedule in schedules.items()}}
    last = {**given, **{key: schedule.to for key, schedule in schedules.items()}}
    first = _term_of(loss, given, where, problems)
    if first is None or (schedules and _term_of(loss, last, where, problems) is None):
        return None
    first.schedules = schedules
    return first


def _switch(model: type[BaseModel], given: Any, where: str, problems: list[str]) -> Any:
    """What is off, on with its defaults, or on with a mapping of its fields."""
    if given is None or given is False:
        return None
    if given is True:
        given = {}
    if not isinstance(given, Mapping):
        such = ", ".join(f"{name}: {field.default}" for name, field in model.model_fields.items())
        problems.append(f"{where}: must be true, false, or a mapping such as {{{such}}}, not {_show(given)}")
        return None
    return _validate(model, {_word(key): value for key, value in given.items()}, where, problems)


def _examples(given: Any, problems: list[str]) -> ExamplesConfig | None:
    where = f"{KEY}.examples"
    if given is None:
        return None
    if not isinstance(given, Mapping) or not given:
        problems.append(f"{where}: must be a mapping such as {{normalize: examples}}, not {_show(given)}")
        return None
    count = len(problems)
    given = {_word(key): value for key, value in given.items()}
    by, share = given.get("reweight"), given.get("cvar")
    if isinstance(by, str):
        given["reweight"] = {"by": by}
    if isinstance(share, int | float) and not isinstance(share, bool):
        given["cvar"] = {"share": share}
    for name, model in (("reweight", ReweightConfig), ("cvar", CVaRConfig)):
        if name in given:
            given[name] = _switch(model, given[name], f"{where}.{name}", problems)
    wanted = [name for name in ("reweight", "cvar") if given.get(name) is not None]
    if len(wanted) == 2:
        problems.append(f"{where}: reweight and cvar are two weights of the same documents; leave one out")
    if wanted:
        given = {"normalize": "examples", "look": "step", **{k: v for k, v in given.items() if v is not None}}
    elif given.get("look") is not None:
        problems.append(f"{where}.look: there is nothing to look at without reweight or cvar; leave it out")
    return None if len(problems) > count else _validate(ExamplesConfig, given, where, problems)


def _is_schedule(value: Any) -> bool:
    return isinstance(value, Mapping) and ("from" in value or "to" in value)


def _term_of(loss: Loss, given: Mapping[str, Any], where: str, problems: list[str]) -> TermConfig | None:
    before = len(problems)
    own = {field: given[field] for field in TERM_FIELDS if field in given}
    rest = {key: value for key, value in given.items() if key not in own}
    if "goldfish" in own:
        own["goldfish"] = _switch(GoldfishConfig, own["goldfish"], f"{where}.goldfish", problems)
    term = _validate(TermConfig, own, where, problems)
    parameters = _validate(loss.parameters, rest, where, problems, owner=loss)
    for field in SET_FIELDS:
        if field in own and not loss.per_set:
            problems.append(f"{where}.{field}: {loss.name} has one value a row, so it knows no sets; leave {field} out")
    if term is None or parameters is None or len(problems) > before:
        return None
    if loss.per_set and term.reduce == "global" and term.per != "batch":
        problems.append(f"{where}.reduce: global joins the batches of all processes; it needs per: batch")
        return None
    term.parameters = parameters.model_dump()
    return term


def _validate(
    model: type[BaseModel],
    fields: dict[str, Any],
    where: str,
    problems: list[str],
    skip: str = "",
    owner: Loss | None = None,
) -> Any:
    """An instance of the model, or None after adding to the problems."""
    count = len(problems)
    for name, value in fields.items():
        if isinstance(value, bool) and (field := _field(model, name)) is not None and not _may_be_bool(field):
            problems.append(f"{where}.{name}: must be {allowed(model, name)}, not {_show(value)}")
    try:
        instance = model.model_validate(fields)
    except ValidationError as error:
        for problem in error.errors():
            name = str(problem["loc"][0])
            if name == skip:
                continue
            if problem["type"] == "extra_forbidden":
                known = [field.alias or n for n, field in model.model_fields.items() if not field.exclude]
                if owner is not None:
                    known += [n for n in TERM_FIELDS if n != "loss" and (owner.per_set or n not in SET_FIELDS)]
                whose = f"parameter of {owner.name}" if owner else "field"
                message = f"unknown {whose}; {nearest(name, known)}allowed: {', '.join(known)}"
            elif problem["type"] == "missing":
                message = f"is missing; give {allowed(model, name)}"
            else:
                message = f"must be {allowed(model, name)}, not {_show(problem['input'])}"
            if not any(p.startswith(f"{where}.{name}: ") for p in problems[count:]):
                problems.append(f"{where}.{name}: {message}")
        if len(problems) > count:
            return None
        fields = {k: v for k, v in fields.items() if k != skip}
        instance = model.model_construct(**{skip: [], **fields})
    return None if len(problems) > count else instance


def _field(model: type[BaseModel], name: str) -> FieldInfo | None:
    """A field by its name in the YAML."""
    return next((field for n, field in model.model_fields.items() if name == (field.alias or n)), None)


def _may_be_bool(field: FieldInfo) -> bool:
    return field.annotation is bool or StrictBool in get_args(field.annotation)


def allowed(model: type[BaseModel], name: str) -> str:
    """What a field takes, in words, from its annotation and bounds."""
    field = _field(model, name)
    assert field is not None
    annotation: Any = field.annotation
    choices = getattr(annotation, "__args__", ())
    if StrictBool in choices:
        others = [word for choice in choices if choice is not StrictBool for word in get_args(choice)]
        return f"true, false or {', '.join(others)}"
    if type(None) in choices and len(choices) == 2:
        (annotation,) = (choice for choice in choices if choice is not type(None))
        choices = getattr(annotation, "__args__", ())
    if choices and all(isinstance(choice, str) for choice in choices):
        return f"one of {', '.join(choices)}"
    words = {float: "a finite number", int: "a whole number", bool: "true or false", str: "a text"}
    text = words.get(annotation, str(annotation))
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    # Not 0.0 for 0: typing hands out one Annotated[float, Ge(0)] for both, the one that any library made first.
    bounds = [f"{signs[k]} {_short(getattr(m, k))}" for m in field.metadata for k in signs if hasattr(m, k)]
    return " ".join([text, " and ".join(bounds)]).strip()


def _short(bound: float) -> float:
    return int(bound) if bound == int(bound) else bound


def _check_whole(config: CVLossConfig, problems: list[str]) -> None:
    if not any(term.weight or "weight" in term.schedules for term in config.terms):
        problems.append(f"{KEY}: every weight is 0, so nothing would be trained; give one term a weight above 0")
    for term in config.terms:
        of_many = available_losses()[term.loss].per_set and term.per != "document"
        if of_many and config.examples is not None and config.examples.look:
            problems.append(
                f"{KEY}.examples: reweight and cvar weigh documents, and a set of {term.loss} has many of them; "
                "allowed with it: per: document"
            )
        if available_losses()[term.loss].kind.on_logits:
            if config.head == "fused":
                problems.append(f"{KEY}.head: {term.loss} is written on full logits; allowed with it: auto, logits")
            if term.reduce == "global":
                problems.append(f"{KEY}.reduce: {term.loss} is written on full logits; allowed with it: local")
    if config.adapter_off and config.reference_logps is not None:
        problems.append(
            f"{KEY}.reference: adapter_off is another reference than reference_logps; leave one of them out"
        )
    if config.papers_code:
        for term in config.terms:
            loss = available_losses()[term.loss]
            if loss.reference is None:
                there = ", ".join(name for name, loss in available_losses().items() if loss.reference)
                problems.append(f"{KEY}.reference: the paper's code has no {term.loss}; allowed with it: {there}")
                continue
            if term.goldfish is not None:
                problems.append(f"{KEY}.reference: the paper's code knows no goldfish; leave it out of {term.loss}")
            if term.where is not None:
                problems.append(f"{KEY}.reference: the paper's code knows no where; leave it out of {term.loss}")
            if loss.per_set and term.per != "document":
                problems.append(f"{KEY}.reference: the paper's code has sets of its own; leave per out of {term.loss}")
            known = inspect.signature(loss.reference).parameters
            for name, value in term.parameters.items():
                if name not in known and value != loss.parameters.model_fields[name].default:
                    problems.append(f"{KEY}.reference: {term.loss} of the paper's code has no {name}; leave it out")
        if config.example_weights is not None:
            problems.append(f"{KEY}.reference: the paper's code knows no example_weights; leave them out")
        if config.examples is not None:
            problems.append(f"{KEY}.reference: the paper's code weighs all rows alike; leave examples out")
        if config.prune is not None:
            problems.append(f"{KEY}.reference: the paper's code knows no prune; leave it out")
        if config.head == "fused":
            problems.append(f"{KEY}.head: reference: true needs the logits; allowed with it: auto, logits")


_brief = reprlib.Repr()
_brief.maxlevel, _brief.maxstring, _brief.maxother = 3, 60, 60


def _show(value: Any) -> str:
    """Any value in a few words on one line, however long, deep or strange it is."""
    try:
        text = " ".join(_brief.repr(value).split())
    except Exception:  # such as a whole number of more digits than Python prints
        text = f"this {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _word(name: Any) -> str:
    """A key as it stands in a path."""
    return name if isinstance(name, str) and re.fullmatch(r"[\w-]{1,60}", name) else _show(name)
