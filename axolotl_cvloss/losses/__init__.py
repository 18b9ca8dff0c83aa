"""The losses, one module a family. Each registers its losses through the hook that other packages use."""

from . import document, number, ranking, region, row, token

BUILT_IN = (token, row, number, region, ranking, document)
