"""What an error is called where no patient's data may stand: logs, records, status."""

from pathlib import Path

from lungwatch.errors import LungwatchError


def describe(error: Exception) -> str:
    """Describe an error that was foreseen, without the file name that an OSError quotes."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return str(error)


def describe_unexpected(error: BaseException) -> str:
    """Say what an unexpected error is, without the texts that may quote patients' data."""
    if isinstance(error, LungwatchError):
        return str(error)
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = ""
    if trace is not None:
        where = f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
    return type(error).__name__ + where
