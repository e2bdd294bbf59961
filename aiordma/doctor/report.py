"""Findings as aligned lines, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from aiordma.doctor.findings import Finding, is_well

_LEVELS: Final = {"ok": "ok", "note": "note", "wrong": "WRONG"}


def text(findings: Sequence[Finding]) -> str:
    """A line each, and what they come to."""
    width = max((len(finding.subject) for finding in findings), default=0)
    return "\n".join([*(line(finding, width) for finding in findings), "", summary(findings), ""])


def line(finding: Finding, width: int = 0) -> str:
    """One finding; its remedy comes after a colon, as in the errors."""
    said = f"{finding.text}: {finding.remedy}" if finding.remedy else finding.text
    return f"{_LEVELS[finding.level]:<5}  {finding.subject:<{width}}  {said}"


def summary(findings: Sequence[Finding]) -> str:
    """What it comes to."""
    wrong = sum(finding.level == "wrong" for finding in findings)
    if wrong:
        return f"{wrong} thing{'s' * (wrong > 1)} wrong; the remedy stands after the colon."
    if any(finding.subject == "device" for finding in findings):
        return "Nothing is wrong: channels use TCP here."
    return "Nothing is wrong: channels can use RDMA here."


def as_json(findings: Sequence[Finding]) -> bytes:
    """{"is_well": ..., "findings": [{"level", "subject", "text", "remedy"}, ...]}"""
    found = {"is_well": is_well(findings), "findings": findings}
    return msgspec.json.format(msgspec.json.encode(found), indent=2)
