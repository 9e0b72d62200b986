"""All that decides what a quantized checkpoint holds, in names and numbers that JSON can say.

Two runs of one job write the same bytes on one machine; a job that differs in anything is another
job, and a run that was killed is only taken up by its own.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from types import UnionType
from typing import Any, get_origin

from duquantpp_jax.models import SITES, DecoderConfig
from duquantpp_jax.ptq import stream
from duquantpp_jax.ptq.plan import Plan
from duquantpp_jax.recipes import find_format, recipe

SCHEMA = 2
"""Of the files; any other is refused."""


@dataclasses.dataclass(frozen=True)
class Job:
    """The description.

    Attributes:
      model: Name and SHA-256 of the float model.
      recipe, rounding: By their names in duquantpp_jax.recipes; the recipe is "fits" where fits
        were given.
      weight_formats, activation_formats: For each site, by its name as `format_name` writes it.
      include, exclude, pad, seed, sequential, fuse: As in `Plan`.
      calibration: Where the rows are from, how many of what length, and the SHA-256 of their ids.
      environment: Versions and device: others may round numbers differently.
      fits: SHA-256 of the fits that were given; None where the recipe fitted.
      rotate_stream, rotate_values: Rotations of the float model, as of `ptq.stream.Turn`.
      refine: Steps that the transforms learned after rounding.
    """

    model: Mapping[str, str]
    recipe: str
    rounding: str
    weight_formats: Mapping[str, str]
    activation_formats: Mapping[str, str]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    pad: bool
    seed: int
    sequential: bool
    calibration: Mapping[str, Any]
    environment: Mapping[str, Any]
    fuse: bool = False
    fits: str | None = None
    rotate_stream: str | None = None
    rotate_values: str | None = None
    refine: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in vars(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Job":
        """What `to_dict` gave; raises ValueError if fields are missing or unknown."""
        names = {field.name for field in dataclasses.fields(cls)}
        later = names & vars(cls).keys()  # have a default: older jobs lack them
        if not isinstance(fields, Mapping) or set(fields) | later != names:
            raise ValueError(f"a job has the fields {', '.join(sorted(names))}, and no others")
        given: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        for field in dataclasses.fields(cls):
            name, kind = field.name, field.type
            kind: Any = kind if isinstance(kind, UnionType) else get_origin(kind) or kind
            if not isinstance(value := given.get(name, field.default), kind):
                raise ValueError(f"a job has no {name} {value!r:.60}")
        for name in ("weight_formats", "activation_formats"):
            if set(given[name]) != set(SITES):
                raise ValueError(f"a job has {name} of {', '.join(SITES)}, not {[*given[name]]}")
        texts = (given["model"], given["weight_formats"], given["activation_formats"])
        strings = [*(v for text in texts for v in text.values()), *given["include"]]
        if not all(isinstance(value, str) for value in (*strings, *given["exclude"])):
            raise ValueError("a job has names of its model, formats, include and exclude")
        return cls(**given)

    @property
    def turn(self) -> stream.Turn:
        """What the float model is turned by before anything else."""
        return stream.Turn(self.rotate_stream, self.rotate_values, self.seed)

    def plan(self, config: DecoderConfig, *, done: bool = False) -> Plan:
        """What the job does to a model.

        Args:
          done: The model is quantized already and nothing is left to fit or to round: of all names
            only formats are looked up, and no module is imported because the job names it.

        Raises:
          ValueError: A name is not known.
        """
        recipes = {
            site: recipe(
                "rtn" if done or self.fits is not None else self.recipe,
                rounding="rtn" if done else self.rounding,
                weight_format=find_format(self.weight_formats[site], imports=not done),
                activation_format=find_format(self.activation_formats[site], imports=not done),
            )
            for site in SITES
        }
        names = ("include", "exclude", "pad", "seed", "sequential", "fuse")
        return Plan(config, recipes, **{name: getattr(self, name) for name in names})

    def difference(self, other: "Job") -> str | None:
        """Where the two first differ, in words; None where they are one."""

        def flat(value: Any, path: str) -> dict[str, Any]:
            if not isinstance(value, Mapping):
                return {path: value}
            parts = [flat(v, f"{path}.{k}".lstrip(".")).items() for k, v in value.items()]
            return dict(itertools.chain.from_iterable(parts))

        mine, theirs = flat(self.to_dict(), ""), flat(other.to_dict(), "")
        for name in mine | theirs:
            if mine.get(name) != theirs.get(name):
                return f"{name} {mine.get(name)!r}, not {theirs.get(name)!r}"
        return None
