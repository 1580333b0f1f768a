"""Pending rows out of the table: page by page, pass after pass until nothing is left."""

import asyncio
from functools import partial
from typing import Any

import psycopg

from embedding_pipeline.backfill.flow import Flow, Write
from embedding_pipeline.backfill.memory import Vector
from embedding_pipeline.backfill.sending import Sender
from embedding_pipeline.errors import PipelineError
from embedding_pipeline.store.pending import PAGE_BYTES, PendingRow, read_page
from embedding_pipeline.store.reconnecting import ReconnectingConnection
from embedding_pipeline.store.writer import StagedRow, stored_vectors

MOST_PASSES = 8
"""How often a run re-reads its partitions for rows that arrived or were locked meanwhile."""
MOST_IDLE_PASSES = 3
"""After so many passes in a row that changed nothing a run leaves the rest to the next one."""


class Reader:
    """Feeds rows to the sender, and straight to the writer where nothing is to be embedded."""

    def __init__(self, url: str, flow: Flow, sender: Sender) -> None:
        self.url, self.flow, self.sender = url, flow, sender
        self.column = flow.column
        self.most_in_page = max(flow.options.batch_size * 4, 512)
        self.page_rows = self.most_in_page
        self.reading = ""
        """The partition being read."""

    async def read(self) -> None:
        """Feed every pending row of every partition, again and again until nothing is left."""
        connection = ReconnectingConnection(self.url)
        try:
            await self._read_passes(connection)
        finally:
            await connection.close()

    async def _read_passes(self, connection: ReconnectingConnection) -> None:
        flow = self.flow
        outcome = flow.outcome
        todo = list(outcome.partitions)
        idle = 0
        for _ in range(MOST_PASSES):
            before = outcome.total
            todo = [key for key in todo if await self._read_partition(connection, key)]
            await self.sender.flush()
            await flow.wait_until(lambda: flow.outstanding == 0)
            total = outcome.total
            if not flow.ending:
                outcome.swept |= total.locked == before.locked
            if flow.ending or not todo:
                return
            idle = idle + 1 if total.done == before.done else 0
            if idle == MOST_IDLE_PASSES:
                held = total.locked - before.locked
                outcome.stopped = (
                    f"other sessions hold {held} rows; the next run goes on"
                    if held
                    else "rows change faster than they are embedded; the next run goes on"
                )
                return
            if idle:
                await asyncio.sleep(0.2 * 2**idle)
        outcome.stopped = "rows keep arriving; the next run goes on"

    async def _read_partition(self, connection: ReconnectingConnection, partition: str) -> bool:
        """Hand a partition's pending rows on; True when it had any."""
        flow, limit = self.flow, self.flow.options.limit
        self.reading = partition
        position: tuple[str, ...] | None = None
        found = False
        while not flow.ending:
            flow.check()
            if (held := await flow.brake.look()) is not None:
                flow.halt(held)
                break
            most = self.page_rows
            if limit is not None:
                most = min(most, limit - flow.outcome.total.read)
            page = await connection.run(
                partial(self._page, partition=partition, position=position, most=max(1, most))
            )
            if not page:
                break
            if most <= 0:
                flow.outcome.stopped = f"limit of {limit} rows reached"
                break
            found = True
            position = page[-1].position
            size = _bytes(page)
            # about as many rows as a page may have bytes, so that none are read in vain
            fitting = PAGE_BYTES * len(page) // max(1, size)
            self.page_rows = max(1, min(self.most_in_page, fitting))
            full = len(page) == most or size >= PAGE_BYTES
            await self._hand_on(partition, page, await self._recall(connection, page))
            if not full and limit is None:
                break  # what arrives from now on is the next pass's
        return found

    async def _page(
        self,
        connection: "psycopg.AsyncConnection[Any]",
        partition: str,
        position: tuple[str, ...] | None,
        most: int,
    ) -> list[PendingRow]:
        try:
            return await read_page(connection, self.column, partition, position, most)
        except psycopg.DataError as error:
            raise PipelineError(
                f"{self.column}: partition {partition!r} cannot be read: {str(error).strip()}"
            ) from error

    async def _recall(
        self, connection: ReconnectingConnection, page: list[PendingRow]
    ) -> dict[bytes, Vector]:
        """Vectors that the column has already for these rows' texts, as far as not at hand.

        Of texts that this run has paid for and forgotten; with `reuse: true`, of any.
        """
        memory = self.flow.memory
        memory.page = {row.fingerprint for row in page if row.fingerprint is not None}
        wanted = {
            fingerprint
            for fingerprint in memory.page
            if memory.vector(fingerprint) is None and fingerprint not in self.flow.flying
        }
        fingerprints: list[bytes] = list(wanted)
        places: list[tuple[str, ...]] | None = None
        if not self.column.embedding.reuse:
            known = {each: place for each in wanted if (place := memory.place(each)) is not None}
            fingerprints, places = list(known), list(known.values())
        if not fingerprints:
            return {}
        return await connection.run(lambda c: stored_vectors(c, self.column, fingerprints, places))

    async def _hand_on(
        self, partition: str, page: list[PendingRow], recalled: dict[bytes, Vector]
    ) -> None:
        """Give rows to the writer where nothing is to be embedded, else to the provider."""
        flow, memory = self.flow, self.flow.memory
        if flow.outstanding >= flow.most_outstanding:
            await self.sender.flush()
            await flow.wait_until(lambda: flow.outstanding < flow.most_outstanding)
        refused, given_up = memory.refused, memory.given_up
        ready: list[Write] = []
        for row in page:
            fingerprint = row.fingerprint
            if fingerprint is None or row.text is None:
                ready.append(Write(partition, StagedRow(row.key, None, None), "cleared"))
            elif (error := refused.get(fingerprint)) is not None:
                staged = StagedRow(row.key, fingerprint, None)
                ready.append(Write(partition, staged, "quarantined", error))
            elif (vector := recalled.get(fingerprint)) is not None:
                ready.append(Write(partition, StagedRow(row.key, fingerprint, vector), "reused"))
            elif (known := memory.vector(fingerprint)) is not None:
                ready.append(Write(partition, StagedRow(row.key, fingerprint, known[0]), known[1]))
            elif fingerprint not in given_up:
                await self.sender.add(partition, row.key, fingerprint, row.text)
                continue
            else:
                continue
            flow.count_read(partition)
        if ready:
            await flow.writes.put(ready)


def _bytes(page: list[PendingRow]) -> int:
    """Of text, as the database counts them."""
    return sum(
        len(text) if text.isascii() else len(text.encode())
        for row in page
        if (text := row.text) is not None
    )
