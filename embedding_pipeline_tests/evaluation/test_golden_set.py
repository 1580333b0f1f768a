from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_pipeline.errors import SpecError
from embedding_pipeline.evaluation.golden_set import GoldenQuery, GoldenSet, load_golden_set
from embedding_pipeline.spec import TableSpec
from embedding_pipeline.spec_files import DEFS_FOLDER

Write = Callable[..., Path]


def table(**changes: object) -> TableSpec:
    values: dict[str, object] = {
        "table": "docs",
        "text": "body",
        "embeddings": [{"column": "v", "dimensions": 3, "provider": "tei", "model": "m"}],
    }
    return TableSpec.model_validate(values | changes)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(*lines: str | bytes) -> Path:
        path = tmp_path / "golden_set.jsonl"
        raw = [line if isinstance(line, bytes) else line.encode() for line in lines]
        path.write_bytes(b"\n".join(raw))
        return path

    return to_file


def test_reads_scalar_keys_composite_keys_and_tenants(write: Write) -> None:
    path = write('{"query": "a b", "expected": [7, "x"]}', "", '{"query":"c","expected":[[9]]}\r')
    golden = load_golden_set(path)
    assert golden.queries == (GoldenQuery("a b", ((7,), ("x",))), GoldenQuery("c", ((9,),)))
    assert [query.line for query in golden.queries] == [1, 3]

    path = write('{"query": "a", "expected": [["de", 7], ["fr", 8]], "tenant": "acme"}')
    both = table(id_column=["lang", "n"], tenant_column="who")
    assert load_golden_set(path, both).queries == (
        GoldenQuery("a", (("de", 7), ("fr", 8)), "acme"),
    )


def test_the_same_query_may_stand_once_for_each_tenant(write: Write) -> None:
    path = write(
        '{"query": "a", "expected": [1]}',
        '{"query": "a", "expected": [1], "tenant": "x"}',
        '{"query": "a", "expected": [1], "tenant": "y"}',
    )
    assert len(load_golden_set(path)) == 3


def test_fractions_and_line_separators_survive(write: Write) -> None:
    golden = load_golden_set(write('{"query": "a\u2028b", "expected": [1.10]}'))
    assert golden.queries == (GoldenQuery("a\u2028b", (("1.10",),)),)


WRONG = [
    ("{", "is not JSON"),
    ("[1]", "is not a JSON object"),
    ("[" * 100_000, "nested too deeply"),
    (b'{"query": "\xff", "expected": [1]}', "is not UTF-8"),
    ('{"query": "a", "expected": [NaN]}', "NaN is not JSON"),
    ('{"query": "a", "expected": [1], "weight": 2}', "unknown field 'weight'"),
    ('{"query": "a", "query": "b", "expected": [1]}', "'query' stands there twice"),
    ('{"expected": [1]}', '"query" is missing'),
    ('{"query": 5, "expected": [1]}', '"query" is 5'),
    ('{"query": " \\t", "expected": [1]}', '"query" is empty'),
    ('{"query": "a\\u0000", "expected": [1]}', '"query" holds a NUL'),
    ('{"query": "a\\ud83d", "expected": [1]}', "half a surrogate pair"),
    ('{"query": "a"}', '"expected" must list'),
    ('{"query": "a", "expected": []}', '"expected" must list'),
    ('{"query": "a", "expected": 7}', '"expected" must list'),
    ('{"query": "a", "expected": [null]}', "has null for a key"),
    ('{"query": "a", "expected": [{"id": 1}]}', 'has {"id":1} for a key'),
    ('{"query": "a", "expected": [[1, [2]]]}', "has [2] for a key"),
    ('{"query": "a", "expected": ["\\u0000"]}', '"expected" holds a NUL'),
    ('{"query": "a", "expected": [1, 1]}', "names a key twice"),
    ('{"query": "a", "expected": [[]]}', "has 0 parts"),
    ('{"query": "a", "expected": [1, [2, 3]]}', "has 2 parts, the table's key has 1"),
    ('{"query": "a", "expected": [1], "tenant": 5}', '"tenant" is 5'),
    ('{"query": "a", "expected": [1], "tenant": ""}', '"tenant" is empty'),
    ('{"query": "first", "expected": [2]}', "the query is already on line 1"),
]


@pytest.mark.parametrize(("line", "problem"), WRONG, ids=[problem for _, problem in WRONG])
def test_a_mistake_names_file_line_and_remedy(
    write: Write, line: str | bytes, problem: str
) -> None:
    path = write('{"query": "first", "expected": [1]}', line)
    with pytest.raises(SpecError) as caught:
        load_golden_set(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert problem in message


def test_the_tables_key_decides_the_parts(write: Write) -> None:
    path = write('{"query": "a", "expected": ["de", 7]}')
    with pytest.raises(SpecError, match=r'has 1 part, .* has 2 \(lang, n\); .* \[\["a","b"\]\]'):
        load_golden_set(path, table(id_column=["lang", "n"]))


def test_a_tenant_needs_a_tenant_column(write: Write) -> None:
    path = write('{"query": "a", "expected": [1], "tenant": "x"}')
    with pytest.raises(SpecError, match="has no tenant_column"):
        load_golden_set(path, table())


def test_an_absent_and_an_empty_file_are_mistakes_too(write: Write, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"none\.jsonl: cannot read the golden set"):
        load_golden_set(tmp_path / "none.jsonl")
    with pytest.raises(SpecError, match="is empty; write at least one line"):
        load_golden_set(write("", "  "))


def test_the_shipped_golden_sets_load() -> None:
    found = sorted(DEFS_FOLDER.glob("*/golden_set.jsonl"))
    assert len(found) >= 4
    for path in found:
        assert len(load_golden_set(path)) >= 30


KEYS = st.tuples(st.integers() | st.text(st.characters(codec="utf-8", exclude_characters="\0")))
QUERIES = st.builds(
    GoldenQuery,
    st.text(min_size=1),
    st.lists(KEYS, min_size=1, unique=True).map(tuple),
    st.none() | st.text(min_size=1),
)


@given(st.lists(QUERIES, min_size=1, unique=True), st.randoms())
def test_the_hash_knows_content_but_not_order(queries: list[GoldenQuery], random: Random) -> None:
    same = [
        GoldenQuery(q.query, tuple(random.sample(q.expected, len(q.expected))), q.tenant, line)
        for line, q in enumerate(queries)
    ]
    random.shuffle(same)
    assert GoldenSet(tuple(queries)).hash == GoldenSet(tuple(same)).hash
    fewer = GoldenSet(tuple(queries[1:]))
    assert GoldenSet(tuple(queries)).hash != fewer.hash


def test_the_hash_tells_a_number_from_a_string() -> None:
    number, string = (GoldenSet((GoldenQuery("a", ((key,),)),)) for key in (7, "7"))
    assert number.hash != string.hash
