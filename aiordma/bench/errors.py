"""What can go wrong in a benchmark."""


class BenchError(Exception):
    """The benchmark cannot go on: a process of it died or stalled."""


class CorruptTransfer(BenchError):
    """Other bytes arrived than were sent, so that no figure of the run counts."""
