"""The latest job: what somebody keeps asking for anew is done in the background, and only the newest of it.

There is a thread while there is something to do, and none otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

IsStopped = Callable[[], bool]


class Latest:
    """Runs the latest of the jobs it is given. A new job stops the one that runs.

    Args:
        run: does a job; it is also given a function that says whether to stop.
        pause: how many seconds a job waits for a newer one, so that a slider that is dragged starts nothing in vain.
    """

    def __init__(self, run: Callable[[Any, IsStopped], None], pause: float = 0.15) -> None:
        self.run, self.pause = run, pause
        self.closed = False
        self._changed = threading.Condition()
        self._job: Any = None
        self._asked = 0
        self._thread: threading.Thread | None = None

    def ask(self, job: Any) -> None:
        """Do a job, unless a newer one comes within the pause. Nothing is done any more after `close`."""
        with self._changed:
            if self.closed:
                return
            self._replace(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="repe-latest", daemon=True)
                self._thread.start()

    def stop(self) -> bool:
        """Stop what runs, forget what waits, and return when the thread has ended: whether there was one."""
        with self._changed:
            self._replace(None)
            thread = self._thread
        if thread is not None:
            thread.join()
        return thread is not None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until there is nothing left to do; false if that takes longer than `timeout` seconds."""
        if (thread := self._thread) is not None:
            thread.join(timeout)
        return self._thread is None

    def close(self) -> None:
        """Stop for good."""
        self.closed = True
        self.stop()

    def _replace(self, job: Any) -> None:
        self._job = job
        self._asked += 1
        self._changed.notify_all()

    def _work(self) -> None:
        try:
            while (due := self._next()) is not None:
                job, number = due
                self.run(job, partial(self._is_past, number))
        except BaseException:
            self._thread = None
            raise

    def _is_past(self, number: int) -> bool:
        return self._asked != number

    def _next(self) -> tuple[Any, int] | None:
        """The job to do and its number, once nothing newer has come within the pause; None ends the thread."""
        with self._changed:
            while self._job is not None:
                job, number = self._job, self._asked
                if not self._changed.wait_for(partial(self._is_past, number), self.pause):
                    self._job = None
                    return job, number
            self._thread = None
            return None
