"""The graph that we write ourselves gives the vectors that the model's own library gives."""

import base64
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_pipeline.errors import PipelineError
from embedding_pipeline.local import minilm
from embedding_pipeline.local.minilm import MAX_TOKENS, MiniLM, Space, Tokens, Vectors, batches

# How it was made stands in the file.
REFERENCE: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "reference_vectors.json").read_text()
)["texts"]
TEXTS = [entry["text"] for entry in REFERENCE]


def reference(space: Space) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    rows = [base64.b64decode(entry[space.output]) for entry in REFERENCE]
    return np.stack([np.frombuffer(row, dtype="<f4") for row in rows])


@pytest.mark.parametrize("space", Space)
def test_vectors_equal_those_of_sentence_transformers(model: MiniLM, space: Space) -> None:
    assert len(TEXTS) >= 8
    vectors = model.embed(TEXTS, space)
    assert vectors.shape == (len(TEXTS), space.dimensions)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    cosines = (vectors * reference(space)).sum(axis=1)
    assert cosines.min() >= 0.99999


def test_the_reference_reaches_past_the_limit_and_beyond_english() -> None:
    counts = [entry["tokens"] for entry in REFERENCE]
    assert max(counts) > MAX_TOKENS
    assert MAX_TOKENS in counts
    assert min(counts) == 2  # only [CLS] and [SEP]
    assert any("ó" in text for text in TEXTS)
    assert any("🎉" in text for text in TEXTS)


def test_tokens_are_counted_uncut_with_both_special_tokens(model: MiniLM) -> None:
    assert model.count_tokens(TEXTS) == [entry["tokens"] for entry in REFERENCE]


def test_a_text_gets_the_same_vector_alone_and_in_any_company(model: MiniLM) -> None:
    alone = np.concatenate([model.embed([text], Space.LAYERS) for text in TEXTS])
    together = model.embed(TEXTS[::-1], Space.LAYERS)[::-1]
    np.testing.assert_allclose(alone, together, atol=2e-6)


def test_both_spaces_come_out_of_one_pass(model: MiniLM) -> None:
    tokens = [model.cut(ids) for ids in model.tokenize(TEXTS[:4])]
    both = model.embed_tokens(tokens, list(Space))
    for space in Space:
        np.testing.assert_allclose(both[space], model.embed(TEXTS[:4], space), atol=2e-6)


def test_the_last_quarter_of_the_wide_space_is_the_narrow_one(model: MiniLM) -> None:
    wide = model.embed(TEXTS, Space.LAYERS)[:, -384:]
    narrow = model.embed(TEXTS, Space.LAST_LAYER)
    # weights 0.1, 0.2, 0.5, 1: the last layer's share of the whole vector's length
    share = 1 / np.sqrt(0.1**2 + 0.2**2 + 0.5**2 + 1)
    np.testing.assert_allclose(wide, narrow * share, atol=2e-6)


def test_batches_run_on_as_many_cores_as_there_are_and_each_on_one() -> None:
    class Together(MiniLM):
        """Each batch waits until as many as there are cores have come."""

        def __init__(self) -> None:
            super().__init__(threads=3)
            self.all_here = threading.Barrier(3)

        def run(self, tokens: Sequence[Tokens], spaces: Sequence[Space]) -> dict[Space, Vectors]:
            self.all_here.wait(timeout=30)
            return super().run(tokens, spaces)

    model = Together()
    assert model._session.get_session_options().intra_op_num_threads == 1
    texts = ["word " * 200] * 6  # two to a batch
    vectors = model.embed(texts)
    assert np.abs(vectors - vectors[0]).max() < 2e-6
    assert np.linalg.norm(vectors[5]) == pytest.approx(1, abs=1e-6)


def test_no_text_gives_no_row(model: MiniLM) -> None:
    assert model.embed([], Space.LAYERS).shape == (0, 1536)


def test_similar_texts_are_nearer_than_others(model: MiniLM) -> None:
    cat, kitten, law = model.embed(
        ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The law enters into force."]
    )
    assert cat @ kitten > 0.5 > cat @ law


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(minilm.model_folder(), folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)[0]
        file.seek(50_000_000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(PipelineError, match=r"SHA-256.*requirements-model\.lock"):
        MiniLM(model=folder)


def test_missing_weights_are_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "find_spec", lambda _: None)
    with pytest.raises(PipelineError, match="make install"):
        MiniLM()


def test_importing_the_module_loads_nothing_heavy() -> None:
    code = (
        "import sys, embedding_pipeline.local.minilm, embedding_pipeline.local.model_server, "
        "embedding_pipeline.local.postgres; "
        "print({'onnx', 'onnxruntime', 'tokenizers', 'torch', 'starlette'} & set(sys.modules))"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


@given(st.lists(st.integers(2, MAX_TOKENS), max_size=300))
def test_batches_hold_every_text_once_within_the_budget(lengths: list[int]) -> None:
    result = batches(lengths)
    assert sorted(i for batch in result for i in batch) == list(range(len(lengths)))
    for batch in result:
        longest = max(lengths[i] for i in batch)
        padded = longest * len(batch)
        assert padded <= minilm.BATCH_TOKENS
        wasted = padded - sum(lengths[i] for i in batch)
        assert wasted <= 0.25 * padded or padded <= 256 + longest
