"""The losses, a module or two a family. Each registers its losses through the hook that other packages use."""

from . import distribution, document, number, ranking, region, token

BUILT_IN = (token, distribution, number, region, ranking, document)
