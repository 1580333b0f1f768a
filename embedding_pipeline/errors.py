"""Errors for the person who reads them: what was wrong, where, and what to do next."""


class PipelineError(Exception):
    """Base of every error that is the user's to mend; shown without a traceback."""


class SettingsError(PipelineError):
    """An environment variable is missing, malformed or contradicts another."""


class SpecError(PipelineError):
    """A table's YAML is wrong; the message names the file, the line and the remedy."""


class SchemaError(PipelineError):
    """The database does not hold what a table's YAML says, or cannot be brought to it."""


class IdentityError(PipelineError):
    """A column's YAML asks for another recipe than the one that filled the column."""


class LeaseError(PipelineError):
    """Another run holds the partition, or ours was lost."""
