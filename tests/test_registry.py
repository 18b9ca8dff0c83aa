"""Losses by name: the decorator, the hook, and what is refused."""

import sys
import textwrap
from typing import Annotated, Literal

import pluggy
import pytest
import torch
from annotated_types import Ge, Le
from pydantic import Field

from axolotl_cvloss import Objective, available_losses, hookimpl, register_loss
from axolotl_cvloss.engine.families import FAMILIES
from axolotl_cvloss.losses import registry
from axolotl_cvloss.losses.registry import get_loss, plugin_manager
from axolotl_cvloss.objective.config import ConfigError, CVLossConfig

N, VOCAB = 9, 5


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    """Each test has the registry of a process that has not looked at a loss yet."""
    monkeypatch.setattr(registry, "_manager", None)
    monkeypatch.setattr(registry, "_losses", {})


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, VOCAB, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, VOCAB - 1, (N,), generator=generator)


def value(key, batch):
    return Objective.from_config(key).from_logits(*batch, shift=False).loss


# The decorator, one loss of each family


def test_the_token_example_of_the_docs(batch):
    @register_loss("my_focal", family="token")
    def my_focal(logp, gamma: float = 2.0):
        return -((1 - logp.exp()) ** gamma) * logp

    torch.testing.assert_close(value("my_focal", batch), value("focal", batch))
    torch.testing.assert_close(value({"my_focal": {"gamma": 0.5}}, batch), value({"focal": {"gamma": 0.5}}, batch))
    assert my_focal(torch.zeros(1)) == 0  # it stays an ordinary function


def test_the_region_example_of_the_docs(batch):
    @register_loss("my_dice", family="region")
    def my_dice(intersection, predicted, labelled, smooth: float = 1.0):
        return 1 - (2 * intersection + smooth) / (predicted + labelled + smooth)

    logits, labels = batch
    p, wanted = logits.softmax(1), []
    for c in labels.unique():
        overlap = p[labels == c, c].sum()
        wanted.append(1 - (2 * overlap + 1) / (p[:, c].sum() + (labels == c).sum() + 1))
    torch.testing.assert_close(value("my_dice", batch), torch.stack(wanted).mean())


def test_a_region_loss_may_give_one_value_a_set(batch):
    @register_loss("missed", family="region")
    def missed(intersection, labelled):  # it asks for the statistics it needs, no more
        return 1 - intersection.sum() / labelled.sum()

    logits, labels = batch
    p = logits.softmax(1).gather(1, labels[:, None])
    torch.testing.assert_close(value("missed", batch), 1 - p.mean())


def test_a_row_loss(batch):
    @register_loss("margin", family="row")
    def margin(logits, labels, at: float = 1.0):
        own = logits.gather(1, labels[:, None])
        return (at + logits - own).clamp_min(0).sum(1)

    logits, labels = batch
    own = logits.gather(1, labels[:, None])
    wanted = (0.5 + logits - own).clamp_min(0).sum(1).mean()
    torch.testing.assert_close(value({"margin": {"at": 0.5}}, batch), wanted)


def test_a_document_loss(batch):
    @register_loss("perplexity", family="document")
    def perplexity(logp):
        return (-logp.mean()).exp()

    torch.testing.assert_close(value("perplexity", batch), value("cross_entropy", batch).exp())


def test_a_ranking_loss(batch):
    @register_loss("largest_error", family="ranking")
    def largest_error(errors, segment, labelled):
        first = torch.searchsorted(segment, torch.arange(len(labelled)))
        return errors[first]

    logits, labels = batch
    p = logits.softmax(1)
    own = torch.nn.functional.one_hot(labels, VOCAB)
    wanted = (own - p).abs()[:, labels.unique()].amax(0).mean()
    torch.testing.assert_close(value("largest_error", batch), wanted)


def test_statistics_beside_log_p(batch):
    @register_loss("log_z", family="token")
    def log_z(logp, lse):
        return lse**2 + 0 * logp

    torch.testing.assert_close(value("log_z", batch), (batch[0].logsumexp(1) ** 2).mean())


def test_a_statistic_needed_only_for_a_parameter(batch):
    given = []

    @register_loss("centred", family="token", only_if={"mean_logit": "share"})
    def centred(logp, mean_logit, share: float = 0.0):
        given.append(mean_logit)
        return -logp if mean_logit is None else -logp - share * mean_logit

    torch.testing.assert_close(value("centred", batch), value("cross_entropy", batch))
    assert given == [None]
    wanted = value("cross_entropy", batch) - 0.5 * batch[0].mean()
    torch.testing.assert_close(value({"centred": {"share": 0.5}}, batch), wanted)


# Parameters


def test_parameters_come_from_the_signature():
    @register_loss("many", family="token")
    def many(
        logp,
        plain=1.5,
        count: int = 3,
        part: Annotated[float, Ge(0), Le(1)] = 0.5,
        above: Annotated[float, Field(gt=1)] = 2,
        kind: Literal["hard", "soft"] = "hard",
        flag: bool = False,
    ):
        return -logp

    def parsed(**parameters):
        dump = CVLossConfig.parse({"many": parameters}).dump()["terms"][0]
        return {k: v for k, v in dump.items() if k not in ("loss", "weight", "scope")}

    defaults = {"plain": 1.5, "count": 3, "part": 0.5, "above": 2.0, "kind": "hard", "flag": False}
    assert parsed() == defaults
    given = {"plain": 2.0, "count": 4, "part": 1.0, "above": 1.1, "kind": "soft", "flag": True}
    assert parsed(**given) == given

    for parameter, wrong, allowed in [
        ("plain", "x", "a finite number"),
        ("count", 1.5, "a whole number"),
        ("count", True, "a whole number"),
        ("part", 1.1, "a finite number >= 0 and <= 1"),
        ("above", 1, "a finite number > 1"),
        ("kind", "medium", "one of hard, soft"),
        ("flag", "maybe", "true or false"),
    ]:
        with pytest.raises(ConfigError) as error:
            parsed(**{parameter: wrong})
        assert str(error.value) == f"cv_loss.many.{parameter}: must be {allowed}, not {wrong!r}"


def test_annotations_may_be_texts():
    namespace = {"register_loss": register_loss}
    source = """
    from __future__ import annotations
    from typing import Annotated
    from annotated_types import Ge
    @register_loss("late", family="token")
    def late(logp: Tensor, gamma: Annotated[float, Ge(0)] = 2.0) -> Tensor:
        return -logp
    """
    namespace["Tensor"] = torch.Tensor
    exec(textwrap.dedent(source), namespace)
    with pytest.raises(ConfigError, match=r"cv_loss.late.gamma: must be a finite number >= 0, not -1"):
        CVLossConfig.parse({"late": {"gamma": -1}})


# What is said about a loss


def test_descriptions_of_the_built_in_losses_are_complete():
    for name, loss in available_losses().items():
        assert loss.name == name
        assert loss.family in FAMILIES
        assert loss.formula, f"{name}: no line 'Formula:' in its docstring"
        assert loss.source, f"{name}: no line 'Source:' in its docstring"
        assert loss.summary.endswith("."), f"{name}: the docstring does not start with a sentence"
        assert loss.per_set == (loss.family in ("region", "ranking", "document"))
        assert set(loss.statistics) <= set(FAMILIES[loss.family].statistics)
        assert "\n" not in loss.formula + loss.source


def test_description_of_a_strangers_loss():
    @register_loss("mine", family="token")
    def mine(logp):
        """One line that says what it is for.

        A paragraph.

        Formula: -log p, which goes on
            in a second line
        Source: Somebody 2020, A paper: with a colon
        """
        return -logp

    loss = available_losses()["mine"]
    assert loss.summary == "One line that says what it is for."
    assert loss.formula == "-log p, which goes on in a second line"
    assert loss.source == "Somebody 2020, A paper: with a colon"
    assert loss.function is mine
    assert get_loss("mine") is loss


def test_available_losses_is_a_copy_in_order():
    losses = available_losses()
    assert list(losses) == sorted(losses)
    losses.clear()
    assert "lovasz" in available_losses()


def test_get_loss_of_an_unknown_name():
    with pytest.raises(KeyError, match="did you mean focal"):
        get_loss("fokal")


# What is refused


@pytest.mark.parametrize(
    "name", ["Focal", "my-loss", "my loss", "2focal", "_x", "", "löss", 3, None, "terms", "weight", "per"]
)
def test_malformed_names(name):
    with pytest.raises(ValueError, match="cannot name a loss"):
        register_loss(name, family="token")(lambda logp: -logp)


def test_a_taken_name():
    register_loss("mine", family="token")(lambda logp: -logp)
    with pytest.raises(ValueError, match=rf"'mine' is registered already, by {__name__}"):
        register_loss("mine", family="region")(lambda intersection: intersection)


def test_the_name_of_a_built_in_loss_is_taken_from_the_start():
    # In a script this may well be the first line that touches the package.
    with pytest.raises(ValueError, match=r"'focal' is registered already, by axolotl_cvloss\.losses\.token"):
        register_loss("focal", family="token")(lambda logp: -logp)
    assert get_loss("focal").function.__module__ == "axolotl_cvloss.losses.token"


def test_an_unknown_family():
    with pytest.raises(
        ValueError, match="unknown family 'pixel'; allowed: token, row, number, region, ranking, document, dense"
    ):
        register_loss("mine", family="pixel")(lambda logp: -logp)


@pytest.mark.parametrize(
    ("family", "function"),
    [
        ("token", lambda p: p),
        ("token", lambda logp, gamma: logp),  # a parameter without a default
        ("token", lambda logits, labels: logits),  # statistics of another family
        ("token", lambda: 1),
        ("token", lambda gamma=1.0: gamma),
        ("region", lambda intersection, union: intersection),
    ],
)
def test_arguments_that_are_no_statistics(family, function):
    with pytest.raises(ValueError, match=rf"must be statistics of the family '{family}'"):
        register_loss("mine", family=family)(function)


@pytest.mark.parametrize(
    "function", [lambda logp, weight=1.0: logp, lambda logp, per=1: logp, lambda logp, lse=None: logp]
)
def test_parameters_with_a_name_of_the_key_or_of_a_statistic(function):
    with pytest.raises(ValueError, match="cannot be the name of a parameter"):
        register_loss("mine", family="token")(function)


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (lambda *logp: 1, r"\*logp"),
        (lambda logp, *more: 1, r"\*more"),
        (lambda logp, **more: 1, r"\*\*more"),
        (lambda logp, /: 1, "logp"),
    ],
)
def test_arguments_that_cannot_be_given_by_name(function, argument):
    with pytest.raises(ValueError, match=rf"loss 'mine': {argument} cannot be given by its name"):
        register_loss("mine", family="token")(function)


@pytest.mark.parametrize("default", [2, None, (1.0,)])
def test_a_default_that_does_not_say_what_is_allowed(default):
    """2 would allow whole numbers only, silently."""

    def mine(logp, gamma=default):
        return -logp

    with pytest.raises(ValueError, match=r"loss 'mine': gamma=.* does not say which values are allowed.*gamma: float"):
        register_loss("mine", family="token")(mine)
    mine.__annotations__["gamma"] = float
    if default == 2:
        register_loss("mine", family="token")(mine)
        CVLossConfig.parse({"mine": {"gamma": 0.5}})


def test_a_default_out_of_bounds():
    def mine(logp, gamma: Annotated[float, Ge(0)] = -1.0):
        return -logp

    with pytest.raises(ValueError, match="gamma"):
        register_loss("mine", family="token")(mine)
    assert "mine" not in available_losses()


@pytest.mark.parametrize("only_if", [{"mean_logit": "smoothing"}, {"lse": "share"}])
def test_only_if_must_name_a_statistic_and_a_parameter(only_if):
    with pytest.raises(ValueError, match="only_if"):
        register_loss("mine", family="token", only_if=only_if)(lambda mean_logit, share=0.0: mean_logit)


@pytest.mark.parametrize(
    ("family", "function", "message"),
    [
        ("token", lambda logp: logp.mean(), r"'mine' must return one value a row, shape \(9,\), not \(\)"),
        ("row", lambda logits, labels: logits, r"'mine' must return one value a row, shape \(9,\), not \(9, 5\)"),
        (
            "region",
            lambda labelled: labelled.repeat(2),
            r"'mine' must return a scalar or one value a class, shape \((\d),\), not",
        ),
    ],
)
def test_a_value_of_the_wrong_shape(family, function, message, batch):
    register_loss("mine", family=family)(function)
    with pytest.raises(ValueError, match=message):
        value("mine", batch)


# The hook


class Plugin:
    @hookimpl
    def cvloss_register_losses(self, register):
        register("hooked", family="token")(lambda logp, scale=2.0: -scale * logp)


def test_a_plugin_object(batch):
    plugin_manager().register(Plugin())
    torch.testing.assert_close(value("hooked", batch), 2 * value("cross_entropy", batch))


def test_the_built_in_losses_come_through_the_hook():
    from axolotl_cvloss import losses

    assert set(losses.BUILT_IN) <= set(plugin_manager().get_plugins())


def test_a_plugin_object_with_a_taken_name():
    plugin_manager().register(Plugin())
    with pytest.raises(ValueError, match="'hooked' is registered already"):
        plugin_manager().register(Plugin())


def test_a_misspelt_hook_of_a_plugin_object():
    class Misspelt:
        @hookimpl
        def cvloss_register_loss(self, register):
            raise AssertionError("nothing calls it")

    plugin_manager().register(Misspelt())
    with pytest.raises(pluggy.PluginValidationError, match="cvloss_register_loss"):
        plugin_manager().check_pending()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Lay a package out on the path as pip would, with an entry point."""

    def install(source, module="strangers_losses"):
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module.replace('_', '-')}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[axolotl_cvloss]\nstrangers = {module}\n")
        monkeypatch.syspath_prepend(tmp_path)
        laid.append(module)

    laid = []
    yield install
    for module in laid:
        sys.modules.pop(module, None)


def test_an_installed_package(installed, batch):
    installed("""
        from axolotl_cvloss import hookimpl

        def strange(logp, scale: float = 3.0):
            return -scale * logp

        @hookimpl
        def cvloss_register_losses(register):
            register("strange", family="token")(strange)
    """)
    torch.testing.assert_close(value("strange", batch), 3 * value("cross_entropy", batch))


def test_an_installed_package_that_uses_the_decorator(installed, batch):
    installed("""
        from axolotl_cvloss import register_loss

        @register_loss("strange", family="token")
        def strange(logp):
            return -3 * logp
    """)
    torch.testing.assert_close(value("strange", batch), 3 * value("cross_entropy", batch))


def test_two_packages_with_one_name_for_their_entry_points(installed, batch):
    for number, word in (2, "two"), (3, "three"):
        source = f"""
            from axolotl_cvloss import hookimpl

            @hookimpl
            def cvloss_register_losses(register):
                register("times_{word}", family="token")(lambda logp: -{number} * logp)
        """
        installed(source, f"losses_times_{word}")
    both = value({"times_two": 1.0, "times_three": 1.0}, batch)
    torch.testing.assert_close(both, 5 * value("cross_entropy", batch))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (
            """
            from axolotl_cvloss import hookimpl

            @hookimpl
            def cvloss_register_lossess(register):
                pass
            """,
            pluggy.PluginValidationError,
            "cvloss_register_lossess",
        ),
        (
            """
            from axolotl_cvloss import hookimpl

            @hookimpl
            def cvloss_register_losses(register):
                register("lovasz", family="token")(lambda logp: -logp)
            """,
            ValueError,
            "'lovasz' is registered already",
        ),
        ("import a_module_that_is_not_there", ModuleNotFoundError, "a_module_that_is_not_there"),
    ],
    ids=["misspelt hook", "taken name", "broken package"],
)
def test_a_faulty_package_stops_everything(installed, source, error, message):
    installed(source)
    for _ in range(2):  # and says why each time
        with pytest.raises(error, match=message):
            CVLossConfig.parse("cross_entropy")
