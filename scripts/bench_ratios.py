"""What is compared, and what it should be: ratios within one run."""

import dataclasses
import operator
from collections.abc import Iterator, Mapping
from typing import Any

PEERS = "transformers"
ONE_AT_A_TIME = "one at a time"


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A ratio and its target.

    Attributes:
        text: What is divided by what.
        value: The ratio.
        target: None: it has none.
        is_floor: Whether the target is the least that is wanted, or the most.
    """

    text: str
    value: float
    target: float | None = None
    is_floor: bool = True

    @property
    def is_met(self) -> bool:
        """Whether the target is reached; without one it is."""
        if self.target is None:
            return True
        compare = operator.ge if self.is_floor else operator.le
        return compare(self.value, self.target)


def find_ratios(
    workload: str, num_running: int, results: Mapping[str, Mapping[str, Any]]
) -> list[Ratio]:
    """The ratios that a workload is for, and those to peers.

    Args:
        workload: Its name.
        num_running: Requests at once.
        results: Figures by contender; the first is the one that is judged.
    """
    ours, *others = results.values()
    ratios = list(_against_others(workload, num_running, results))
    if workload == "group":
        value = ours["prefill_tokens_computed"] / others[0]["prefill_tokens_computed"]
        ratios.append(Ratio("prefill tokens computed: shared / separate", value, 1 / 6, False))
    if workload == "prefix":
        fresh, cached = (ours["by_label"][f"{kind} prefix"] for kind in ("fresh", "cached"))
        value = fresh["median_ttft_ms"] / cached["median_ttft_ms"]
        ratios.append(Ratio("median ttft: fresh / cached prefix", value, 5))
    if workload == "long":
        chunked, whole = (one["by_label"]["short"]["max_itl_ms"] for one in (ours, others[0]))
        text = (
            "worst gap between two tokens of a short request: in chunks / whole prompts "
            f"({chunked:,.0f} / {whole:,.0f} ms)"
        )
        ratios.append(Ratio(text, chunked / whole, 1 / 3, False))
    if workload == "sharegpt":
        value = ours["p99_itl_ms"] / ours["p50_itl_ms"]
        ratios.append(Ratio("itl: p99 / p50", value, 3, False))
        ratios.append(Ratio("padding waste", ours["padding_waste"], 0.15, False))
    return ratios


def _against_others(
    workload: str, num_running: int, results: Mapping[str, Mapping[str, Any]]
) -> Iterator[Ratio]:
    ours = next(iter(results.values()))["output_throughput"]
    peers = {
        name: one["output_throughput"] for name, one in results.items() if name.startswith(PEERS)
    }
    if peers:
        best = max(peers, key=lambda name: peers[name])
        target = None
        if workload == "single" or (workload in ("uniform", "humaneval") and num_running >= 32):
            target = 1.5
        elif workload in ("uniform", "humaneval"):
            target = 1.3
        yield Ratio(f"output throughput: folojax / {best}", ours / peers[best], target)
    if ONE_AT_A_TIME in results:
        value = ours / results[ONE_AT_A_TIME]["output_throughput"]
        yield Ratio("output throughput: batched / one at a time", value, 5)
