"""Vectors, clearings and refusals into the table, and what became of each row."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import psycopg

from embedding_pipeline.backfill.flow import Flow, Write
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.store.quarantine import PAST_SHARE, Refusal, quarantine
from embedding_pipeline.store.reconnecting import ReconnectingConnection
from embedding_pipeline.store.writer import Writer, Written

WRITERS = 2
"""Connections that write side by side: while one waits for the disk, the other has the server."""


class Recorder:
    """Writes what is ready, in batches of the adaptive size."""

    def __init__(self, url: str, flow: Flow, most_refused: int | None) -> None:
        self.url, self.flow, self.most_refused = url, flow, most_refused
        self.column, self.outcome = flow.column, flow.outcome

    async def write(self) -> None:
        """Write until there is no more; one of `WRITERS` that take from the same queue.

        After an error of its own it goes on taking, so that nobody waits for it.
        """
        connection, writer = ReconnectingConnection(self.url), Writer(self.column)
        failed = False
        try:
            async for batch in self._ready(writer):
                if failed:
                    continue
                try:
                    self.flow.check()
                    await self._write_batch(connection, writer, batch)
                except Exception as error:  # noqa: BLE001 - handed to the run, which raises it
                    failed = True
                    self.flow.fail(error)
        finally:
            await connection.close()

    async def _ready(self, writer: Writer) -> AsyncIterator[list[Write]]:
        """Whatever is there when the last batch is written, without waiting for more."""
        writes = self.flow.writes
        ready: list[Write] = []
        ended = False
        while ready or not ended:
            while not ended and (
                not ready or (len(ready) < writer.batch_rows and not writes.empty())
            ):
                taken = await writes.get()
                ended = taken is None
                ready += taken or []
            if ready:
                batch, ready = ready[: writer.batch_rows], ready[writer.batch_rows :]
                yield batch

    async def _write_batch(
        self, connection: ReconnectingConnection, writer: Writer, batch: list[Write]
    ) -> None:
        refused = [item for item in batch if item.error]
        rows = [item for item in batch if not item.error]
        if rows:
            staged = [item.row for item in rows]
            self._count(rows, await connection.run(lambda c: writer.write(c, staged)))
        if refused:
            self._count(refused, await connection.run(lambda c: self._refuse(c, writer, refused)))
            self._stop_for_refusals(refused[-1].error)
        for item in batch:
            if item.batch is not None:
                item.batch.unwritten -= 1
        self.flow.settle(len(batch))

    async def _refuse(
        self, connection: "psycopg.AsyncConnection[Any]", writer: Writer, refused: list[Write]
    ) -> Written:
        """Quarantine rows, and clear what they hold: a vector of the text before would make
        search find them by words that they no longer have."""
        async with connection.transaction():
            result = await writer.write(connection, [item.row for item in refused])
            refusals = [
                Refusal(item.row.key, UUID(bytes=item.row.fingerprint), item.error)
                for position, item in enumerate(refused)
                if item.row.fingerprint is not None
                and position in result.written | result.unchanged
            ]
            await quarantine(connection, self.column, refusals)
        return result

    def _stop_for_refusals(self, words: str) -> None:
        total = self.outcome.total.quarantined
        if self.most_refused is not None and total > self.most_refused:
            self.flow.fail(
                PipelineError(
                    f"{self.column}: the provider refused {total} rows, which brings the "
                    f"quarantined ones {PAST_SHARE}; the latest says: {words}\n"
                    "When the provider is at fault, mend that, then make them pending again: "
                    f"embedding-pipeline retry {self.column.table.table} "
                    f"{self.column.embedding.column}. When it is the texts, mend them or raise "
                    "max_quarantined_share in the table's YAML"
                )
            )

    def _count(self, batch: list[Write], result: Written) -> None:
        memory = self.flow.memory
        for position, item in enumerate(batch):
            counts = self.outcome.partitions[item.partition]
            row = item.row
            if row.fingerprint is not None:
                memory.unwritten.discard(row.fingerprint)
            if position in result.written or (item.error and position in result.unchanged):
                setattr(counts, item.kind, getattr(counts, item.kind) + 1)
                if row.fingerprint is not None and row.vector is not None:
                    memory.written(row.fingerprint, row.key)
            elif position in result.locked:
                counts.locked += 1
                if row.vector is not None and row.fingerprint is not None:
                    # still wanted, and paid for: the next pass finds it here
                    memory.keep_locked(row.fingerprint, row.vector, item.kind)
            elif position in result.gone:
                counts.gone += 1
            else:
                counts.superseded += 1
