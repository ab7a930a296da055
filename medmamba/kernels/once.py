"""A cache that computes each entry once, also under concurrent calls."""

import functools
import threading
from collections.abc import Callable, Hashable
from typing import TypeVar

T = TypeVar("T")


def once(function: Callable[..., T]) -> Callable[..., T]:
    """Caches a function of hashable positional arguments as `functools.cache` does, but calls it once per key.

    Threads that request a key while another computes it wait for the result; other keys proceed. A call that raises
    caches nothing, and the next call retries. A hit costs as much as in `functools.cache`.
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
