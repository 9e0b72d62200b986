"""The end of a quantized directory: what is in no layer, index, seal, and config.json last."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from duquantpp_jax import files
from duquantpp_jax.checkpoints.directory import JOB, METHOD, REPORT, layer_file
from duquantpp_jax.checkpoints.job import SCHEMA, Job
from duquantpp_jax.checkpoints.lazy import Checkpoint
from duquantpp_jax.checkpoints.seal import write_seal
from duquantpp_jax.checkpoints.shards import OWN_INDEX
from duquantpp_jax.checkpoints.source import CONFIG, Source
from duquantpp_jax.checkpoints.writer import layer_as_written, remove_files, write_tensors

READERS = 4
"""Layers whose hashes are checked side by side at the end."""


def finish(
    out: Path,
    checkpoint: Checkpoint,
    job: Job,
    before: Mapping[str, str],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Writes what is not in layers; config.json last.

    Args:
      before: What `checkpoint.source.beside()` was before the model was read.
      check: Called when the model has been read; raises ValueError if it is another than before.

    Raises:
      ValueError: The directory is not this job's any more: it was removed under way; or files of
        the model were changed.
    """
    if not (out / JOB).is_file():
        remove_files(out, "*.safetensors")
        raise ValueError(f"{out / JOB} was removed while the layers were written: run it again")
    place, rows = {}, []
    for number, (name, array) in enumerate(checkpoint.outside()):
        file = f"outside-{number}.safetensors"
        write_tensors(out / file, {name: array}, {})
        place[name] = file

    def read(number: int) -> tuple[list[str], list[dict[str, Any]]]:
        tensors, about = layer_as_written(out, number, job)
        return [*tensors], about["report"]

    with ThreadPoolExecutor(READERS) as threads:
        found = threads.map(read, range(checkpoint.config.num_hidden_layers))
        for number, (names, report) in enumerate(found):
            rows += report
            place |= dict.fromkeys(names, layer_file(number))
    fields = checkpoint.source.fields()
    if untied := bool(fields.get("tie_word_embeddings")) > checkpoint.config.tie_word_embeddings:
        fields["tie_word_embeddings"] = False
    total = sum((out / file).stat().st_size for file in set(place.values()))
    report = {
        "schema": SCHEMA,
        "job": job.to_dict(),
        "bytes": total,
        "float_bytes": checkpoint.size(),
        **({"untied_head": True} if untied else {}),
        **({"requantized": True} if checkpoint.packed else {}),
        "linears": rows,
    }
    files.write_whole(out / REPORT, files.to_json(report))
    about = {"quant_method": METHOD, "schema": SCHEMA, "recipe": job.recipe}
    about["model_type"] = fields.get("model_type")
    fields |= {"model_type": METHOD, "quantization_config": about}
    check()
    write_rest(out, OWN_INDEX, place, {"total_size": total}, checkpoint.source, fields, before)


def write_rest(
    out: Path,
    index: str,
    place: Mapping[str, str],
    metadata: Mapping[str, Any],
    source: Source,
    fields: Mapping[str, Any],
    before: Mapping[str, str],
) -> None:
    """Writes the companions of the model that is read, the index of tensors under the name `index`,
    a seal where that is this package's own, and config.json.

    Args:
      before: What `source.beside()` was before the model was read.

    Raises:
      ValueError: A companion was changed, added or removed meanwhile.
    """
    contents, now = {n: content() for n, content in source.companions().items()}, source.beside()
    if changed := sorted(name for name in {**before, **now} if before.get(name) != now.get(name)):
        raise ValueError(
            f"{', '.join(changed)} of the model was changed, added or removed while it was read: "
            "give a model that stays, and run the same command again"
        )
    for name, content in contents.items():
        files.write_whole(out / name, content)
    content = {"metadata": metadata, "weight_map": dict(sorted(place.items()))}
    files.write_whole(out / index, files.to_json(content))
    if index == OWN_INDEX:
        write_seal(out, {CONFIG: files.to_json(fields)})
    files.write_whole(out / CONFIG, files.to_json(fields))
