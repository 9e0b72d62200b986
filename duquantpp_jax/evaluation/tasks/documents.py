"""The documents of a task, for lm-eval's `custom_dataset`."""

import json
from pathlib import Path
from typing import Any


def load(file: str, **_: Any) -> dict[str, Any]:
    """The splits of a .json file beside this one; lm-eval adds the model's arguments."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]

    splits = json.loads((Path(__file__).parent / file).read_text(encoding="utf-8"))
    return {name: Dataset.from_list(documents) for name, documents in splits.items()}
