"""The port: what the rest of the project knows of an embedding provider."""

from base64 import b64encode
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias
from urllib.parse import unquote, urlsplit, urlunsplit

from pydantic import SecretStr

if TYPE_CHECKING:
    import numpy as np  # endpoints are read where nothing is embedded, at each process's start

Dialect = Literal["tei", "openai"]
Overlong = Literal["truncate", "quarantine"]
Vectors: TypeAlias = "np.ndarray[tuple[int, int], np.dtype[np.float32]]"


@dataclass(frozen=True)
class Endpoint:
    """One named provider: where it is, how it is spoken to, and what it can take.

    An empty `base_url` stands for the local model server, which is started when an embedder of
    this endpoint starts. For TEI the limits are ceilings: what `/info` says is lower wins.
    """

    name: str
    dialect: Dialect
    base_url: str = field(repr=False)
    api_key: SecretStr | None = None
    max_inputs: int = 2048
    max_tokens_per_input: int = 8192
    max_tokens_per_request: int = 300_000
    max_bytes_per_request: int = 8_000_000
    price_per_million_tokens: dict[str, float] = field(default_factory=dict)
    """US dollars by model."""
    daily_cost_cap: float | None = None
    """US dollars that all runs together spend here in a day, at most."""
    concurrency: int = 32
    """Most requests in flight; the limiter finds out how many of them pay."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    model_aliases: dict[str, list[str]] = field(default_factory=dict)
    """Names that `/info` or a response may use for a model, by the model's name in the YAML."""
    timeout_seconds: float = 60.0
    """For one request, whole."""
    give_up_after_seconds: float = 300.0
    """From a request's first failure to the end of its retries."""
    unusable: str | None = None
    """Why it cannot be used here (an unset variable), told to whoever starts an embedder."""

    @property
    def address(self) -> str:
        """`base_url` as it may be shown: without the credentials that a URL can hold."""
        return shown(self.base_url)

    @property
    def asked_at(self) -> str:
        """`base_url` as requests are sent to it: a client logs the address that it is given, so
        user and password go into a header."""
        try:
            parts = urlsplit(self.base_url)
        except ValueError:
            return self.base_url  # refused as no address by whoever connects
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))

    @property
    def authorization(self) -> str:
        """The header of that name: the key, or the address's user and password; may be empty."""
        if self.key:
            return f"Bearer {self.key}"
        user = self._user_and_password
        return f"Basic {b64encode(user.encode()).decode()}" if user else ""

    @property
    def has_two_credentials(self) -> bool:
        """A key, and user and password in the address: a request can carry one of them only."""
        return bool(self.key and self._user_and_password)

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not be shown of this endpoint, whoever quotes it."""
        user = self._user_and_password
        password = user.partition(":")[2] or user
        token = self.authorization.partition(" ")[2]
        return tuple(dict.fromkeys(each for each in (self.key, token, password) if each))

    @property
    def _user_and_password(self) -> str:
        try:
            return unquote(urlsplit(self.base_url).netloc.rpartition("@")[0])
        except ValueError:
            return ""

    @property
    def key(self) -> str:
        """The key, empty where there is none; a line end from a secret file is not part of it."""
        return self.api_key.get_secret_value().strip() if self.api_key else ""

    def counted_as(self, model: str) -> str:
        """The name under which requests and tokens a minute are counted.

        OpenAI limits each model apart (its rate-limit guide: "rate limits vary by the model"); what
        else speaks its dialect is a gateway to several models. A TEI server has one.
        """
        return f"{self.name}/{model}" if self.dialect == "openai" else self.name

    def names_of(self, model: str) -> set[str]:
        """The model's name and its aliases, case folded."""
        return {name.casefold() for name in (model, *self.model_aliases.get(model, []))}


@dataclass
class EmbedResult:
    """What one `embed` call brought back; row i belongs to text i."""

    vectors: Vectors
    """float32 (n, dimensions); rows that are not `done` are NaN, which pgvector refuses."""
    done: "np.ndarray[tuple[int], np.dtype[np.bool_]]"
    """bool (n,): True where `vectors` holds the text's vector."""
    refused: dict[int, str] = field(default_factory=dict)
    """Index of an input that the provider (or we, before sending) refuses -> the words."""
    truncated: list[int] = field(default_factory=list)
    """Indexes of inputs that were cut to the model's length, in order."""
    tokens: int = 0
    """As the provider counts them; our estimate where it says nothing."""
    requests: int = 0
    """HTTP requests sent, failed ones included; not the one for `/info`."""
    throttled: int = 0
    """Of those, answered 429."""
    retried: int = 0
    """Of those, repeats of a request that had failed."""


def shown(url: str) -> str:
    """A URL without user, password, query and fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "something that is not an address"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


MayRepeat = Callable[[int], Awaitable[bool]]


class Embedder(Protocol):
    """Turns texts into one model's vectors."""

    endpoint: Endpoint
    model: str
    dimensions: int

    async def start(self) -> None:
        """Connect, make sure that the endpoint serves `model`, read its limits.

        Raises GlobalError when it is another model, TransientError when it cannot be reached.
        """
        ...

    async def embed(
        self, texts: Sequence[str], *, retry: bool = True, may_repeat: MayRepeat | None = None
    ) -> EmbedResult:
        """Embed any number of texts, packed into requests within the endpoint's limits.

        `may_repeat` is asked after a request that brought no usable answer and was perhaps billed
        all the same (a timeout, a reset, half a response), with the most tokens that it may have
        counted. False ends the call with that request's error.

        Texts that the provider refuses are in `refused`. Raises TransientError when retrying
        (off with `retry=False`) did not help and GlobalError when it cannot; both carry what
        was finished in `partial`.
        """
        ...

    async def aclose(self) -> None:
        """Close the connections; the embedder may be started again."""
        ...

    def estimate_tokens(self, text: str) -> int:
        """Tokens of this text, prefix included, after the cut to the model's length."""
        ...

    def most_tokens(self, text: str) -> int:
        """What the provider can count at most for this text: for caps, at no cost to work out."""
        ...

    def cost(self, tokens: int) -> float:
        """US dollars for so many tokens; 0 where the endpoint has no price for the model."""
        ...
