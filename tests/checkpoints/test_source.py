"""Of a checkpoint with images the text model is read, and nothing else of it."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from duquantpp_jax.checkpoints import load, load_config
from tests.checkpoints.spoiling import refusal
from tests.goldens import families
from tests.models.test_families import directory_of

NAME = "gemma 3"


@pytest.fixture
def text(tmp_path):
    return directory_of(NAME, families.CASES[NAME], tmp_path / "text")


def with_images(text, place, rename, **whole):
    """The directory of a model that has `text` as a part."""
    place.mkdir()
    fields = json.loads((text / "config.json").read_text())
    outside = {name: fields.pop(name) for name in ("torch_dtype", "eos_token_id", "architectures")}
    outside["architectures"] = ["Gemma3ForConditionalGeneration"]
    outside |= {"model_type": "gemma3", "text_config": fields, "vision_config": {}} | whole
    (place / "config.json").write_text(json.dumps(outside))
    tensors = {rename(name): array for name, array in load_file(text / "model.safetensors").items()}
    more = ("vision_tower.x.weight", "model.multi_modal_projector.mm_soft_emb_norm.weight")
    save_file(tensors | {name: np.ones(3) for name in more}, place / "model.safetensors")
    return place


@pytest.mark.parametrize(
    "rename",
    [lambda n: f"language_model.{n}", lambda n: n.replace("model.", "model.language_model.", 1)],
    ids=["transformers 4", "transformers 5"],
)
def test_the_text_model_of_one_with_images_is_that_of_its_own_directory(rename, text, tmp_path):
    whole, wanted = load(with_images(text, tmp_path / "whole", rename)), load(text)
    assert whole.config == wanted.config
    for name, array in wanted.parameters().items():
        np.testing.assert_array_equal(whole.parameters()[name], array)


def test_what_the_whole_states_counts_for_its_text_model(text, tmp_path):
    given = {"torch_dtype": "float32", "tie_word_embeddings": False, "eos_token_id": 7}
    config = load_config(with_images(text, tmp_path / "whole", str, **given))
    assert config.eos_token_id == 7
    assert not config.tie_word_embeddings
    assert config.embedding_scale == pytest.approx(48**0.5, rel=1e-7)
    packed = with_images(text, tmp_path / "packed", str, quantization_config={"bits": 4})
    assert "already quantized" in refusal(lambda: load_config(packed))


def test_a_model_with_images_whose_text_is_not_described_is_refused(text, tmp_path):
    empty = with_images(text, tmp_path / "whole", str, text_config=None)
    assert "has no text_config" in refusal(lambda: load_config(empty))
