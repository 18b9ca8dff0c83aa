"""The losses, one module a family. Each registers its losses through the hook that other packages use."""

from . import document, ranking, region, row, token

BUILT_IN = (token, row, region, ranking, document)
