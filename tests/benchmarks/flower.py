"""The same round by Flower, for `memory`: run by an interpreter that has `flwr`, and imports nothing of ours.

``flower.py server SILOS MODEL_BYTES PORT`` writes the most anonymous memory above what it was after the imports, seen
every 5 ms; ``flower.py silo MODEL_BYTES PORT`` is one silo. Its plain gRPC server (`start_server`) is what is run,
without a SuperLink and its database between.
"""

import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

TENSOR_BYTES = 1 << 22
WATCH_S = 0.005


def anonymous_bytes() -> int:
    """As in `memory`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return sum(int(found[key].split()[0]) << 10 for key in ("RssAnon", "RssShmem"))


def model(nbytes: int, seed: int) -> list[Any]:
    """Tensors of random float32."""
    rng = np.random.default_rng(seed)
    return [rng.random(TENSOR_BYTES // 4, np.float32) for _ in range(nbytes // TENSOR_BYTES)]


def lead(silos: int, nbytes: int, port: int) -> None:
    """One round with so many silos."""
    from flwr.common import ndarrays_to_parameters
    from flwr.server import ServerConfig, start_server
    from flwr.server.strategy import FedAvg

    before = most = anonymous_bytes()
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(WATCH_S):
            most = max(most, anonymous_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    strategy = FedAvg(
        min_fit_clients=silos,
        min_available_clients=silos,
        fraction_evaluate=0.0,
        initial_parameters=ndarrays_to_parameters(model(nbytes, 0)),
    )
    try:
        start_server(
            server_address=f"127.0.0.1:{port}",
            config=ServerConfig(num_rounds=1),
            strategy=strategy,
        )
    finally:
        over.set()
        watching.join()
    sys.stdout.write(f"\n{most - before}\n")


def take_part(nbytes: int, port: int) -> None:
    """A silo."""
    from flwr.client import NumPyClient
    from flwr.compat.client.app import start_client

    update = model(nbytes, 1)

    class Silo(NumPyClient):  # type: ignore[misc]
        def fit(self, parameters: object, config: object) -> tuple[list[Any], int, dict[str, Any]]:
            return update, 1, {}

    start_client(
        server_address=f"127.0.0.1:{port}",
        client=Silo().to_client(),
        insecure=True,
        transport="grpc-bidi",
    )


if __name__ == "__main__":
    role, *numbers = sys.argv[1:]
    if role == "server":
        lead(*map(int, numbers))
    else:
        take_part(*map(int, numbers))
