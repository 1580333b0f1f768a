"""Texts and keys that nobody thought of, in one table: none breaks a batch."""

from typing import Any

import psycopg
import pytest

from embedding_pipeline.embed_column import forecast
from embedding_pipeline_tests.faults.runs import Pipeline, provider
from embedding_pipeline_tests.faults.server import FaultServer, RawBody, Status
from embedding_pipeline_tests.faults.truth import assert_exact
from embedding_pipeline_tests.tables import embedding, spec

MEGABYTE = 1024 * 1024

REFUSED = {
    "it's a key": "refused, for its key has a quote",
    'a "key"': "refused, for its key has double quotes",
    "back\\slash": "refused, for its key has a backslash",
    "{1,2}": "refused, for its key looks like an array",
    "\n\t": "refused, for its key is blank",
}
EMBEDDED = {
    "": "the key is empty",
    "ключ 😀": "the key is not ASCII",
    "k" * 1000: "the key is long",
    "'; DROP TABLE odd; --": "the key is SQL",
    "emoji": "😀🏳️‍🌈👩‍👩‍👧‍👦" * 5,
    "right-to-left": "שלום עולם \u202eمرحبا\u202c",
    "sql": "'; DROP TABLE odd; SELECT $1, %s, %(a)s, {}, :name --",
    "control": "\x01\x02\x1b[31mred\x7f\r",
    "json": '{"a": "\\u0000 \\ud800", "b": [1]}',
    "combining": "e\u0301" + "\u0300" * 20,
    "same": "the key is empty",
}
INELIGIBLE = {"spaces": "   ", "wide": "\u3000\u00a0\t\n", "none": None, "nothing": ""}
LONG = {
    "2 MB": "palabra " * (2 * MEGABYTE // 8),
    "2 MB, one word": "x" * (2 * MEGABYTE),
    "2 MB of emoji": "😀" * (MEGABYTE // 2),
}


@pytest.mark.parametrize("dialect", ["tei", "openai"])
def test_hostile_rows(
    pipeline: Pipeline, connection: "psycopg.Connection[Any]", server: FaultServer, dialect: str
) -> None:
    """One empty text blocked every later run of one tool, a 2 MB text that of another; a provider's
    error with a NUL in it could not be stored, so that the row was never put aside and its batch
    was sent, and failed, every night."""
    connection.execute("CREATE TABLE odd (key text PRIMARY KEY, part text, body text)")
    parts = ["a", "", "it's", 'qu"oted', "a,b", "x\ny", "%41", "[0...3]", None]
    neighbours = {f"neighbour {i}": f"an ordinary text {i}" for i in range(100)}
    rows = [*(REFUSED | EMBEDDED | INELIGIBLE | LONG | neighbours).items()]
    connection.cursor().executemany(
        "INSERT INTO odd VALUES ($1::text, $2::text, $3::text)",
        [(key, parts[i % len(parts)], body) for i, (key, body) in enumerate(rows)],
    )
    pipeline.declare(
        faulty=provider(server, dialect, max_tokens_per_input=500, timeout_seconds=30.0)
    )
    column = pipeline.column(
        spec(
            "odd",
            id_column="key",
            partitions={"by": "column", "column": "part"},
            embeddings=[
                embedding(
                    "vector_8", 8, provider="faulty", model=server.model, max_quarantined_share=0.5
                )
            ],
        )
    )
    words = b'"refused \\u0000 because \\ud800 of \\n\\u001b its text"'
    error = (
        b'{"error": ' + words + b"}"
        if dialect == "tei"
        else (b'{"error": {"message": ' + words + b', "code": null}}')
    )
    server.poison = {body: Status(400, body=error) for body in REFUSED.values()}
    server.script(RawBody(b'["\\ud800\\u0000"]'), RawBody(b"\x00\xff"))

    assert forecast(pipeline.url, column).rows == len(rows) - len(INELIGIBLE)
    run = pipeline.run(column)

    total = run.outcome.total
    assert run.remaining == {}
    assert total.quarantined == len(REFUSED)
    assert total.truncated == len(LONG)
    assert total.embedded == len(EMBEDDED) - 1 + len(LONG) + len(neighbours)
    assert total.reused == 1  # the same text twice
    sent = {
        body: next(
            text for text in server.count.texts if len(text) > 100 and body[:60] == text[:60]
        )
        for body in LONG.values()
    }
    assert all(body.startswith(text) for body, text in sent.items())
    stored = connection.execute("SELECT error FROM embedding_pipeline.quarantined_row").fetchall()
    assert {text for (text,) in stored} == {"400: refused because of its text"}
    assert_exact(connection, column, refused=set(REFUSED.values()), sent_as=sent)
