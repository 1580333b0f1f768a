"""Identity, names and their encodings."""

import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from embedding_pipeline.spec import (
    EmbeddingSpec,
    QualifiedName,
    dagster_name,
    short_name,
    undagster_name,
)
from embedding_pipeline_tests.tables import MODEL_384, spec

# what a Postgres name may hold: any text without NUL
names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1)
# made of what escapes are made of, where an encoding would go wrong first
tricky_names = st.text(st.sampled_from("_x25eaA.é\U0001f600"), min_size=1)


def embedding(**changes: Any) -> EmbeddingSpec:
    values = {"column": "e", "dimensions": 384, "provider": "tei", "model": MODEL_384}
    return EmbeddingSpec.model_validate(values | changes)


class TestIdentity:
    """What a column's vectors depend on, and nothing else."""

    def test_the_recipe_is_what_it_always_was(self) -> None:
        """It is hashed into every stored fingerprint: another text here, and everybody's rows are
        pending and paid for again. Raise RECIPE_VERSION only when vectors really differ."""
        assert embedding().recipe == (
            '{"dimensions":384,"model":"sentence-transformers/all-MiniLM-L6-v2",'
            '"overlong":"truncate","prefix":"","recipe":1}'
        )
        assert embedding(prefix='é "q"\n', overlong="quarantine").recipe == (
            '{"dimensions":384,"model":"sentence-transformers/all-MiniLM-L6-v2",'
            '"overlong":"quarantine","prefix":"\\u00e9 \\"q\\"\\n","recipe":1}'
        )

    @pytest.mark.parametrize(
        "change",
        [
            {"column": "other"},
            {"provider": "local"},
            {"baseline": "other"},
            {"reuse": True},
            {"mrr_floor": 0.7},
            {"baseline_ratio": 0.5},
            {"recall_floor": 0.5},
            {"max_pending_minutes": 5},
            {"max_quarantined_share": 0.5},
            {"batch_size": 7},
            {"concurrency": 1},
            {"max_cost": 1.0},
        ],
        ids=str,
    )
    def test_what_does_not_change_vectors_does_not_change_the_recipe(
        self, change: dict[str, Any]
    ) -> None:
        assert embedding(**change).recipe == embedding().recipe

    @pytest.mark.parametrize(
        "change",
        [
            {"model": "other"},
            {"model": "other", "dimensions": 385},
            {"prefix": "passage: "},
            {"prefix": "passage:"},
            {"overlong": "quarantine"},
        ],
        ids=str,
    )
    def test_what_changes_vectors_changes_the_recipe(self, change: dict[str, Any]) -> None:
        recipes = {embedding(**change).recipe, embedding().recipe, embedding(model="other").recipe}
        assert len(recipes) == (2 if change == {"model": "other"} else 3)

    def test_every_setting_is_either_part_of_the_recipe_or_not(self) -> None:
        """A new setting has to be put into one of the two tests above."""
        assert set(EmbeddingSpec.model_fields) == {
            "column", "provider", "baseline", "reuse", "mrr_floor", "baseline_ratio",
            "recall_floor", "max_pending_minutes", "max_quarantined_share", "max_cost",
            "batch_size", "concurrency", "model", "dimensions", "prefix", "overlong",
        }  # fmt: skip

    @given(names, names)
    def test_the_recipe_is_one_plain_line_and_tells_all_prefixes_apart(
        self, one: str, other: str
    ) -> None:
        recipe = embedding(prefix=one).recipe
        assert recipe.isascii()
        assert recipe.isprintable()
        assert (recipe == embedding(prefix=other).recipe) == (one == other)

    def test_blanks_around_a_model_are_no_other_model(self) -> None:
        assert embedding(model=f" {MODEL_384}\n").recipe == embedding().recipe


class TestDagsterNames:
    """`dagster_name` and back."""

    @pytest.mark.parametrize(
        ("name", "encoded"),
        [
            ("knowledge_chunks", "knowledge_chunks"),
            ("a_xylophone_b", "a_xylophone_b"),
            ("Docs2", "Docs2"),
            ("a.b", "a_x2e_b"),
            ("a_x2e_b", "a_x5f_x2e_b"),
            ("Ta ble", "Ta_x20_ble"),
            ("input", "_x69_nput"),
            ("_x69_nput", "_x5f_x69_nput"),
            ("año", "a_xf1_o"),
        ],
    )
    def test_what_names_become(self, name: str, encoded: str) -> None:
        assert dagster_name(name) == encoded
        assert undagster_name(encoded) == name

    @given(names | tricky_names)
    @example("_x2.")
    @example("_x5_x5_")
    @example("_x5f_x2e_")
    @example("_x.")
    @example("_x_")
    def test_every_name_comes_back(self, name: str) -> None:
        encoded = dagster_name(name)
        assert re.fullmatch(r"[A-Za-z0-9_]+", encoded)
        assert undagster_name(encoded) == name

    @given(tricky_names, tricky_names)
    def test_different_names_stay_different(self, one: str, other: str) -> None:
        assert (dagster_name(one) == dagster_name(other)) == (one == other)


class TestShortNames:
    """`short_name`"""

    def test_a_name_that_fits_is_left_alone(self) -> None:
        assert short_name("docs", "embedding_384", "pending") == "docs_embedding_384_pending"
        assert short_name("x" * 55, "pending") == "x" * 55 + "_pending"

    def test_a_name_that_does_not_fit_keeps_its_ends_readable(self) -> None:
        """Cut by Postgres, the fingerprint column's name once was the vector column's own."""
        column = "embedding_of_the_description_of_the_product_by_a_model_of_1536"
        name = short_name(column, "fingerprint")
        assert name == "embedding_of_the_description_of_the_prod_fingerprint_39097e67e0"
        assert name != column

    @given(st.lists(names | st.text("é", min_size=20, max_size=80), min_size=1, max_size=4))
    def test_every_name_fits(self, parts: list[str]) -> None:
        name = short_name(*parts)
        assert len(name.encode()) <= 63
        assert "\0" not in name

    @given(
        st.text("aé_", min_size=40, max_size=80),
        st.text("aé_", min_size=40, max_size=80),
        st.sampled_from(["pending", "hnsw", "fingerprint"]),
    )
    def test_different_names_stay_different(self, one: str, other: str, last: str) -> None:
        assert (short_name(one, last) == short_name(other, last)) == (one == other)

    @given(st.text("aé", min_size=30, max_size=62))
    def test_a_fingerprint_column_is_never_its_vector_column(self, column: str) -> None:
        if len(column.encode()) <= 63:
            assert embedding(column=column).fingerprint_column != column


class TestQualifiedNames:
    """`QualifiedName`"""

    @pytest.mark.parametrize(
        ("text", "schema", "name"),
        [
            ("docs", None, "docs"),
            ("Docs", None, "Docs"),
            ("my table", None, "my table"),
            ("select", None, "select"),
            ("sales.docs", "sales", "docs"),
            ('"a.b"', None, "a.b"),
            ('sales."a.b"', "sales", "a.b"),
            ('"the ""best"""."Docs"', 'the "best"', "Docs"),
            ('" docs"', None, " docs"),
            ("a,b", None, "a,b"),
        ],
    )
    def test_what_is_read(self, text: str, schema: str | None, name: str) -> None:
        assert QualifiedName.parse(text) == QualifiedName(schema, name)
        assert spec(text).qualified == QualifiedName(schema, name)

    @pytest.mark.parametrize(
        "text",
        ["", " ", ".", "a.", ".a", "a.b.c", "a..b", '"a', 'a"', 'a"b', '""', '"a"b', " a", "a ",
         "a .b", "a. b", '"a" ."b"', '"a""', "a\n"],
    )  # fmt: skip
    def test_what_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="is not a table name"):
            QualifiedName.parse(text)

    def test_names_that_postgres_cannot_hold_are_refused(self) -> None:
        assert QualifiedName.parse("é" * 31).name == "é" * 31
        with pytest.raises(ValueError, match="longer than 63 bytes"):
            QualifiedName.parse("é" * 32)
        with pytest.raises(ValueError, match="NUL"):
            QualifiedName.parse('"a\0"')

    parts = st.text(
        st.characters(exclude_categories=["Cs"], exclude_characters="\0")
        | st.sampled_from('". \n'),
        min_size=1,
        max_size=15,
    )

    @given(st.none() | parts, parts)
    def test_every_name_comes_back(self, schema: str | None, name: str) -> None:
        qualified = QualifiedName(schema, name)
        assert QualifiedName.parse(str(qualified)) == qualified

    @given(st.text(st.sampled_from('ab". é\n'), max_size=8))
    def test_text_is_either_refused_or_means_one_table(self, text: str) -> None:
        try:
            qualified = QualifiedName.parse(text)
        except ValueError:
            return
        assert QualifiedName.parse(str(qualified)) == qualified


def test_an_embedding_column_is_found_by_name() -> None:
    table = spec()
    assert table.embedding("embedding_4") is table.embeddings[0]
    with pytest.raises(KeyError, match="docs has no embedding column 'x'; it has embedding_4"):
        table.embedding("x")


def test_the_key_is_a_list_of_columns() -> None:
    assert spec().key_columns == ["id"]
    assert spec(id_column=["a", "b"]).key_columns == ["a", "b"]
