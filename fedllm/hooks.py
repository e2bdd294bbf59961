"""Calling what a program hands in to be told of a run: plain functions, or such that return an awaitable."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias, TypeVar

__all__ = ["Hook", "SiloHook", "Told", "call"]

LAST_ANSWER_S: Final = 1.0
"""How long the end of a run waits for answers."""
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
        """Tell it now. Raises what it raises; what its answer raises, `check` does."""
        if self._hook is None:
            return
        answer = self._hook(name, what)
        if inspect.isawaitable(answer):
            self._answers.append(answer)
            if self._waiting is None:
                self._waiting = asyncio.create_task(self._wait())

    def check(self) -> None:
        """Raise the first error of an answer, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    async def aclose(self) -> None:
        """Give answers under way `LAST_ANSWER_S`, whatever they raise, and drop those to come. Leaves no task."""
        if (waiting := self._others()) is None:
            return
        try:
            await asyncio.wait({waiting}, timeout=LAST_ANSWER_S)
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    def _others(self) -> asyncio.Task[None] | None:
        """The task that waits for answers, unless this is called by one of them: it may end the run."""
        return None if self._waiting is asyncio.current_task() else self._waiting

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
