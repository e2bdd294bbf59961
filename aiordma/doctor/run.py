"""The whole examination."""

from __future__ import annotations

from aiordma.doctor.checks import check, usable_ports
from aiordma.doctor.facts import Facts
from aiordma.doctor.findings import Finding
from aiordma.doctor.trial import path_test, self_test


async def examine(facts: Facts, peer: tuple[str, int] | None = None) -> list[Finding]:
    """Judge the facts, try each port that can be used, then the way to the peer."""
    findings = check(facts)
    trials = [await self_test(port.name) for port in usable_ports(facts)]
    findings += trials
    if peer is not None:
        is_able = any(trial.level == "ok" for trial in trials)
        findings += await path_test(*peer, is_able=is_able)
    return findings
