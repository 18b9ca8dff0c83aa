"""The families of losses, one file each. The engine knows them by ``family.Family`` and ``family.Part`` alone."""

from ..family import Family
from .dense import DENSE
from .document import DOCUMENT
from .number import NUMBER
from .ranking import RANKING
from .region import REGION
from .row import ROW
from .token import TOKEN

FAMILIES: dict[str, Family] = {family.name: family for family in (TOKEN, ROW, NUMBER, REGION, RANKING, DOCUMENT, DENSE)}
