"""What a newcomer reads: everything that the UI lists explains itself."""

import re
from collections.abc import Iterator

import dagster as dg
import pytest

from embedding_pipeline.components import descriptions
from embedding_pipeline.definitions import defs
from embedding_pipeline_tests.tables import embedding, spec

WORDS = 20
"""A sentence or two: what it is and what happens on a click."""


REPOSITORY = defs().get_repository_def()
GRAPH = REPOSITORY.asset_graph
ASSETS = sorted(GRAPH.get_all_asset_keys())


def described() -> Iterator[tuple[str, str | None]]:
    """Everything in the definitions that has a page of its own, with what it says there."""
    for key in ASSETS:
        yield f"asset {key.to_user_string()}", GRAPH.get(key).description
        for check in sorted(GRAPH.get_check_keys_for_assets({key})):
            yield f"check {check.to_user_string()}", GRAPH.get_check_spec(check).description
    for sensor in REPOSITORY.sensor_defs:
        yield f"sensor {sensor.name}", sensor.description
    for schedule in REPOSITORY.schedule_defs:
        yield f"schedule {schedule.name}", schedule.description
    for job in REPOSITORY.get_all_jobs():
        if not job.name.startswith("__"):
            yield f"job {job.name}", job.description


DESCRIBED = dict(described())


def test_all_kinds_are_looked_at() -> None:
    kinds = {name.split()[0] for name in DESCRIBED}
    assert {"asset", "check", "sensor", "job"} <= kinds
    assert sum(name.startswith("check") for name in DESCRIBED) == 32
    assert sum(name.startswith("asset") for name in DESCRIBED) == 24


@pytest.mark.parametrize("name", DESCRIBED)
def test_everything_says_what_it_is(name: str) -> None:
    words = re.findall(r"\w{2,}", DESCRIBED[name] or "")
    assert len(words) >= WORDS, DESCRIBED[name]


@pytest.mark.parametrize("key", ASSETS, ids=dg.AssetKey.to_user_string)
def test_every_asset_has_an_owner_a_kind_and_its_table(key: dg.AssetKey) -> None:
    node = GRAPH.get(key)
    assert node.owners == ["team:search"]
    assert "postgres" in node.kinds
    assert node.group_name == key.path[0]
    assert node.metadata["dagster/table_name"] == key.path[0]
    labels = [item.label for item in node.metadata["dagster/code_references"].code_references]
    assert "README.md" in labels


def test_another_recipe_is_another_code_version() -> None:
    versions = {
        key.path[1]: GRAPH.get(key).code_version
        for key in ASSETS
        if len(key.path) == 2 and key.path[1] in ("embedding_384", "embedding_1536")
    }
    assert None not in versions.values()
    assert len(set(versions.values())) == 2


@pytest.mark.parametrize(
    ("partitions", "words"),
    [
        ({"by": "hash", "buckets": 5}, "5 buckets"),
        ({"by": "column", "column": "tenant"}, "a value of `tenant` each"),
        ({"by": "month", "column": "created_at"}, "a month of `created_at` (UTC) each"),
    ],
)
def test_a_column_says_what_its_partitions_are(partitions: object, words: str) -> None:
    table = spec(partitions=partitions, text="title || `x`\n|| body", eligible="length(body) > 3")
    text = descriptions.embedding_description(table, table.embeddings[0])
    assert words in text
    assert "made of `title || 'x' || body`, where `length(body) > 3`" in text
    assert "`test-model-4`" in text


def test_the_owners_own_words_come_first() -> None:
    table = spec(description="What customers asked.", embeddings=[embedding("a"), embedding("b")])
    text = descriptions.source_description(table)
    assert text.startswith("What customers asked.\n\n")
    assert "(`a`, `b`)" in text


def test_without_a_golden_set_the_way_to_one_is_shown() -> None:
    assert "`golden_set:`" in descriptions.quality_description(spec())
