"""What the harness raises."""


class SoftRoceError(Exception):
    """This machine cannot run the tests, or a virtual one failed. The text says why, and what helps."""
