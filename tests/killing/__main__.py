"""`python -m tests.killing SEEDS`; the parts are started as `python -m tests.killing ROLE ...`."""

import asyncio
import sys
import tempfile
from pathlib import Path

from aiordma import AiordmaError
from fedllm import FedError
from tests.killing import SILOS, TYPED, check, play, serve, take_part


def part(role: str, port: str, folder: str, *words: str) -> int:
    """One process: prints the digest of the final weights."""
    try:
        if role == "server":
            print(asyncio.run(serve(int(port), Path(folder), int(words[0]))))
        else:
            keep = Path(folder) / "silos" if words[0] == "keep" else None
            print(asyncio.run(take_part(int(port), role, keep)))
    except (AiordmaError, FedError) as exc:
        print(f"{type(exc).__name__}: {exc}")
        return TYPED
    return 0


async def main(folder: Path, seeds: int) -> None:
    def room(name: str) -> Path:
        path = folder / name
        path.mkdir(parents=True)
        return path

    undisturbed = await play(room("undisturbed"), None, quorum=len(SILOS), keeps=False)
    print(f"undisturbed: {undisturbed.server} in {undisturbed.seconds:.1f} s")
    for seed in range(seeds):
        for quorum in (len(SILOS), len(SILOS) - 1):
            here = room(f"{seed}-{quorum}")
            ending = await play(here, seed, quorum=quorum, keeps=seed % 2 == 0)
            check(ending, here, quorum, undisturbed.server)
            same = {"=" if said == ending.server else said[:40] for said in ending.silos.values()}
            print(
                f"seed {seed:2} quorum {quorum}: {ending.server[:60]} silos {sorted(same)} "
                f"{ending.seconds:4.1f} s, killed {' '.join(ending.killed)}",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1].isdigit():
        with tempfile.TemporaryDirectory() as scratch:
            asyncio.run(main(Path(scratch), int(sys.argv[1])))
    else:
        sys.exit(part(*sys.argv[1:]))
