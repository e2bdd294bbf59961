"""The way through an HTTP proxy: CONNECT (RFC 9110, 9.3.6) with Basic authentication (RFC 7617).

What the proxy says is bounded and never trusted: it is quoted, without what a terminal would obey. User and
password are in no error and in no `repr`.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import re
import socket
from typing import Final
from urllib.parse import unquote, urlsplit

import msgspec

from aiordma.errors import ConfigError, ConnectError, ProxyError, ProxyRefused
from aiordma.handshake import dial, hang_up

MAX_HEAD_BYTES: Final = 16 << 10
"""Of an answer's head, interim ones (1xx) included."""
_MAX_QUOTED: Final = 200
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: ([^\r\n]*))?\r?\n")
_HEAD_ENDS: Final = re.compile(rb"\r?\n\r?\n")
_USUAL_PORT: Final = 80
_FORM: Final = "give it as http://HOST:PORT or http://USER:PASSWORD@HOST:PORT"


class Proxy(msgspec.Struct, frozen=True):
    """An HTTP proxy, and who we are to it."""

    host: str
    port: int
    credentials: str = ""
    """What goes behind "Basic"; empty without."""

    def __repr__(self) -> str:
        return f"<Proxy {self.address}>"

    @property
    def address(self) -> str:
        """Host and port, without user and password."""
        return _authority(self.host, self.port)

    @classmethod
    def parse(cls, url: str) -> Proxy:
        """The proxy of ``http://[USER:PASSWORD@]HOST[:PORT]``, user and password percent-encoded.

        Raises `ConfigError`, which does not quote the address: a password may be in it.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:  # it quotes what it takes for the port, and that may be the password
            raise ConfigError(f"the proxy's address is none: {_FORM}") from None
        if parts.scheme != "http":
            raise ConfigError(
                f"the proxy's address does not begin with http:// (TLS to the proxy is not supported): {_FORM}"
            )
        if not host or parts.path not in ("", "/") or parts.query or parts.fragment:
            raise ConfigError(f"the proxy's address is not a host and a port alone: {_FORM}")
        credentials = ""
        if parts.username is not None:
            user, password = unquote(parts.username), unquote(parts.password or "")
            if ":" in user or not (user + password).isprintable():
                raise ConfigError(
                    "the proxy's user has a colon, or user or password what no key types"
                )
            credentials = base64.b64encode(f"{user}:{password}".encode()).decode()
        return cls(host, _USUAL_PORT if port is None else port, credentials)

    async def dial(self, host: str, port: int) -> socket.socket:
        """A connected, non-blocking TCP socket to host and port behind the proxy, which looks up the name.

        Raises `ProxyError`: `ProxyRefused` if it does not open the way; `ConfigError` for a host that is none.
        """
        request = self._request(host, port)
        try:
            sock = await dial(self.host, self.port)
        except ConnectError as exc:
            raise ProxyError(f"the way goes through a proxy, and there: {exc}") from exc
        with contextlib.ExitStack() as undo:
            undo.callback(hang_up, sock)
            try:
                await asyncio.get_running_loop().sock_sendall(sock, request)
                await self._hear(sock, _authority(host, port))
            except TimeoutError:
                raise
            except OSError as exc:
                raise ProxyError(
                    f"the connection to the proxy {self.address} broke ({exc.strerror or exc}): connect again"
                ) from exc
            undo.pop_all()
        return sock

    def _request(self, host: str, port: int) -> bytes:
        try:
            target = _authority(host.encode("idna").decode(), port)
        except UnicodeError as exc:
            raise ConfigError(f"{host!r} is no host that a proxy can be asked for: {exc}") from exc
        if not re.fullmatch(r"(\[[\w.:%-]+\]|[\w.-]+):\d+", target, re.ASCII):
            raise ConfigError(f"{host!r} is no host that a proxy can be asked for")
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if self.credentials:
            lines.append(f"Proxy-Authorization: Basic {self.credentials}")
        return "\r\n".join([*lines, "", ""]).encode("ascii")

    async def _hear(self, sock: socket.socket, target: str) -> None:
        """Read the answer; returns if the connection is the server's from here on."""
        loop = asyncio.get_running_loop()
        data, past_bytes = b"", 0
        while True:
            line = _STATUS_LINE.match(data)
            end = _HEAD_ENDS.search(data)
            if line and end:
                status = int(line[1])
                if status >= 200:
                    break
                past_bytes += end.end()
                data = data[end.end() :]
                continue
            if not _may_become_an_answer(data):
                raise ProxyError(
                    f"{self.address} is no HTTP proxy: it answers CONNECT with {_quoted(data)}; check the proxy's "
                    "host and port"
                )
            if past_bytes + len(data) >= MAX_HEAD_BYTES:
                raise ProxyError(
                    f"the proxy {self.address} answers with a head of over {MAX_HEAD_BYTES} bytes: check its host "
                    "and port"
                )
            piece = await loop.sock_recv(sock, MAX_HEAD_BYTES - past_bytes - len(data))
            if not piece:
                raise ProxyError(
                    f"the proxy {self.address} hung up {'amid its' if data else 'without an'} answer: check its "
                    "host and port, and its log"
                )
            data += piece
        if status >= 300:
            raise self._refused(status, line[2] or b"", data[: end.end()], target)
        if len(data) > end.end():
            raise ProxyError(
                f"the proxy {self.address} opened a way to {target}, and something there speaks before it is spoken "
                "to: no aiordma does; check host and port"
            )

    def _refused(self, status: int, phrase: bytes, head: bytes, target: str) -> ProxyRefused:
        what = (
            f"the proxy {self.address} does not open a way to {target}: {status} {_quoted(phrase)}"
        )
        if status == 407:
            offered = re.findall(rb"(?im)^proxy-authenticate:[ \t]*([^\r\n]*)", head)
            schemes = _quoted(b", ".join(offered))
            remedy = (
                "it does not take this user and password"
                if self.credentials
                else "give it user and password (http://USER:PASSWORD@HOST:PORT)"
            )
            remedy += f"; it offers {schemes}, and only Basic is spoken here"
        elif status < 500:
            remedy = "ask who runs it to allow CONNECT to this host and port"
        else:
            remedy = "it cannot reach the server: is that running, and are host and port right?"
        return ProxyRefused(f"{what}; {remedy}", status=status)


def _authority(host: str, port: int) -> str:
    try:
        is_v6 = ipaddress.ip_address(host.partition("%")[0]).version == 6
    except ValueError:
        is_v6 = False
    return f"[{host}]:{port}" if is_v6 else f"{host}:{port}"


def _may_become_an_answer(data: bytes) -> bool:
    """Whether these first bytes can be those of an HTTP answer."""
    if b"\n" in data:
        return _STATUS_LINE.match(data) is not None
    return data[:7] == b"HTTP/1."[: len(data)]


def _quoted(said: bytes) -> str:
    """What a peer said, for an error: short, and nothing in it that a terminal would obey."""
    text = said[:_MAX_QUOTED].decode("ascii", "backslashreplace")
    return repr(text)
