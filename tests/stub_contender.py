"""A contender that measures nothing: for tests of the processes that contenders live in."""

import os
import threading
from typing import Any


class StubContender:
    """Tells its process, and fails on request."""

    def __init__(self, name: str) -> None:
        if name == "cannot be made":
            raise ValueError("this contender cannot be made")
        self.name = name
        self._is_over = threading.Event()
        if name == "with a thread":  # the process ends with it, and not before
            threading.Thread(target=self._is_over.wait).start()

    def prepare(self, workload: Any) -> dict[str, Any]:
        return {"pid": os.getpid()}

    def run(self, workload: Any) -> dict[str, Any]:
        if workload == "fails":
            raise ValueError("this workload fails")
        if workload == "dies":
            os._exit(7)
        return {"workload": workload}

    def close(self) -> None:
        self._is_over.set()
