"""Fits as a directory, so that what was learned for one model can be given to other commands.

    fits.safetensors    for each site, the whole Fitted, stacked over layers (transforms/storage.py)
    fits.json           the model that they are for, the formats, and how they were learned

fits.json is written last: a directory without it is not finished.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from duquantpp_jax import files
from duquantpp_jax.core import Fitted
from duquantpp_jax.files import read_json
from duquantpp_jax.learning.state import digest
from duquantpp_jax.models import SITES
from duquantpp_jax.transforms import storage

SCHEMA = 1
ARRAYS, ABOUT = "fits.safetensors", "fits.json"
_FIELDS = {"model": {"name": str, "sha256": str}, "formats": {"weight": str, "activation": str}}


def save_fits(directory: Path, fits: Mapping[str, Fitted], about: Mapping[str, Any]) -> None:
    """Writes fits to a directory, which may be new.

    Args:
      fits: For each site, stacked over layers.
      about: With `model` (name and sha256) and `formats` (weight and activation), and whatever
        else is to be known of them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    storage.save(directory / ARRAYS, fits)
    content = {"schema": SCHEMA, **about, "sha256": digest(dict(fits))}
    files.write_whole(directory / ABOUT, files.to_json(content))


def read_about(directory: Path, model_sha256: str | None = None) -> dict[str, Any]:
    """What fits.json says.

    Raises:
      ValueError: There are no fits, or they are of another schema, or not of the model given.
    """
    if not (directory / ABOUT).is_file():
        raise ValueError(
            f"{directory} holds no finished fits: give a directory that duquantpp learn has written"
        )
    about = read_json(directory / ABOUT)
    if about.get("schema") != SCHEMA:
        raise ValueError(
            f"{directory / ABOUT} has schema {about.get('schema')!r}, here it is {SCHEMA}: "
            "learn the fits again"
        )
    with files.refusing(directory / ABOUT, "learn the fits again"):
        files.check_fields(about, _FIELDS)
    found = about["model"]
    if model_sha256 is not None and found["sha256"] != model_sha256:
        raise ValueError(
            f"the fits in {directory} are of another model ({found['name']}): "
            "learn them for this one"
        )
    return about


def load_fits(directory: Path, model_sha256: str) -> tuple[dict[str, Fitted], dict[str, Any]]:
    """Fits of a model, and what fits.json says; raises ValueError as `read_about`, or if broken."""
    about = read_about(directory, model_sha256)
    fits = storage.load(directory / ARRAYS)
    if digest(fits) != about.get("sha256"):
        raise ValueError(f"{directory / ARRAYS} holds other fits than fits.json names: copy both")
    if set(fits) != set(SITES) or not all(isinstance(fit, Fitted) for fit in fits.values()):
        raise ValueError(f"{directory / ARRAYS} must hold fits of {', '.join(SITES)}")
    return {site: fits[site] for site in SITES}, about  # type: ignore[misc]


def other_formats(about: Mapping[str, Any], weight: str, activation: str) -> str | None:
    """A warning in one line if fits are used under other formats than those they were made for.

    Args:
      about: What fits.json says.
      weight, activation: Names in full, as of `recipes.format_name`.
    """
    made = about["formats"]
    if made == {"weight": weight, "activation": activation}:
        return None
    return (
        f"warning: the fits were learned for weights {made['weight']} and activations "
        f"{made['activation']}, and are used for weights {weight} and activations {activation}"
    )
