"""Settings: every variable, blanks, aliases, impossible combinations, and secrets that stay so."""

import os
import traceback
from pathlib import Path

import pytest

from embedding_pipeline.errors import PipelineError, SettingsError
from embedding_pipeline.settings import EmbeddingMode, Settings, load_settings
from embedding_pipeline.store.connection import connect
from embedding_pipeline_tests.conftest import Environment

SECRET = "sk-proj-VERYsecret1234567890"
SECRET_URL = f"postgresql://app:{SECRET}@db.example/app"

EVERY_VARIABLE = {
    "DATABASE_URL": SECRET_URL,
    "DAGSTER_DATABASE_URL": f"postgres://dagster:{SECRET}@db.example/dagster",
    "OPENAI_API_KEY": SECRET,
    "OPENAI_BASE_URL": "https://proxy.example/v1",
    "EMBEDDING_MODE": "fallback",
    "EMBEDDING_SERVICE_URL": "http://tei.example:8080",
    "EMBEDDING_MODEL": "BAAI/bge-m3",
    "EMBEDDING_OPENAI_API_KEY": SECRET,
    "EMBEDDING_OPENAI_MODEL": "text-embedding-3-large",
    "EMBEDDING_OPENAI_BASE_URL": "https://embeddings.example/v1",
    "EMBEDDING_OPENAI_DIMENSIONS": "1024",
    "USE_EMBEDDING_API": "true",
    "USE_VECTOR_1536": "true",
    "SIMILARITY_THRESHOLD": "0.4",
    "ALERT_URLS": f"slack://{SECRET}",
    "DAGSTER_UI_URL": "https://dagster.example",
    "EMBEDDING_DAILY_COST_CAP": "12.5",
    "NIGHTLY_AT": "03:30",
    "NIGHTLY_TIMEZONE": "Europe/Madrid",
    "EMBEDDING_PIPELINE_HOME": "/var/lib/embedding-pipeline",
    "EMBEDDING_PIPELINE_DEFS": "/etc/embedding-pipeline",
    "EMBEDDING_PIPELINE_ENVIRONMENT": "staging",
}
NOT_SECRET = {
    "EMBEDDING_MODEL",
    "EMBEDDING_OPENAI_MODEL",
    "EMBEDDING_PIPELINE_DEFS",
    "EMBEDDING_PIPELINE_ENVIRONMENT",
    "EMBEDDING_PIPELINE_HOME",
    "NIGHTLY_TIMEZONE",
}
"""Shown as they are: models, folders and the environment's name are what messages are about."""


def complaint() -> str:
    """What is wrong with the settings in the environment."""
    with pytest.raises(SettingsError) as caught:
        load_settings()
    return str(caught.value)


def plain(settings: Settings) -> dict[str, str]:
    """Every setting that differs from its default, as text, secrets shown."""
    return {
        name: str(getattr(value, "get_secret_value", lambda value=value: value)())
        for name, value in settings
        if value != Settings.model_fields[name].default
    }


def test_without_any_variable_everything_has_a_default(environment: Environment) -> None:
    settings = load_settings()
    assert plain(settings) == {}
    assert settings.openai_key is None
    assert settings.openai_url is None
    assert settings.embedding_mode is EmbeddingMode.SERVER
    assert settings.use_embedding_api is False


def test_every_variable_is_read(environment: Environment) -> None:
    fields = {name.upper() for name in Settings.model_fields}
    assert fields == set(EVERY_VARIABLE), "this list has to name every setting"
    environment(**EVERY_VARIABLE)
    expected = {name.lower(): value for name, value in EVERY_VARIABLE.items()}
    expected |= {"use_embedding_api": "True", "use_vector_1536": "True"}
    assert plain(load_settings()) == expected


@pytest.mark.parametrize("blank", ["", " ", "\t", "\r\n"])
def test_a_blank_variable_counts_as_unset(environment: Environment, blank: str) -> None:
    """Compose files and CI write `OPENAI_API_KEY=` for "none"."""
    environment(**dict.fromkeys(EVERY_VARIABLE, blank), POSTGRES_URL=blank)
    assert plain(load_settings()) == {}


def test_blanks_around_a_value_are_not_part_of_it(environment: Environment) -> None:
    """A `.env` with Windows line ends, or a secret pasted with its newline."""
    environment(OPENAI_API_KEY=f" {SECRET}\r\n", USE_EMBEDDING_API="true ")
    key = load_settings().openai_key
    assert key is not None
    assert key.get_secret_value() == SECRET


def test_postgres_url_is_another_name_of_database_url(environment: Environment) -> None:
    environment(POSTGRES_URL=SECRET_URL)
    assert plain(load_settings()) == {"database_url": SECRET_URL}


@pytest.mark.parametrize("blank", ["", "  "])
def test_a_blank_database_url_does_not_hide_postgres_url(
    environment: Environment, blank: str
) -> None:
    environment(DATABASE_URL=blank, POSTGRES_URL=SECRET_URL)
    assert plain(load_settings()) == {"database_url": SECRET_URL}


def test_of_two_database_addresses_database_url_wins(environment: Environment) -> None:
    environment(DATABASE_URL="postgresql://one/a", POSTGRES_URL="postgresql://two/b")
    assert plain(load_settings()) == {"database_url": "postgresql://one/a"}


def test_the_names_for_embeddings_win_over_the_general_ones(environment: Environment) -> None:
    environment(
        OPENAI_API_KEY="general",
        EMBEDDING_OPENAI_API_KEY="for embeddings",
        OPENAI_BASE_URL="https://general.example/v1/",
        EMBEDDING_OPENAI_BASE_URL="https://embeddings.example/v1/",
    )
    settings = load_settings()
    assert settings.openai_key is not None
    assert settings.openai_key.get_secret_value() == "for embeddings"
    assert settings.openai_url == "https://embeddings.example/v1"


@pytest.mark.parametrize(
    ("variables", "asks"),
    [
        ({"USE_EMBEDDING_API": "true"}, "USE_EMBEDDING_API=true"),
        ({"EMBEDDING_MODE": "openai"}, "EMBEDDING_MODE=openai"),
        ({"EMBEDDING_MODE": "fallback"}, "EMBEDDING_MODE=fallback"),
        ({"USE_EMBEDDING_API": "true", "OPENAI_API_KEY": " "}, "USE_EMBEDDING_API=true"),
    ],
)
def test_asking_for_openai_without_a_key_names_both_variables(
    environment: Environment, variables: dict[str, str], asks: str
) -> None:
    environment(**variables)
    switch = asks.partition("=")[0]
    assert complaint() == (
        f"wrong settings:\n  {asks} asks for OpenAI, but OPENAI_API_KEY is not set; "
        f"set it (or EMBEDDING_OPENAI_API_KEY), or unset {switch}"
    )


@pytest.mark.parametrize("key", ["OPENAI_API_KEY", "EMBEDDING_OPENAI_API_KEY"])
@pytest.mark.parametrize(
    "asks", [{"USE_EMBEDDING_API": "true"}, {"EMBEDDING_MODE": "openai"}], ids=str
)
def test_either_key_will_do(environment: Environment, key: str, asks: dict[str, str]) -> None:
    environment(**asks, **{key: SECRET})
    assert load_settings().openai_key is not None


def test_a_key_that_merely_happens_to_be_set_switches_nothing_on(environment: Environment) -> None:
    environment(OPENAI_API_KEY=SECRET, EMBEDDING_OPENAI_API_KEY=SECRET)
    settings = load_settings()
    assert not settings.use_embedding_api
    assert settings.embedding_mode is EmbeddingMode.SERVER


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DATABASE_URL", "mysql://x", "must start with postgresql://"),
        ("POSTGRES_URL", "db.example", "must start with postgresql://"),
        ("DAGSTER_DATABASE_URL", "sqlite:///x", "must start with postgresql://"),
        ("OPENAI_BASE_URL", "proxy.example", "must start with http:// or https://"),
        ("EMBEDDING_OPENAI_BASE_URL", "ftp://x", "must start with http:// or https://"),
        ("EMBEDDING_SERVICE_URL", "tei:8080", "must start with http:// or https://"),
        ("EMBEDDING_MODE", "sever", "must be 'server', 'openai' or 'fallback'"),
        ("EMBEDDING_OPENAI_DIMENSIONS", "many", "must be a whole number"),
        ("EMBEDDING_OPENAI_DIMENSIONS", "0", "must be greater than or equal to 1"),
        ("USE_EMBEDDING_API", "perhaps", "must be true or false"),
        ("USE_VECTOR_1536", "perhaps", "must be true or false"),
        ("SIMILARITY_THRESHOLD", "high", "must be a number"),
        ("SIMILARITY_THRESHOLD", "1.5", "must be less than or equal to 1"),
        ("SIMILARITY_THRESHOLD", "nan", "must be "),
        ("EMBEDDING_DAILY_COST_CAP", "much", "must be a number"),
        ("EMBEDDING_DAILY_COST_CAP", "-1", "must be greater than or equal to 0"),
        ("EMBEDDING_DAILY_COST_CAP", "inf", "must be "),
        ("NIGHTLY_AT", "2:00", 'must be a time of day from "00:00" to "23:59"'),
        ("NIGHTLY_AT", "24:00", 'must be a time of day from "00:00" to "23:59"'),
        ("NIGHTLY_TIMEZONE", "Madrid", "'Madrid' is no time zone; write an IANA name such as Eur"),
        ("NIGHTLY_TIMEZONE", "CEST", "'CEST' is no time zone"),
        ("EMBEDDING_PIPELINE_ENVIRONMENT", "my laptop", "must be 1 to 63 letters, digits"),
    ],
)
def test_a_wrong_value_names_the_variable_and_what_is_expected(
    environment: Environment, name: str, value: str, message: str
) -> None:
    environment(**{name: value})
    assert complaint().startswith(f"wrong settings:\n  {name}: {message}")


def test_all_wrong_values_are_named_at_once(environment: Environment) -> None:
    environment(EMBEDDING_MODE="sever", USE_EMBEDDING_API="perhaps", OPENAI_BASE_URL="x")
    lines = complaint().splitlines()
    assert [line.partition(":")[0].strip() for line in lines[1:]] == [
        "OPENAI_BASE_URL",
        "EMBEDDING_MODE",
        "USE_EMBEDDING_API",
    ]


@pytest.mark.parametrize("name", sorted(set(EVERY_VARIABLE) - NOT_SECRET))
def test_a_secret_in_the_wrong_variable_is_not_shown(environment: Environment, name: str) -> None:
    """Keys are pasted into the wrong line, and the error goes to a log."""
    environment(**{name: SECRET})
    try:
        shown = repr(load_settings())
    except SettingsError as error:
        shown = str(error)
    assert SECRET not in shown


PASSWORD = "pass-WORD"
UNREADABLE_PASSWORDS = [f"{sign}{PASSWORD}" for sign in ("a@", "a/", "a#", "a?", "a%", "a b%20")]
READABLE_URLS = [
    "postgresql://",
    "postgresql:///app?user=me&password=a@b",
    "postgresql://me@/app?host=/tmp",
    "postgresql://me:a%40%2f%20b@[::1]:5432/app",
    "postgres://me:a[b&c=d@one.example:5432,two.example/app?target_session_attrs=any",
    "postgresql://%2Fvar%2Frun/app",
]


@pytest.mark.parametrize("name", ["DATABASE_URL", "DAGSTER_DATABASE_URL"])
@pytest.mark.parametrize("password", UNREADABLE_PASSWORDS)
def test_a_password_that_must_be_percent_encoded_is_not_shown(
    environment: Environment, name: str, password: str
) -> None:
    """`p@ss` was looked up as a host called `ss@db.example`, and libpq quoted `100%secure` whole:
    both errors went to a log."""
    environment(**{name: f"postgresql://app:{password}@db.example:5432/app"})
    said = complaint()
    assert said.startswith(f"wrong settings:\n  {name}: cannot be read as an address")
    assert "@ is %40" in said
    assert PASSWORD not in said


@pytest.mark.parametrize("url", READABLE_URLS)
def test_what_an_address_of_postgres_may_look_like(environment: Environment, url: str) -> None:
    environment(DATABASE_URL=url)
    given = load_settings().database_url
    assert given is not None
    assert given.get_secret_value() == url


@pytest.mark.parametrize(
    "url",
    [
        *(f"postgresql://app:{password}@127.0.0.1:1/app" for password in UNREADABLE_PASSWORDS),
        f"postgresql://app:{PASSWORD}@127.0.0.1:1/app?ssl_mode=require",
        f"postgresql://app@127.0.0.1:1/app?{PASSWORD}",
    ],
)
def test_no_password_in_what_a_connection_says(url: str) -> None:
    """The same where the address does not come from the settings."""
    with pytest.raises(PipelineError) as caught, connect(url):
        pass
    shown = "".join(traceback.format_exception(caught.value))
    assert "DATABASE_URL" in shown
    assert PASSWORD not in shown


def test_no_secret_in_the_text_of_the_settings(environment: Environment) -> None:
    environment(
        **EVERY_VARIABLE
        | {
            "OPENAI_BASE_URL": f"https://user:{SECRET}@proxy.example/v1",
            "EMBEDDING_SERVICE_URL": f"https://user:{SECRET}@tei.example",
            "EMBEDDING_OPENAI_BASE_URL": f"https://user:{SECRET}@embeddings.example",
        }
    )
    settings = load_settings()
    for shown in (repr(settings), str(settings), f"{settings.openai_key}", f"{settings!r:.9999}"):
        assert SECRET not in shown


def test_dotenv_fills_in_what_the_environment_does_not_say(
    environment: Environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(
        "EMBEDDING_MODEL=from the file\r\n"
        "EMBEDDING_PIPELINE_ENVIRONMENT=file\r\n"
        "OPENAI_API_KEY=\r\n"
    )
    environment(EMBEDDING_PIPELINE_ENVIRONMENT="environment")
    monkeypatch.setenv("EMBEDDING_MODEL", "")  # so that it is put back
    monkeypatch.delenv("EMBEDDING_MODEL")
    settings = load_settings()
    assert settings.embedding_model == "from the file"
    assert settings.embedding_pipeline_environment == "environment"
    assert settings.openai_api_key is None
    assert os.environ["EMBEDDING_MODEL"] == "from the file", "child processes have to see it"


def test_a_dotenv_that_is_not_utf8_is_named(environment: Environment, tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"EMBEDDING_MODEL=\xff\xfe\n")
    assert complaint() == f"{tmp_path / '.env'}: not UTF-8 text; save the file as UTF-8"


def test_folders_are_absolute(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    environment(EMBEDDING_PIPELINE_HOME="~/data", EMBEDDING_PIPELINE_DEFS="tables")
    settings = load_settings()
    assert settings.embedding_pipeline_home == Path("/home/somebody/data")
    assert settings.embedding_pipeline_defs == Path.cwd() / "tables"
