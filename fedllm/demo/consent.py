"""What a silo of `python -m fedllm join` lets a server ask, and what it shows of that beforehand."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from aiordma import prepare
from fedllm import Between, OneOf, Policy, SettingError
from fedllm.demo import arguments
from fedllm.demo.arguments import LONGEST_WINDOW_TOKENS, MAX_BATCH, MAX_STEPS
from fedllm.policy import Rule

RULES: Final[Mapping[str, Rule]] = {
    "recipe.steps": Between(1, MAX_STEPS),
    "recipe.batch": Between(1, MAX_BATCH),
    "recipe.block_tokens": Between(2, LONGEST_WINDOW_TOKENS),
    "recipe.learning_rate": Between(0, 1),
    "recipe.warmup_steps": Between(0, MAX_STEPS),
    "recipe.decays": OneOf((False, True)),
    "seed": Between(0, 2**64 - 1),
}
"""All that a server can choose: an `Assignment`, in full."""


def add_options(parser: Any) -> None:
    """Those of `join`."""
    add = parser.add_argument_group("what leaves this machine").add_argument
    add(
        "--dry-run",
        action="store_true",
        help="show what would leave, and what the server may ask; connect to nobody, for --base neither",
    )
    add(
        "--journal",
        type=Path,
        metavar="FILE",
        help="add a line of JSON there for all that leaves, before it does (default: no record)",
    )
    add(
        "--allow",
        type=arguments.rule,
        nargs="+",
        default=(),
        metavar="NAME=VALUES",
        help="what the server may ask at most, as recipe.steps=1..200 or recipe.batch=4,8; --dry-run shows all",
    )
    add(
        "--tell-examples",
        action="store_true",
        help="tell the server how much this silo has trained; else all silos of a round count alike",
    )
    add(
        "--proxy",
        metavar="http://[USER:PASSWORD@]HOST:PORT",
        help="go to the server through this HTTP proxy; $FEDLLM_PROXY, which no other user can read, is the same",
    )


def policy_of(allowed: Iterable[tuple[str, Rule]], *, tells_examples: bool) -> Policy:
    """The silo's policy. Raises `SettingError` for a rule on what no server asks, or one that goes beyond `RULES`."""
    given = dict(allowed)
    if unknown := sorted(given.keys() - RULES.keys()):
        raise SettingError(
            f"--allow {unknown[0]}: what a server asks for is {', '.join(RULES)}, and nothing else"
        )
    for name, rule in given.items():
        values = (rule.low, rule.high) if isinstance(rule, Between) else rule.values
        if not all(RULES[name].allows(value) for value in values):
            raise SettingError(
                f"--allow {name}: {rule} goes beyond what a silo does at all, which is {RULES[name]}"
            )
    return Policy(arguments={**RULES, **given}, tells_weight=tells_examples)


def preview(
    update: Mapping[str, object],
    policy: Policy,
    *,
    server: str,
    name: str,
    fingerprint: Mapping[str, str],
) -> Iterator[str]:
    """Lines that say what would leave, and what the server may ask."""
    manifest = prepare(update).manifest
    yield f"nothing is sent now, and nobody is connected to. This would leave for {server} in each round:"
    for spec in manifest.tensors:
        yield f"  {spec.name}  {spec.dtype} {list(spec.shape)}  {spec.nbytes:,} bytes"
    examples = "" if policy.tells_weight else "not "
    yield f"in all {len(manifest.tensors)} tensors, {manifest.total_bytes:,} bytes, and with them the training's loss;"
    yield f"{examples}the number of examples. If the server has its model judged: the loss on held-out text"
    digests = ", ".join(f"{what} {digest}" for what, digest in fingerprint.items())
    yield f"once, as it joins: the name {name!r}, digests that must equal the server's: {digests};"
    yield "and a key drawn by chance, by which the server knows this silo when it comes back"
    yield "the server may ask for this, and nothing else (a task that does is declined); it sends numbers, never code:"
    for what, rule in (policy.arguments or {}).items():
        yield f"  {what}: {rule}"
    yield "if a task is declined the server is told why, in words that quote the rule, or the error, against it"
