"""The model server as OpenAI would answer, over real HTTP."""

import base64

import numpy as np
import openai
import pytest

from embedding_pipeline.local.minilm import MiniLM, Space
from embedding_pipeline_tests.local.http_calls import Answer, call

WIDE, NARROW = "all-minilm-l6-v2-layers", "sentence-transformers/all-MiniLM-L6-v2"
TEXTS = ["a long sentence about the weather in Madrid", "x", "¿Qué tal? 🎉"]


@pytest.fixture
def url(base_url: str) -> str:
    return f"{base_url}/v1/embeddings"


def refusal(answer: Answer) -> tuple[int, str | None, str | None]:
    assert set(answer.json) == {"error"}
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return answer.status, error["code"], error["param"]


@pytest.mark.parametrize(
    ("name", "space"),
    [(WIDE, Space.LAYERS), (NARROW, Space.LAST_LAYER), ("all-minilm-l6-v2", Space.LAST_LAYER)],
)
def test_the_model_decides_the_space(url: str, model: MiniLM, name: str, space: Space) -> None:
    answer = call(url, {"model": name, "input": TEXTS})
    assert answer.status == 200
    assert answer.json["object"] == "list"
    assert answer.json["model"] == name
    assert [row["index"] for row in answer.json["data"]] == [0, 1, 2]
    rows = np.array([row["embedding"] for row in answer.json["data"]])
    np.testing.assert_allclose(rows, model.embed(TEXTS, space), atol=2e-6)


def test_base64_carries_the_same_bits_as_floats(url: str) -> None:
    request = {"model": WIDE, "input": TEXTS}
    floats = call(url, {**request, "encoding_format": "float"}).json["data"]
    packed = call(url, {**request, "encoding_format": "base64"}).json["data"]
    for a, b in zip(floats, packed, strict=True):
        unpacked = np.frombuffer(base64.b64decode(b["embedding"]), dtype="<f4")
        assert unpacked.astype(float).tolist() == a["embedding"]


def test_usage_counts_the_real_tokens(url: str, model: MiniLM) -> None:
    tokens = sum(model.count_tokens(TEXTS))
    usage = call(url, {"model": WIDE, "input": TEXTS}).json["usage"]
    assert usage == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_the_real_client_understands_answers_and_errors(base_url: str, model: MiniLM) -> None:
    with openai.OpenAI(base_url=f"{base_url}/v1", api_key="any", max_retries=0) as client:
        response = client.embeddings.create(model=WIDE, input=TEXTS, dimensions=1536)
        rows = np.array([row.embedding for row in response.data])
        np.testing.assert_allclose(rows, model.embed(TEXTS, Space.LAYERS), atol=2e-6)
        assert [listed.id for listed in client.models.list()] == [NARROW, "all-minilm-l6-v2", WIDE]
        assert client.models.retrieve(NARROW).id == NARROW
        with pytest.raises(openai.NotFoundError) as missing:
            client.embeddings.create(model="text-embedding-3-small", input="x")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            client.embeddings.create(model=WIDE, input=["fine", "word " * 300])
        assert long.value.code == "context_length_exceeded"


def test_an_unknown_model_is_404_and_the_known_ones_are_named(url: str) -> None:
    answer = call(url, {"model": "text-embedding-3-small", "input": "x"})
    assert refusal(answer) == (404, "model_not_found", None)
    assert WIDE in answer.json["error"]["message"]


def test_too_long_a_text_is_refused_in_openais_words(url: str) -> None:
    answer = call(url, {"model": WIDE, "input": ["fine", "word " * 300]})
    assert refusal(answer) == (400, "context_length_exceeded", "input")
    assert answer.json["error"]["message"].startswith(
        "This model's maximum context length is 256 tokens, however you requested 302 tokens"
    )


def test_too_many_tokens_in_one_request_are_refused(url: str) -> None:
    answer = call(url, {"model": WIDE, "input": ["word " * 250] * 1200})
    assert refusal(answer) == (400, "max_tokens_per_request", None)
    assert "Requested 302400 tokens, max 300000" in answer.json["error"]["message"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"input": ["fine", ""]}, (400, None, None)),
        ({"input": ""}, (400, None, None)),
        ({"input": []}, (400, "empty_array", "input")),
        ({"input": ["x"] * 2049}, (400, "array_above_max_length", "input")),
        ({"input": [1, 2, 3]}, (400, None, "input")),
        ({"input": [[1, 2, 3]]}, (400, None, "input")),
        ({"input": None}, (400, None, "input")),
        ({"input": {"text": "x"}}, (400, None, "input")),
        ({"input": ["fine", None]}, (400, None, None)),
        ({"dimensions": 384}, (400, None, "dimensions")),
        ({"dimensions": 0}, (400, None, "dimensions")),
        ({"encoding_format": "hex"}, (400, "invalid_value", "encoding_format")),
        ({"model": None}, (400, None, "model")),
        ({"model": ""}, (400, None, "model")),
    ],
)
def test_what_openai_refuses_is_refused(
    url: str, change: dict[str, object], expected: tuple[int, str | None, str | None]
) -> None:
    assert refusal(call(url, {"model": WIDE, "input": "x", **change})) == expected


@pytest.mark.parametrize("raw", [b"{", b"[]", b'"text"', b'{"input": "\\ud800"}'])
def test_a_body_that_is_no_json_object_is_refused(url: str, raw: bytes) -> None:
    assert refusal(call(url, raw=raw)) == (400, None, None)


def test_2048_short_texts_go_in_one_request(url: str) -> None:
    answer = call(url, {"model": NARROW, "input": ["x"] * 2048, "encoding_format": "base64"})
    assert len(answer.json["data"]) == 2048
