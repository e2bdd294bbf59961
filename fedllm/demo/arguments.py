"""What the command line takes: each turns a word into a value, or says what is wrong with it."""

import argparse
import math
import re
from typing import Any

import msgspec

from fedllm.policy import Between, OneOf

MAX_STEPS = 1_000_000
MAX_BATCH = 4096
LONGEST_WINDOW_TOKENS = 128
MAX_PORT = 65_535


def whole(text: str) -> int:
    """A positive whole number."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return number


def steps(text: str) -> int:
    """Steps of a round: what a silo accepts."""
    return _at_most(MAX_STEPS, whole(text))


def batch(text: str) -> int:
    """Windows of a step: what a silo accepts."""
    return _at_most(MAX_BATCH, whole(text))


def port(text: str) -> int:
    """A TCP port; 0 is any."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return _at_most(MAX_PORT, number)


def width(text: str) -> int:
    """A positive multiple of 4, the number of heads."""
    number = whole(text)
    if number % 4:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 4")
    return number


def seed(text: str) -> int:
    """A whole number, 0 or more."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def rate(text: str) -> float:
    """A learning rate above 0 and at most 1: what a silo accepts."""
    return share(text)


def share(text: str) -> float:
    """A part: above 0, and at most 1."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return number


def seconds(text: str) -> float:
    """A positive, finite number of seconds."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return number


def ratio(text: str) -> float:
    """A finite number above 0."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return number


def name(text: str) -> str:
    """A silo's name."""
    if not re.fullmatch(r"[\w.-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: letters, digits, '-', '_' and '.' only")
    return text


def rule(text: str) -> tuple[str, Between | OneOf]:
    """`NAME=LOW..HIGH`, or `NAME=VALUE,VALUE`: a name, and what it may be."""
    left, _, values = text.partition("=")
    low, dots, high = values.partition("..")
    try:
        if dots:
            return left, Between(_scalar(low), _scalar(high))
        return left, OneOf(tuple(_scalar(value) for value in values.split(",")))
    except (ValueError, TypeError) as exc:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=LOW..HIGH or NAME=VALUE,...: {exc}"
        ) from exc


def pair(text: str) -> tuple[str, str]:
    """`NAME=VALUE`; NAME alone is its own value."""
    left, equals, value = text.partition("=")
    return name(left), value if equals else left


def address(text: str) -> tuple[str, int]:
    """`HOST:PORT`."""
    host, colon, number = text.rpartition(":")
    if not colon or not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return host.strip("[]"), port(number)


def _scalar(text: str) -> Any:
    """A number, true or false."""
    return msgspec.json.decode(text.encode(), type=bool | int | float)


def _at_most(limit: int, number: int) -> int:
    if number > limit:
        raise argparse.ArgumentTypeError(f"{number} is above {limit}")
    return number
