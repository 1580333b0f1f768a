"""The error of an evaluation that could not be made."""

from embedding_pipeline.errors import PipelineError


class EvaluationError(PipelineError):
    """An evaluation could not be made; there is no figure, least of all a zero."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"not evaluated: {reason}")
        self.reason = reason


class NothingToEvaluateError(EvaluationError):
    """There is no vector yet. That is no defect: an empty table has nothing to be found."""
