"""The model server as text-embeddings-inference would answer, over real HTTP."""

import numpy as np
import pytest

from embedding_pipeline.local.minilm import MiniLM
from embedding_pipeline_tests.local.http_calls import Answer, call

LONG = "word " * 300


@pytest.fixture
def embed(base_url: str) -> str:
    return f"{base_url}/embed"


def refusal(answer: Answer) -> tuple[int, str, str]:
    assert set(answer.json) == {"error", "error_type"}
    return answer.status, answer.json["error_type"], answer.json["error"]


def test_it_answers_one_vector_a_text_in_order(embed: str, model: MiniLM) -> None:
    texts = ["a long sentence about the weather in Madrid", "x", "¿Qué tal? 🎉"]
    answer = call(embed, {"inputs": texts, "truncate": False, "normalize": True})
    assert answer.status == 200
    np.testing.assert_allclose(np.array(answer.json), model.embed(texts), atol=2e-6)


def test_a_single_string_gives_a_list_of_one(embed: str, model: MiniLM) -> None:
    answer = call(embed, {"inputs": "hello"})
    np.testing.assert_allclose(np.array(answer.json), model.embed(["hello"]), atol=2e-6)


def test_json_keeps_every_bit_of_the_vector(embed: str) -> None:
    first, second = (call(embed, {"inputs": "hello"}).json[0] for _ in range(2))
    assert first == second
    assert np.array(first, dtype=np.float32).astype(float).tolist() == first


def test_it_counts_tokens_in_a_header_as_tei_does(embed: str, model: MiniLM) -> None:
    """Without it a client reports an estimate: 10,698 tokens for what were 6,652."""
    texts = ["hello", "¿Qué tal? 🎉"]
    headers = call(embed, {"inputs": texts}).headers
    assert headers["x-compute-tokens"] == str(sum(map(len, model.tokenize(texts))))
    assert headers["x-compute-characters"] == str(sum(map(len, texts)))
    cut = call(embed, {"inputs": LONG, "truncate": True}).headers
    assert cut["x-compute-tokens"] == "256"


def test_too_long_a_text_is_refused_unless_truncation_is_asked_for(
    embed: str, model: MiniLM
) -> None:
    assert refusal(call(embed, {"inputs": ["fine", LONG]})) == (
        413,
        "Validation",
        "Input validation error: `inputs` must have less than 256 tokens. Given: 302",
    )
    answer = call(embed, {"inputs": LONG, "truncate": True})
    np.testing.assert_allclose(np.array(answer.json), model.embed([LONG]), atol=2e-6)


def test_more_characters_than_it_would_tokenise_are_refused_or_cut(embed: str) -> None:
    novel = "a" * 70_000
    status, kind, message = refusal(call(embed, {"inputs": novel}))
    assert (status, kind) == (413, "Validation")
    assert "less than 64000 characters" in message
    assert call(embed, {"inputs": novel, "truncate": True}).status == 200


def test_too_many_texts_are_refused(embed: str) -> None:
    assert call(embed, {"inputs": ["x"] * 32}).status == 200
    assert refusal(call(embed, {"inputs": ["x"] * 33})) == (
        413,
        "Validation",
        "batch size 33 > maximum allowed batch size 32",
    )


@pytest.mark.parametrize("inputs", [[], "", ["fine", ""]])
def test_nothing_to_embed_is_refused(embed: str, inputs: object) -> None:
    status, kind, message = refusal(call(embed, {"inputs": inputs}))
    assert (status, kind) == (400, "Empty")
    assert "`inputs` cannot be empty" in message


@pytest.mark.parametrize(
    "body", [{}, [], "text", {"inputs": 1}, {"inputs": [[1, 2]]}, {"inputs": "x", "truncate": 3}]
)
def test_a_body_of_the_wrong_shape_is_422_in_plain_text(embed: str, body: object) -> None:
    answer = call(embed, body)
    assert answer.status == 422
    assert answer.headers["content-type"].startswith("text/plain")
    assert "Failed to deserialize the JSON body" in answer.text


def test_a_body_that_is_no_json_is_400(embed: str) -> None:
    answer = call(embed, raw=b'{"inputs": ')
    assert answer.status == 400
    assert "Failed to parse the request body as JSON" in answer.text


def test_a_body_over_the_payload_limit_is_413(embed: str) -> None:
    answer = call(embed, {"inputs": ["x" * 100_000] * 21, "truncate": True})
    assert answer.status == 413
    assert "length limit exceeded" in answer.text


@pytest.mark.parametrize(
    "option",
    [
        {"normalize": False},
        {"prompt_name": "query"},
        {"truncation_direction": "left"},
        {"dimensions": 128},
    ],
)
def test_options_that_would_change_the_vectors_are_never_ignored(
    embed: str, option: dict[str, object]
) -> None:
    status, kind, message = refusal(call(embed, {"inputs": "x", **option}))
    assert (status, kind) == (413, "Validation")
    assert next(iter(option)) in message


def test_info_names_the_model_and_the_limits(base_url: str) -> None:
    info = call(f"{base_url}/info").json
    assert info["model_id"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert info["max_input_length"] == 256
    assert info["max_client_batch_size"] == 32
    assert info["max_concurrent_requests"] == 512
    assert info["auto_truncate"] is False
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert info["version"]


def test_health_is_200(base_url: str) -> None:
    assert call(f"{base_url}/health").status == 200
