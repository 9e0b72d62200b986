"""All that decides what a quantized checkpoint holds, in names and numbers that JSON can say.

Two runs of one job write the same bytes on one machine; a job that differs in anything is another
job, and a run that was killed is only taken up by its own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from duquantpp_jax.core import Format
from duquantpp_jax.formats import E3M2, E5M2, MXFP6, MXFP8, NVFP4
from duquantpp_jax.formats.plain import BFloat16
from duquantpp_jax.models import SITES, DecoderConfig
from duquantpp_jax.ptq.walk import Plan
from duquantpp_jax.recipes import SCALE_RULES, known, recipe

SCHEMA = 1
"""Of the files; one that is newer than this is refused."""

_OTHERS: Mapping[str, Format] = {
    "mxfp6": MXFP6(),
    "mxfp6_e3m2": MXFP6(E3M2),
    "mxfp8": MXFP8(),
    "mxfp8_e5m2": MXFP8(E5M2),
    "nvfp4": NVFP4(),
    "bf16": BFloat16(),
}
ACTIVATION_FORMATS = ("mxfp4", *_OTHERS)
WEIGHT_FORMATS = tuple(name for name in ACTIVATION_FORMATS if name != "bf16")


def format_named(name: str, scale_rule: str) -> Format:
    """A format by its name on the command line.

    Args:
      name: One of ACTIVATION_FORMATS.
      scale_rule: Of MX formats; for mxfp4 also log256 and fp32, which are not MX.

    Raises:
      ValueError: An unknown name, or a rule that the format has not.
    """
    rule = SCALE_RULES[known("scale rule", scale_rule, SCALE_RULES)]
    if known("format", name, ACTIVATION_FORMATS) == "mxfp4":
        return rule
    format = _OTHERS[name]
    if name in ("bf16", "nvfp4"):  # they have no rule to choose
        return format
    if not hasattr(rule, "scale_rule"):
        raise ValueError(f"{name} has no scale rule {scale_rule!r}: choose it for mxfp4 alone")
    return dataclasses.replace(format, scale_rule=rule.scale_rule)  # type: ignore[call-arg]


@dataclasses.dataclass(frozen=True)
class Job:
    """The description.

    Attributes:
      model: Name and SHA-256 of the float model.
      recipe, rounding, scale_rule: By their names in duquantpp_jax.recipes.
      weight_formats, activation_formats: For each site, by name.
      include, exclude, pad, seed, sequential: As in `Plan`.
      calibration: Where the rows are from, how many of what length, and the SHA-256 of their ids.
      environment: Versions and device; other ones may round other numbers up.
    """

    model: Mapping[str, str]
    recipe: str
    rounding: str
    scale_rule: str
    weight_formats: Mapping[str, str]
    activation_formats: Mapping[str, str]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    pad: bool
    seed: int
    sequential: bool
    calibration: Mapping[str, Any]
    environment: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Job":
        """What `to_dict` gave.

        Raises:
          ValueError: Fields are missing or unknown.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, Mapping) or set(fields) != names:
            raise ValueError(f"a job has the fields {', '.join(sorted(names))}, and no others")
        given: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()
        }
        return cls(**given)

    def plan(self, config: DecoderConfig) -> Plan:
        """What the job does to a model.

        Raises:
          ValueError: A name is not known.
        """
        whole = recipe(self.recipe, self.scale_rule, self.rounding)
        recipes = {
            site: dataclasses.replace(
                whole,
                weight_format=format_named(self.weight_formats[site], self.scale_rule),
                activation_format=format_named(self.activation_formats[site], self.scale_rule),
            )
            for site in SITES
        }
        return Plan(
            config, recipes, self.include, self.exclude, self.pad, self.seed, self.sequential
        )

    def difference(self, other: "Job") -> str | None:
        """Where the two first differ, in words; None where they are one."""

        def flat(value: Any, path: str) -> dict[str, Any]:
            if isinstance(value, Mapping):
                parts = [flat(v, f"{path}.{k}".lstrip(".")) for k, v in value.items()]
                return {key: one for part in parts for key, one in part.items()}
            return {path: value}

        mine, theirs = flat(self.to_dict(), ""), flat(other.to_dict(), "")
        for name in mine | theirs:
            if mine.get(name) != theirs.get(name):
                return f"{name} {mine.get(name)!r}, not {theirs.get(name)!r}"
        return None
