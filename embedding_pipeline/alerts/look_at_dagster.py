"""Facts from Dagster's instance: results of checks, failed runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import dagster as dg
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationPlanned,
)
from dagster._core.events import JobFailureData
from dagster._core.storage.asset_check_execution_record import (
    AssetCheckExecutionRecord,
    AssetCheckExecutionRecordStatus,
)

from embedding_pipeline.alerts.facts import CheckFacts, ColumnFacts, FailedRun
from embedding_pipeline.components import names
from embedding_pipeline.components.assets import LEASE_HELD
from embedding_pipeline.spec import EmbeddingSpec, TableSpec

CHECKS = ("golden_mrr", "vectors_valid", "index_recall")
"""`coverage` is judged anew from the database at each tick."""
HISTORY = 20
"""How many results of a check are looked at for the latest that was a judgement."""
MOST_RUNS = 200
MARKED = "marked as failed from outside"
"""Part of what Dagster says of a run that somebody else failed and gave no reason for."""
JUDGED = {AssetCheckExecutionRecordStatus.SUCCEEDED, AssetCheckExecutionRecordStatus.FAILED}


# ---- checks -----------------------------------------------------------------------------------


def look_at_checks(instance: dg.DagsterInstance, tables: Sequence[TableSpec]) -> list[CheckFacts]:
    """The latest judgement of every check of every column."""
    keys = {
        dg.AssetCheckKey(names.column_key(table, embedding), check): (table, embedding)
        for table in tables
        for embedding in table.embeddings
        for check in CHECKS
    }
    storage = instance.event_log_storage
    latest = storage.get_latest_asset_check_execution_by_key(list(keys))
    found = []
    for key, (table, embedding) in keys.items():
        record = latest.get(key)
        if record is not None and not _is_judgement(record):
            history = storage.get_asset_check_execution_history(key, HISTORY, status=JUDGED)
            found.append(_check_facts(table, embedding, key, history))
        else:
            found.append(_check_facts(table, embedding, key, [record] if record else []))
    return found


def _check_facts(
    table: TableSpec,
    embedding: EmbeddingSpec,
    key: dg.AssetCheckKey,
    history: Sequence[AssetCheckExecutionRecord],
) -> CheckFacts:
    base = CheckFacts(
        table.table, embedding.column, "/".join(key.asset_key.path), key.name, known=False
    )
    unjudged = _unjudged(history[0]) if history else None
    judgement = next((record for record in history if _is_judgement(record)), None)
    if judgement is None:
        return replace(base, unjudged=unjudged)
    evaluation = _evaluation(judgement)
    assert evaluation is not None
    return replace(
        base,
        known=True,
        failed=not evaluation.passed and evaluation.severity is dg.AssetCheckSeverity.ERROR,
        summary=evaluation.description or "",
        metadata={name: value.value for name, value in evaluation.metadata.items()},
        run_id=judgement.run_id,
        at=datetime.fromtimestamp(judgement.create_timestamp, UTC),
        unjudged=unjudged,
    )


def _evaluation(record: AssetCheckExecutionRecord) -> dg.AssetCheckEvaluation | None:
    if record.status not in JUDGED or record.event is None or record.event.dagster_event is None:
        return None
    return record.event.dagster_event.asset_check_evaluation_data


def _is_judgement(record: AssetCheckExecutionRecord) -> bool:
    evaluation = _evaluation(record)
    if evaluation is None:
        return False
    evaluated = evaluation.metadata.get("evaluated")
    return evaluated is None or bool(evaluated.value)


def _unjudged(record: AssetCheckExecutionRecord) -> str | None:
    """Why a check that could not judge will not be able to by itself: its golden set is gone."""
    # numpy and the metrics: only a tick needs them, loading the definitions does not
    from embedding_pipeline.evaluation.verdict import MIN_SCORED_SHARE

    evaluation = _evaluation(record)
    if evaluation is None or _is_judgement(record):
        return None
    figures = {name: value.value for name, value in evaluation.metadata.items()}
    queries, missing = figures.get("queries"), figures.get("missing_expected")
    if not isinstance(queries, int) or not isinstance(missing, int):
        return None
    if queries and queries - missing < MIN_SCORED_SHARE * queries:
        return (evaluation.description or "").removeprefix("not evaluated: ")
    return None


# ---- runs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """What a run was to do."""

    table: TableSpec | None
    name: str
    columns: frozenset[str]
    """`table.column` of embedding columns."""
    others: tuple[dg.AssetKey, ...]
    """Index and evaluation assets."""


def look_at_runs(
    instance: dg.DagsterInstance,
    tables: Sequence[TableSpec],
    columns: Sequence[ColumnFacts],
    *,
    since: datetime,
    told: Iterable[str] = (),
    over: Iterable[str] = (),
    jobs: Iterable[str] = (),
) -> list[FailedRun]:
    """Runs of this project that failed since then, and those that somebody was told of (`told`).

    Those whose incident is `over` are left out. `jobs` are this project's own. Of several failed
    runs for the same work the latest.
    """
    known, closed = set(told), set(over)
    records = {
        record.dagster_run.run_id: record
        for record in [
            *instance.get_run_records(
                dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], updated_after=since),
                limit=MOST_RUNS,
            ),
            *(instance.get_run_records(dg.RunsFilter(run_ids=sorted(known))) if known else []),
        ]
    }
    state = {facts.name: facts for facts in columns}
    found: dict[str, FailedRun] = {}
    for record in sorted(records.values(), key=lambda each: each.update_timestamp, reverse=True):
        work = _work(instance, record.dagster_run, tables, set(jobs))
        if work is None or work.name in found or record.dagster_run.run_id in closed:
            continue
        failure = _failure(instance, record.dagster_run)
        if failure is None:
            continue
        found[work.name] = FailedRun(
            run_id=record.dagster_run.run_id,
            work=work.name,
            error=failure.said,
            at=record.update_timestamp.astimezone(UTC),
            died=failure.died,
            recovered=_recovered(instance, record, work, state),
            new=record.dagster_run.run_id not in known,
            retried=failure.interrupted or (bool(work.columns) and not work.others),
            counted=bool(work.columns)
            and all(name in state and state[name].failing for name in work.columns),
            table=work.table.table if work.table else None,
            columns=work.columns,
        )
    return list(found.values())


def _work(
    instance: dg.DagsterInstance,
    run: dg.DagsterRun,
    tables: Sequence[TableSpec],
    jobs: set[str],
) -> _Work | None:
    """None for a run that is not this project's."""
    assets, checked = _selection(instance, run)
    selected = assets | checked
    for table in tables:
        columns = {names.column_key(table, each): each.column for each in table.embeddings}
        indexes = [names.index_key(table, each) for each in table.embeddings]
        quality = names.quality_key(table)
        if not selected & {*columns, *indexes, quality}:
            continue
        filled = [column for key, column in columns.items() if key in assets]
        parts = list(filled)
        parts += ["indexes"] if assets & set(indexes) else []
        parts += ["evaluation"] if quality in assets else []
        return _Work(
            table,
            f"{table.table}: {', '.join(parts) or 'checks'}",
            frozenset(f"{table.table}.{column}" for column in filled),
            tuple(key for key in (*indexes, quality) if key in assets),
        )
    return _Work(None, run.job_name, frozenset(), ()) if run.job_name in jobs else None


def _selection(
    instance: dg.DagsterInstance, run: dg.DagsterRun
) -> tuple[set[dg.AssetKey], set[dg.AssetKey]]:
    """Assets that a run was to materialise, and those that it was to check.

    A run that a command executes in its own process does not note its selection; its plan does.
    """
    if run.asset_selection or run.asset_check_selection:
        checked = {key.asset_key for key in run.asset_check_selection or ()}
        return set(run.asset_selection or ()), checked
    kinds = {
        dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED,
        dg.DagsterEventType.ASSET_CHECK_EVALUATION_PLANNED,
    }
    filled: set[dg.AssetKey] = set()
    checked = set()
    for record in instance.get_records_for_run(run.run_id, of_type=kinds, limit=1000).records:
        event = record.event_log_entry.dagster_event
        if event is None:
            continue
        if event.event_type is dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED:
            filled.add(event.asset_materialization_planned_data.asset_key)
        elif isinstance(event.event_specific_data, AssetCheckEvaluationPlanned):
            checked.add(event.event_specific_data.asset_key)
    return filled, checked


@dataclass(frozen=True)
class _Failure:
    """How a run failed."""

    said: str
    died: bool
    """Nothing in it failed: its process is gone, or it took too long."""
    interrupted: bool
    """Somebody ended it (Ctrl-C, a deployment)."""


def _failure(instance: dg.DagsterInstance, run: dg.DagsterRun) -> _Failure | None:
    """None where its failure needs nobody: another run held what it was to do."""
    kinds = {
        dg.DagsterEventType.STEP_FAILURE,
        dg.DagsterEventType.RUN_FAILURE,
        dg.DagsterEventType.ENGINE_EVENT,
    }
    died, interrupted, said, engine = True, False, "", ""
    for record in instance.get_records_for_run(run.run_id, of_type=kinds, limit=100).records:
        event = record.event_log_entry.dagster_event
        if event is None:
            continue
        if event.event_type is dg.DagsterEventType.ENGINE_EVENT:
            engine = event.message or engine
            continue
        if event.event_type is dg.DagsterEventType.RUN_FAILURE:
            data = event.event_specific_data
            if isinstance(data, JobFailureData) and data.error is not None:
                died, said = False, said or data.error.message
            said = said or event.message or ""
            continue
        died = False
        step = event.step_failure_data
        if step.user_failure_data is not None:
            if LEASE_HELD in step.user_failure_data.metadata:
                return None
            said = said or step.user_failure_data.description or ""
        error = step.error
        while error is not None:
            interrupted |= error.cls_name == dg.DagsterExecutionInterruptedError.__name__
            if error.cause is None:
                said = said or error.message
            error = error.cause
    if died and MARKED in said and engine:
        said = engine  # what noticed it says more
    return _Failure(said.strip() or "nothing was said", died, interrupted)


def _recovered(
    instance: dg.DagsterInstance,
    record: dg.RunRecord,
    work: _Work,
    columns: Mapping[str, ColumnFacts],
) -> bool:
    """Whether what the run was to do has been done since."""
    for name in work.columns:
        facts = columns.get(name)
        if facts is None or (facts.unknown is None and not facts.pending):
            continue
        if facts.unknown is not None or facts.stopped is not None or facts.failing:
            return False
        if not _succeeded_since(instance, record, facts):
            return False
    if work.others:
        began = record.start_time or record.create_timestamp.timestamp()
        latest = [
            record.asset_entry.last_materialization
            for record in instance.get_asset_records(list(work.others))
        ]
        return len(latest) == len(work.others) and all(
            event is not None and event.timestamp > began for event in latest
        )
    return bool(work.columns) or _repeated(instance, record)


def _succeeded_since(
    instance: dg.DagsterInstance, record: dg.RunRecord, facts: ColumnFacts
) -> bool:
    key = dg.AssetKey(facts.asset.split("/"))
    latest = instance.get_latest_materialization_event(key)
    return latest is not None and latest.timestamp > record.update_timestamp.timestamp()


def _repeated(instance: dg.DagsterInstance, record: dg.RunRecord) -> bool:
    """A run of the same job and selection has succeeded since."""
    run = record.dagster_run
    for later in instance.get_run_records(
        dg.RunsFilter(
            job_name=run.job_name,
            statuses=[dg.DagsterRunStatus.SUCCESS],
            created_after=record.create_timestamp,
        ),
        limit=MOST_RUNS,
    ):
        other = later.dagster_run
        if (other.asset_selection, other.asset_check_selection) == (
            run.asset_selection,
            run.asset_check_selection,
        ):
            return True
    return False
