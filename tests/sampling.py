"""Which cases of a product `make test` runs: a sample. The others are marked slow: `make test-all` runs them too."""

import itertools

import pytest


def product(quick, axes):
    """Parametrize over every combination of the axes, slow where it is not among the quick ones, which are tuples.

    An axis is a list of values, or a dict of names and what they stand for; a combination consists of names.
    """
    cases = []
    for names in combinations(axes):
        meant = zip(names, axes.values(), strict=True)
        values = [axis[name] if isinstance(axis, dict) else name for name, axis in meant]
        marks = () if names in quick else pytest.mark.slow
        cases.append(pytest.param(*values, id="-".join(map(str, names)), marks=marks))
    return pytest.mark.parametrize(list(axes), cases)


def combinations(axes):
    return list(itertools.product(*axes.values()))


def pairwise(**axes):
    """Parametrize over every combination; quick are so many that any two values of two axes meet in one of them.

    What goes wrong takes two things to meet, seldom three; the whole product of five axes is ten times as long.
    """
    return product(all_pairs(axes), axes)


def all_pairs(axes):
    """Few combinations with every pair: those with the most new pairs come first."""
    chosen, met = set(), set()
    for new in range(len(axes) * (len(axes) - 1) // 2, 0, -1):
        for names in combinations(axes):
            pairs = set(itertools.combinations(enumerate(names), 2))
            if len(pairs - met) >= new:
                chosen.add(names)
                met |= pairs
    return chosen
