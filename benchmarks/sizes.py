"""How large a run of the benchmark is: three presets, each value an option of its own."""

from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Sizes:
    """Rows and rounds of every part. The defaults finish in a quarter of an hour on two cores."""

    rounds: int = 3
    """Alternating rounds; every figure is their median."""
    rows: int = 10_000
    """Embedded in a round."""
    script_rows: int = 500
    """Embedded by the hand-written script, whose time grows in proportion."""
    table_rows: int = 200_000
    """Of the table in which nothing is pending, and of the sensor's."""
    tenants: int = 1_000
    memory_rows: tuple[int, ...] = (10_000, 100_000)
    """Sizes between which the core's peak memory is compared."""
    index_rows: int = 10_000
    growth_rows: tuple[int, ...] = (10_000, 100_000)
    freshness_commits: int = 20
    model_texts: int = 256
    limited_seconds: float = 5.0


QUICK = Sizes(
    rows=2_000,
    script_rows=200,
    table_rows=20_000,
    tenants=100,
    memory_rows=(2_000, 10_000),
    index_rows=1_000,
    growth_rows=(1_000, 5_000),
    freshness_commits=5,
    model_texts=64,
    limited_seconds=2.0,
)
"""Enough to see that everything works, in two minutes; its ratios are rough."""

FULL = Sizes(
    memory_rows=(10_000, 100_000, 1_000_000),
    index_rows=50_000,
    growth_rows=(10_000, 100_000, 1_000_000),
    table_rows=1_000_000,
    freshness_commits=60,
    model_texts=512,
    limited_seconds=10.0,
)
"""What the targets are stated for; about an hour."""

TINY = Sizes(
    rounds=1,
    rows=150,
    script_rows=50,
    table_rows=300,
    tenants=10,
    memory_rows=(100, 200),
    index_rows=200,
    growth_rows=(100, 200),
    freshness_commits=2,
    model_texts=8,
    limited_seconds=0.5,
)
"""For tests: whether it works at all."""


def changed(sizes: Sizes, given: dict[str, object]) -> Sizes:
    """The preset with what the command line says otherwise; None stands for nothing said."""
    known = {item.name for item in fields(Sizes)}
    return replace(sizes, **{k: v for k, v in given.items() if k in known and v is not None})  # type: ignore[arg-type]
