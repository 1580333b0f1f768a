"""The backfill core: pending → embed → write, overlapped, with flat memory. Plain asyncio.

    Reader ──rows──▶ Sender: batches ──▶ workers ──vectors──▶ Recorder

Assets, the command line and tests call `backfill`; nothing here knows Dagster. Rows of several
partitions share batches, so that a thousand small partitions cost no more than one large one.
The queues between the stages are bounded, which is what keeps memory flat.
"""

from embedding_pipeline.backfill.outcome import (
    TOO_DEAR,
    BackfillError,
    Counts,
    Options,
    Outcome,
    Progress,
)
from embedding_pipeline.backfill.run import backfill

__all__ = [
    "TOO_DEAR",
    "BackfillError",
    "Counts",
    "Options",
    "Outcome",
    "Progress",
    "backfill",
]
