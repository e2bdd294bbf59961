"""What can go wrong with a benchmark of rounds."""

from fedllm.errors import FedError


class BenchError(FedError):
    """A round could not be measured."""


class WrongWeights(BenchError):
    """The new weights are not what the silos' updates come to."""
