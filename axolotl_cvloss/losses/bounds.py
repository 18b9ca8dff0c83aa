"""Ranges of loss parameters, as annotations."""

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
FractionBelow1 = Annotated[float, Ge(0), Lt(1)]
PositiveFraction = Annotated[float, Gt(0), Le(1)]
AtLeastMinus1 = Annotated[float, Ge(-1)]
Number = Annotated[int, Ge(1), Le(10**9)]
NumberFrom2 = Annotated[int, Ge(2), Le(10**9)]
Above1 = Annotated[float, Gt(1)]
