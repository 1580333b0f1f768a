"""How good a column's retrieval is: golden sets, metrics, comparisons, verdicts and reports."""
