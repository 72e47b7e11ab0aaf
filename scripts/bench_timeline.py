"""What an engine holds, step by step: samples that run and wait, and pages."""

from folojax import LLM

FIELDS = ("running", "waiting", "used_pages", "idle_pages", "free_pages")


class Timeline:
    """Looks at an engine after each step; a look costs microseconds."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._times_s: list[float] = []
        self._values: dict[str, list[int]] = {name: [] for name in FIELDS}

    def look(self, now_s: float) -> None:
        """Notes how the engine stands, at a time of any clock."""
        metrics = self._llm.metrics()
        used, idle = metrics.num_used_pages, metrics.num_cached_pages
        free = metrics.num_pages - used - idle
        self._times_s.append(now_s)
        now = (metrics.num_running, metrics.num_waiting, used, idle, free)
        for name, value in zip(FIELDS, now, strict=True):
            self._values[name].append(value)

    def as_dict(self, start_s: float) -> dict[str, list[float] | list[int]]:
        """The looks: "time_s" from a start on the same clock, and the FIELDS.

        `running` and `waiting` are samples; idle pages belong to nobody and are kept for prompts
        that begin alike.
        """
        return {"time_s": [time_s - start_s for time_s in self._times_s], **self._values}
