"""Calling what a program hands in to be told of a run: plain functions, or such that return an awaitable."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeAlias, TypeVar

__all__ = ["Hook", "SiloHook", "Told", "call"]

T = TypeVar("T")
Hook: TypeAlias = Callable[[T], Awaitable[object] | object]
SiloHook: TypeAlias = Callable[[str, str], Awaitable[object] | object]
"""Is called with a silo's name and what became of it."""


async def call(hook: Hook[T] | None, news: T) -> None:
    """Tell it, and wait for its answer if that is an awaitable. Raises what it raises."""
    if hook is not None:
        answer = hook(news)
        if inspect.isawaitable(answer):
            await answer


class Told:
    """Tells a hook what happens where nobody can wait for its answer: answers are awaited one after the other, by a
    task beside."""

    def __init__(self, hook: SiloHook | None) -> None:
        self._hook = hook
        self._answers: deque[Awaitable[object]] = deque()
        self._waiting: asyncio.Task[None] | None = None
        self._error: Exception | None = None

    def tell(self, name: str, what: str) -> None:
        """Tell it now. Raises what it raises; what its answer raises, `heard` does."""
        if self._hook is None:
            return
        answer = self._hook(name, what)
        if inspect.isawaitable(answer):
            self._answers.append(answer)
            if self._waiting is None:
                self._waiting = asyncio.create_task(self._wait())

    async def heard(self) -> None:
        """Wait for all answers. Raises the first error of one, once."""
        await self._settle()
        error, self._error = self._error, None
        if error is not None:
            raise error

    async def aclose(self) -> None:
        """Wait for all answers, whatever they raise. Cancelled, it drops those to come, and leaves no task."""
        try:
            await self._settle()
        finally:
            if self._waiting is not None:
                self._waiting.cancel()
                await asyncio.gather(self._waiting, return_exceptions=True)

    async def _settle(self) -> None:
        while self._waiting is not None:
            await asyncio.wait({self._waiting})

    async def _wait(self) -> None:
        try:
            while self._answers:
                try:
                    await self._answers.popleft()
                except Exception as exc:
                    self._error = self._error or exc
        finally:
            self._waiting = None
            for dropped in self._answers:
                if inspect.iscoroutine(dropped):
                    dropped.close()
            self._answers.clear()
