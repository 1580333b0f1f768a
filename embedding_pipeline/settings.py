"""Environment variables, typed; impossible combinations are refused at start.

The names are those that existing deployments of embedding platforms already set. Those that
name a model or a width (`EMBEDDING_MODEL`, `EMBEDDING_OPENAI_MODEL`,
`EMBEDDING_OPENAI_DIMENSIONS`) reach a column only where its YAML says so.
"""

import os
import re
from collections.abc import Mapping
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Self

from pydantic import (
    AliasChoices,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from embedding_pipeline.clock import time_of_day, time_zone
from embedding_pipeline.errors import SettingsError

PROJECT_ROOT = Path(__file__).resolve().parent.parent


class EmbeddingMode(StrEnum):
    """Which provider embeds queries; rows always wait for their own column's model."""

    SERVER = "server"
    OPENAI = "openai"
    FALLBACK = "fallback"


UNREADABLE_ADDRESS = (
    "cannot be read as an address (its value is a secret and not shown). Write special characters "
    "in user and password in percent: @ is %40, : is %3A, / is %2F, ? is %3F, # is %23, % is %25, "
    "a space is %20. What follows the ? are connection parameters that Postgres knows"
)


def is_readable_address(url: str) -> bool:
    """Whether Postgres' client reads user, password and host where they were meant to be.

    What it misreads it quotes in its errors: of `p@ss` the host `ss`, of `100%secure` the whole.
    """
    _, is_url, rest = url.partition("://")
    if not is_url:
        return True  # words such as host=…, which our own code makes of a connection
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    if re.search(r"\s|%(?![0-9A-Fa-f]{2})", url) or authority.count("@") > 1:
        return False
    if "@" in authority:
        return True
    # without a user what follows a colon is a port, unless a password was cut at its / ? or #
    ports = [re.sub(r"^\[.*\]", "", host).partition(":")[2] for host in authority.split(",")]
    return all(port == "" or port.isdecimal() for port in ports)


class _Variables(EnvSettingsSource):
    """The environment, where a blank variable counts as unset and blanks around one as nothing."""

    def _load_env_vars(self) -> Mapping[str, str | None]:
        found = super()._load_env_vars()
        return {name: value.strip() for name, value in found.items() if value and value.strip()}


class Settings(BaseSettings):
    """Every setting with its default; `load_settings` is the way to get one."""

    model_config = SettingsConfigDict(extra="ignore", hide_input_in_errors=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is given, and the environment."""
        return init_settings, _Variables(settings_cls)

    database_url: SecretStr | None = Field(
        None, validation_alias=AliasChoices("DATABASE_URL", "POSTGRES_URL")
    )
    dagster_database_url: SecretStr | None = None
    openai_api_key: SecretStr | None = None
    openai_base_url: str | None = Field(None, repr=False)
    embedding_mode: EmbeddingMode = EmbeddingMode.SERVER
    embedding_service_url: str | None = Field(None, repr=False)
    embedding_model: str | None = None
    embedding_openai_api_key: SecretStr | None = None
    embedding_openai_model: str | None = None
    embedding_openai_base_url: str | None = Field(None, repr=False)
    embedding_openai_dimensions: int | None = Field(None, ge=1, le=16000)
    use_embedding_api: bool = False
    use_vector_1536: bool = False
    similarity_threshold: float = Field(0.0, ge=-1.0, le=1.0)
    alert_urls: SecretStr | None = None
    """Addresses of alert channels as apprise writes them, separated by commas or blanks."""
    dagster_ui_url: str = "http://127.0.0.1:3000"
    """Where people open the Dagster UI; links in alerts begin with it."""
    embedding_daily_cost_cap: float | None = Field(None, ge=0, allow_inf_nan=False)
    """US dollars that all runs of all providers together spend in a day, at most."""
    nightly_at: str = "02:00"
    """When the nightly schedule starts, on the clock of `nightly_timezone`."""
    nightly_timezone: str = "UTC"
    """An IANA name; also where a day of the cost caps begins."""

    embedding_pipeline_home: Path = PROJECT_ROOT / ".local"
    embedding_pipeline_defs: Path | None = None
    """A folder of further tables, outside this package: `<folder>/<table>/defs.yaml`."""
    embedding_pipeline_environment: str = Field("default", pattern=r"^[A-Za-z0-9_.-]{1,63}$")

    @field_validator("database_url", "dagster_database_url")
    @classmethod
    def _is_postgres(cls, value: SecretStr | None) -> SecretStr | None:
        if value and not value.get_secret_value().startswith(("postgresql://", "postgres://")):
            raise ValueError("must start with postgresql:// (its value is a secret and not shown)")
        if value and not is_readable_address(value.get_secret_value()):
            raise ValueError(UNREADABLE_ADDRESS)
        return value

    @field_validator("openai_base_url", "embedding_service_url", "embedding_openai_base_url")
    @classmethod
    def _is_http(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not value.startswith(("http://", "https://")):
            # not shown: an address may carry a password, and a key may be pasted here by mistake
            raise ValueError("must start with http:// or https:// (its value is not shown)")
        return value.rstrip("/")

    @field_validator("nightly_at")
    @classmethod
    def _is_a_time(cls, value: str) -> str:
        return time_of_day(value)

    @field_validator("nightly_timezone")
    @classmethod
    def _is_a_zone(cls, value: str) -> str:
        return time_zone(value)

    @field_validator("dagster_ui_url")
    @classmethod
    def _is_address(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://, like http://127.0.0.1:3000")
        return value.rstrip("/")

    @field_validator("alert_urls")
    @classmethod
    def _are_addresses(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        from embedding_pipeline.alerts.addresses import entries_without_scheme

        wrong = entries_without_scheme(value.get_secret_value())
        if wrong:
            raise ValueError(
                f"entry {wrong[0]} is not an address such as slack://… or https://… (its value is "
                "a secret and not shown); separate several with commas"
            )
        return value

    @field_validator("embedding_pipeline_home", "embedding_pipeline_defs")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value.expanduser().resolve() if value else None

    @property
    def openai_key(self) -> SecretStr | None:
        """The key for OpenAI; the embedding-only name wins over the general one."""
        return self.embedding_openai_api_key or self.openai_api_key

    @property
    def openai_url(self) -> str | None:
        """OpenAI's address when it is not the public one."""
        return self.embedding_openai_base_url or self.openai_base_url

    @model_validator(mode="after")
    def _possible(self) -> Self:
        wants_openai = [
            name
            for name, wanted in (
                ("USE_EMBEDDING_API=true", self.use_embedding_api),
                ("EMBEDDING_MODE=openai", self.embedding_mode is EmbeddingMode.OPENAI),
                ("EMBEDDING_MODE=fallback", self.embedding_mode is EmbeddingMode.FALLBACK),
            )
            if wanted
        ]
        if wants_openai and self.openai_key is None:
            raise ValueError(
                f"{wants_openai[0]} asks for OpenAI, but OPENAI_API_KEY is not set; "
                f"set it (or EMBEDDING_OPENAI_API_KEY), or unset {wants_openai[0].split('=')[0]}"
            )
        return self


def _read_dotenv() -> None:
    """Put `.env` beside pyproject.toml into the environment, so that child processes see it.

    What the environment already says wins. Dagster's daemon and run workers are processes of
    their own: a value that only this process knew would be another value there.
    """
    from dotenv import dotenv_values

    path = PROJECT_ROOT / ".env"
    if path.is_file():
        try:
            values = dotenv_values(path)
        except UnicodeDecodeError as error:
            raise SettingsError(f"{path}: not UTF-8 text; save the file as UTF-8") from error
        for name, value in values.items():
            if value:
                os.environ.setdefault(name, value)


_EXPECTED = {
    # pydantic's error types → what to say instead
    "bool_parsing": "must be true or false",
    "int_parsing": "must be a whole number",
    "float_parsing": "must be a number",
    "string_pattern_mismatch": "must be 1 to 63 letters, digits, dots, hyphens or underscores",
}


@cache
def load_settings() -> Settings:
    """Read the environment (and `.env`) once for this process.

    Raises SettingsError naming every variable that is wrong; values never appear in it when
    they could be secrets.
    """
    _read_dotenv()
    try:
        return Settings()
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_url=False, include_input=False, include_context=False):
            name = "_".join(str(part) for part in problem["loc"]).upper()
            if name == "DATABASE_URL" and not os.environ.get(name, "").strip():
                name = "POSTGRES_URL"  # its other name; pydantic gives the first
            message = _EXPECTED.get(problem["type"]) or problem["msg"]
            message = message.removeprefix("Value error, ").replace("Input should be", "must be")
            lines.append(f"{name}: {message}" if name else message)
        raise SettingsError("wrong settings:\n  " + "\n  ".join(lines)) from None
