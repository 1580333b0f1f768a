"""Named providers: the built-in ones, and what `providers.yaml` adds or changes."""

import asyncio
import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError

from embedding_pipeline.embedders.errors import GlobalError
from embedding_pipeline.embedders.port import Dialect, Endpoint
from embedding_pipeline.errors import PipelineError, SpecError
from embedding_pipeline.settings import Settings, load_settings
from embedding_pipeline.yaml_documents import Document, Location, read_documents

PROVIDERS_FILE = Path(__file__).resolve().parent.parent / "providers.yaml"

OPENAI_URL = "https://api.openai.com/v1"

OPENAI_PRICES = {
    # USD per million tokens, from OpenAI's price list
    "text-embedding-3-small": 0.02,
    "text-embedding-3-large": 0.13,
    "text-embedding-ada-002": 0.10,
}


def built_in_endpoints(settings: Settings) -> dict[str, Endpoint]:
    """`tei`, `openai` and `local`, with addresses and keys from the environment."""
    return {
        "tei": Endpoint(
            name="tei",
            dialect="tei",
            base_url=settings.embedding_service_url or "",
            # /info lowers these to the server's own
            max_inputs=256,
            max_tokens_per_input=32_768,
            max_bytes_per_request=2_000_000,  # TEI's default --payload-limit
        ),
        "openai": Endpoint(
            name="openai",
            dialect="openai",
            base_url=settings.openai_url or OPENAI_URL,
            api_key=settings.openai_key,
            unusable=None
            if settings.openai_key or settings.openai_url
            else "OPENAI_API_KEY is not set; set it (or EMBEDDING_OPENAI_API_KEY)",
            price_per_million_tokens=OPENAI_PRICES,
        ),
        "local": Endpoint(
            name="local",
            dialect="openai",
            base_url="",
            max_inputs=256,
            max_tokens_per_input=256,  # all-MiniLM's max_seq_length
            concurrency=8,
        ),
    }


Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class _ProviderEntry(BaseModel):
    """One entry of `providers.yaml`; every key may be left out for a built-in name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    dialect: Dialect | None = None
    address: str | None = None
    api_key_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    max_inputs: Count | None = None
    max_tokens_per_input: Count | None = None
    max_tokens_per_request: Count | None = None
    max_bytes_per_request: Count | None = None
    price_per_million_tokens: dict[str, Annotated[float, Field(ge=0)]] | None = None
    daily_cost_cap: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    concurrency: Count | None = None
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    model_aliases: dict[str, list[str]] | None = None
    timeout_seconds: Seconds | None = None
    give_up_after_seconds: Seconds | None = None


def load_endpoints(settings: Settings, path: Path | None = None) -> dict[str, Endpoint]:
    """Every endpoint by name: the built-ins with `providers.yaml` (or `path`) laid over them.

    Nothing is contacted. Raises SpecError naming file, line, key and remedy.
    """
    endpoints = built_in_endpoints(settings)
    path = path or PROVIDERS_FILE
    if not path.is_file():
        return endpoints
    changed = path.stat()
    providers = _read(path, changed.st_mtime_ns, changed.st_size)
    for name, entry in providers.entries():
        endpoints[name] = _endpoint(providers, name, entry, endpoints.get(name))
    return endpoints


@lru_cache(maxsize=8)
def _read(path: Path, changed_ns: int, size: int) -> "_Providers":  # noqa: ARG001 - of the key
    """A file as it is now: every table asks for it, and it seldom changes."""
    documents = list(read_documents(path, may_be_empty=True))
    if len(documents) > 1:
        raise SpecError(f"{documents[1].where()}: a second document (---); write them as one")
    return _Providers(documents[0] if documents else Document(path, None, 1, {}))


class _Providers:
    """What a `providers.yaml` says; errors name its lines."""

    def __init__(self, document: Document) -> None:
        self._document = document

    @property
    def file(self) -> str:
        return self._document.path.name

    def entries(self) -> list[tuple[str, _ProviderEntry]]:
        value = {} if self._document.value is None else self._document.value
        if not isinstance(value, Mapping):
            raise self.error((), "expected one key, providers:")
        for key in value:
            if key != "providers":
                raise self.error((str(key),), f"unknown key {key!r}; expected one key, providers:")
        providers = value.get("providers") or {}
        if not isinstance(providers, Mapping):
            raise self.error(("providers",), "expected a mapping of names to providers")
        entries = []
        for name, value in providers.items():
            if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,63}", name):
                raise self.error(
                    ("providers", str(name)),
                    f"{name!r} is no provider name; use letters, digits, _ and -",
                )
            entries.append((name, self._entry(name, {} if value is None else value)))
        return entries

    def _entry(self, name: str, value: object) -> _ProviderEntry:
        try:
            return TypeAdapter(_ProviderEntry).validate_python(value)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            location = ("providers", name, *problem["loc"])
            if problem["type"] == "extra_forbidden":
                raise self.error(location, _unknown_key(str(problem["loc"][-1]))) from None
            key = ".".join(str(part) for part in location)
            raise self.error(location, f"{key}: {problem['msg']}") from None

    def error(self, location: Location, message: str) -> SpecError:
        """A SpecError at the line of the deepest part of `location` that the file has."""
        return SpecError(f"{self._document.where(location)}: {message}")


def _unknown_key(key: str) -> str:
    known = list(_ProviderEntry.model_fields)
    if key in ("api_key", "key", "token"):
        return (
            f"{key}: keys do not belong in this file; write api_key_env: and the name of the "
            "environment variable that holds it"
        )
    close = difflib.get_close_matches(
        {"base_url": "address", "url": "address"}.get(key, key), known
    )
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
    return f"unknown key {key!r}; {hint}"


_TEMPLATE = re.compile(r"\{\{\s*env\.([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")


def _endpoint(
    providers: _Providers, name: str, entry: _ProviderEntry, known: Endpoint | None
) -> Endpoint:
    given = entry.model_dump(exclude_unset=True, exclude_none=True)
    address, key_name = given.pop("address", None), given.pop("api_key_env", None)
    where = ("providers", name)
    if known is None:
        for required in ("dialect", "address"):
            if getattr(entry, required) is None:
                raise providers.error(where, f"provider {name} needs {required}:")
        known = Endpoint(name=name, dialect=given["dialect"], base_url="")
        if given["dialect"] == "tei":
            tei = built_in_endpoints(Settings.model_construct())["tei"]
            known = replace(tei, name=name)
    elif given.get("dialect", known.dialect) != known.dialect:
        raise providers.error(
            (*where, "dialect"), f"{name} is built in and speaks {known.dialect}; use another name"
        )
    for key in ("price_per_million_tokens", "model_aliases"):
        if key in given:
            given[key] = {**getattr(known, key), **given[key]}
    missing: list[str] = []
    if address is not None:
        given["base_url"], missing = _address(providers, (*where, "address"), address)
    if key_name is not None:
        value = os.environ.get(key_name)
        given["api_key"] = SecretStr(value) if value else None
        missing += [] if value else [key_name]
    if address is not None or key_name is not None:
        # told when it is used: a provider that only production uses must not stop the others
        given["unusable"] = (
            f"{' and '.join(missing)} not set in the environment, which provider {name} in "
            f"{providers.file} needs; set it"
            if missing
            else None
        )
    return replace(known, **given)


def _address(providers: _Providers, where: tuple[str, ...], template: str) -> tuple[str, list[str]]:
    """The address, and the variables that it needs and the environment lacks."""
    missing = [name for name in _TEMPLATE.findall(template) if not os.environ.get(name)]
    address = _TEMPLATE.sub(lambda match: os.environ.get(match[1], ""), template).rstrip("/")
    if not missing and ("{{" in address or not address.startswith(("http://", "https://"))):
        raise providers.error(
            where,
            "address must start with http:// or https://, or be a template like "
            "{{ env.MY_SERVER }}",
        )
    return address, missing


async def located(endpoint: Endpoint) -> Endpoint:
    """The endpoint with an address; the local model server's, which is started, if it has none.

    Raises GlobalError where the endpoint cannot be used in this environment.
    """
    if endpoint.unusable:
        raise GlobalError(f"{endpoint.name} cannot be used: {endpoint.unusable}")
    if endpoint.has_two_credentials:
        raise GlobalError(
            f"{endpoint.name} cannot be used: it has a key, and its address ({endpoint.address}) "
            "holds a user and password as well; a request carries one of the two. Unset the key, "
            "or take them out of the address"
        )
    if endpoint.base_url:
        return endpoint
    from embedding_pipeline.local.model_server import ensure_model_server

    try:
        address = await asyncio.to_thread(
            ensure_model_server, load_settings().embedding_pipeline_home
        )
    except PipelineError as error:
        raise GlobalError(f"{endpoint.name}: {error}") from error
    return replace(endpoint, base_url=address + ("/v1" if endpoint.dialect == "openai" else ""))
