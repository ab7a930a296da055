"""A cache whose entries are made once, whichever threads ask for them at the same time."""

import functools
import threading
from collections.abc import Callable, Hashable
from typing import TypeVar

T = TypeVar("T")


def once(function: Callable[..., T]) -> Callable[..., T]:
    """Caches a function of hashable positional arguments, as `functools.cache` does, but calls it once per key.

    Threads that ask for a key which another one is making wait for it; other keys are made meanwhile. A call that
    raises leaves nothing behind, and the next one tries again. A hit costs what it costs there.
    """
    made: dict[Hashable, T] = {}
    locks: dict[Hashable, threading.Lock] = {}
    guard = threading.Lock()

    def make(*key: Hashable) -> T:
        with guard:
            lock = locks.setdefault(key, threading.Lock())
        with lock:
            if key not in made:
                made[key] = function(*key)
            return made[key]

    cached = functools.cache(make)
    forget = cached.cache_clear

    def cache_clear() -> None:
        with guard:
            made.clear()
            locks.clear()
        forget()

    functools.update_wrapper(cached, function)
    cached.cache_clear = cache_clear  # type: ignore[method-assign]
    return cached
