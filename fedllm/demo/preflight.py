"""What can be found wrong before torch is imported, which takes seconds."""

import asyncio
import re
from pathlib import Path

from aiordma import ConfigError, listen
from fedllm.errors import FedError, SettingError

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class BaseModelError(FedError):
    """The base model cannot be loaded."""


def check_base(source: str) -> None:
    """Raise `BaseModelError` if this is neither a folder nor a name on the hub, which it need not be asked."""
    if not (Path(source).exists() or _HUB_NAME.fullmatch(source)):
        raise BaseModelError(
            f"no base model at {source!r}: there is no such folder; give one that save_pretrained wrote, "
            "with its tokenizer, or a name on the hub, which is OWNER/NAME"
        )


def check_host(host: str) -> None:
    """Listen there for a moment: raise what `serve` without --insecure would. Runs a loop of its own."""
    try:
        asyncio.run(_listen(host))
    except ConfigError as exc:
        raise SettingError(
            f"--host {host} is not a loopback address, and nothing is encrypted or authenticated: "
            "keep to 127.0.0.1 behind a tunnel, or add --insecure on a network that you trust"
        ) from exc


async def _listen(host: str) -> None:
    async with listen(host):
        pass
