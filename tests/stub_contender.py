"""A contender that measures nothing: for tests of the processes that contenders live in."""

import os
from typing import Any


class StubContender:
    """Tells its process, and fails on request."""

    def __init__(self, name: str) -> None:
        if name == "cannot be made":
            raise ValueError("this contender cannot be made")
        self.name = name

    def prepare(self, workload: Any) -> dict[str, Any]:
        return {"pid": os.getpid()}

    def run(self, workload: Any) -> dict[str, Any]:
        if workload == "fails":
            raise ValueError("this workload fails")
        if workload == "dies":
            os._exit(7)
        return {"workload": workload}

    def close(self) -> None:
        pass
