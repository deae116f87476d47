"""Children of a lab's init that are forked for one function.

It runs in init's bare interpreter: only the standard library can be imported here.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection
from typing import NoReturn


class Children:
    """What forks them, and knows which signals init handles itself."""

    def __init__(self, own: Callable[[], Collection[int]], log: Callable[[str], None]) -> None:
        """`own`: signals of init's."""
        self._own = own
        self._log = log

    def fork(self, do: Callable[[], None]) -> int:
        """Run a function in a child that ends after it, without init's signal handlers."""
        numbers = self._own()
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        try:
            pid = os.fork()
            if pid == 0:
                self._run(do, numbers)
            return pid
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def _run(self, do: Callable[[], None], numbers: Collection[int]) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (*numbers, signal.SIGHUP, signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
            do()
            status = 0
        except OSError as error:
            self._log(str(error))
        finally:
            os._exit(status)
