"""Built-in providers and `providers.yaml`."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from embedding_pipeline.embedders import GlobalError, create_embedder, load_endpoints
from embedding_pipeline.embedders.endpoints import PROVIDERS_FILE, located
from embedding_pipeline.errors import SpecError
from embedding_pipeline.settings import Settings

NOTHING_SET = Settings.model_construct()


@pytest.fixture
def yaml_file(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "providers.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_the_shipped_file_adds_nothing() -> None:
    assert PROVIDERS_FILE.is_file()
    assert load_endpoints(NOTHING_SET).keys() == {"tei", "openai", "local"}


def test_built_in_addresses_come_from_the_environment() -> None:
    settings = Settings.model_construct(
        embedding_service_url="http://tei.internal:8080",
        openai_base_url="https://gateway.example/v1",
        openai_api_key=SecretStr("sk-general"),
        embedding_openai_api_key=SecretStr("sk-for-embeddings"),
    )
    endpoints = load_endpoints(settings)
    assert endpoints["tei"].base_url == "http://tei.internal:8080"
    assert endpoints["openai"].base_url == "https://gateway.example/v1"
    key = endpoints["openai"].api_key
    assert key is not None
    assert key.get_secret_value() == "sk-for-embeddings"
    assert endpoints["openai"].max_inputs == 2048
    assert endpoints["openai"].max_tokens_per_input == 8192
    assert endpoints["openai"].max_tokens_per_request == 300_000


@pytest.mark.parametrize(
    ("model", "price"),
    [
        ("text-embedding-3-small", 0.02),
        ("text-embedding-3-large", 0.13),
        ("text-embedding-ada-002", 0.10),
        ("something-else", 0.0),
    ],
)
def test_cost_is_dollars_for_tokens(model: str, price: float) -> None:
    endpoint = load_endpoints(NOTHING_SET)["openai"]
    assert create_embedder(endpoint, model, 1536).cost(1_000_000) == pytest.approx(price)
    assert create_embedder(endpoint, model, 1536).cost(0) == 0


def test_a_provider_of_ones_own(yaml_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_TEI_URL", "http://gpu:8080/")
    monkeypatch.setenv("GPU_TEI_KEY", "hf_secret")
    path = yaml_file(
        """
providers:
  gpu-tei:
    dialect: tei
    address: "{{ env.GPU_TEI_URL }}"
    api_key_env: GPU_TEI_KEY
    max_inputs: 128
    price_per_million_tokens: {BAAI/bge-m3: 0.01}
    model_aliases: {BAAI/bge-m3: [/data/bge-m3]}
  openai:
    tokens_per_minute: 1000000
    price_per_million_tokens: {my-model: 5}
"""
    )
    endpoints = load_endpoints(NOTHING_SET, path)
    own = endpoints["gpu-tei"]
    assert (own.name, own.dialect, own.base_url, own.max_inputs) == (
        "gpu-tei", "tei", "http://gpu:8080", 128,
    )  # fmt: skip
    assert own.api_key is not None
    assert own.api_key.get_secret_value() == "hf_secret"
    assert own.names_of("BAAI/bge-m3") == {"baai/bge-m3", "/data/bge-m3"}
    assert own.unusable is None
    # an override changes what it writes and leaves the rest
    openai = endpoints["openai"]
    assert openai.tokens_per_minute == 1_000_000
    assert openai.base_url == "https://api.openai.com/v1"
    assert openai.price_per_million_tokens["text-embedding-3-small"] == 0.02
    assert openai.price_per_million_tokens["my-model"] == 5


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("providers:\n  x:\n    dialect: tei\n    adress: http://a", 4, "did you mean address"),
        ("providers:\n  x:\n    dialect: tei\n    url: http://a", 4, "did you mean address"),
        ("providers:\n  x:\n    api_key: sk-1", 3, "api_key_env"),
        ("providers:\n  x:\n    dialect: cohere", 3, "dialect"),
        ("providers:\n  x:\n    dialect: tei", 2, "needs address"),
        ("providers:\n  x:\n    address: http://a", 2, "needs dialect"),
        ("providers:\n  x:\n    dialect: tei\n    address: ftp://a", 4, "http://"),
        ("providers:\n  x:\n    dialect: tei\n    address: '{{ a.b }}'", 4, "{{ env."),
        ("providers:\n  openai:\n    max_inputs: 0", 3, "max_inputs"),
        ("providers:\n  openai:\n    max_inputs: many", 3, "max_inputs"),
        ("providers:\n  openai:\n    dialect: tei", 3, "speaks openai"),
        ("providers:\n  openai:\n    price_per_million_tokens:\n      m: -1", 4, "price"),
        ("providers:\n  'a b':\n    dialect: tei", 2, "no provider name"),
        ("providers:\n  - x", 1, "mapping"),
        ("other: 1", 1, "providers:"),
        ("- 1", 1, "providers:"),
        ("just words", 1, "providers:"),
        ("providers:\n  x: [", 2, "not valid YAML"),
        ("providers:\n  x: {dialect: tei}\n  x: {dialect: tei}", 3, "twice"),
        ("providers:\n  tei:\n    model_aliases:\n      m: [a]\n      m: [b]", 5, "twice"),
        ("providers:\n  tei:\n    model_aliases: {m: [{a: 1, a: 2}]}", 3, "twice"),
        ("providers: {}\n---\nproviders: {}", 3, "second document"),
        ("providers:\n  tei: {timeout_seconds: 2025-02-30}", 2, "not valid YAML"),
    ],
)
def test_a_mistake_names_file_line_and_remedy(
    yaml_file: Any, text: str, line: int, words: str
) -> None:
    path = yaml_file(text)
    with pytest.raises(SpecError) as caught:
        load_endpoints(NOTHING_SET, path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ")
    assert words in message
    assert "sk-1" not in message


@pytest.mark.parametrize("text", ["", "# nothing\n", "providers:\n", "providers: {}\n"])
def test_an_empty_file_is_fine(yaml_file: Any, text: str) -> None:
    assert load_endpoints(NOTHING_SET, yaml_file(text)).keys() == {"tei", "openai", "local"}


def test_an_unset_variable_stops_only_who_uses_the_provider(
    yaml_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider that only production uses stopped every developer's machine from loading."""
    import asyncio

    for name in ("NOT_SET_URL", "NOT_SET_KEY"):
        monkeypatch.delenv(name, raising=False)
    path = yaml_file(
        "providers:\n  x:\n    dialect: tei\n    address: '{{ env.NOT_SET_URL }}/tei'\n"
        "    api_key_env: NOT_SET_KEY\n"
    )
    endpoint = load_endpoints(NOTHING_SET, path)["x"]
    with pytest.raises(GlobalError, match="NOT_SET_URL and NOT_SET_KEY not set"):
        asyncio.run(create_embedder(endpoint, "m", 3).start())
    with pytest.raises(GlobalError, match="OPENAI_API_KEY is not set"):
        asyncio.run(located(load_endpoints(NOTHING_SET)["openai"]))
