"""The losses, one module a family. Each registers its losses through the hook that other packages use."""

from . import ranking, region, token

BUILT_IN = (token, region, ranking)
