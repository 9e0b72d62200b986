"""A planted error."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutant:
    """An error: in a file of the package, `right` becomes `wrong`.

    Attributes:
      tests: Files of the tests that should see it, by their paths in tests/ without ending.
      only: What pytest's -k gets; all of them by default.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: str
    only: str = ""
