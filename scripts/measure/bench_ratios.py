"""What is compared, and what it should be: ratios within one run."""

import dataclasses
import operator
from collections.abc import Iterator, Mapping
from typing import Any

from bench_peers import PEERS

ONE_AT_A_TIME = "one at a time"

MANY = 32
"""Requests at once from which on the targets of a full batch count."""

Figures = Mapping[str, Any]


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
    workload: str,
    num_running: int,
    results: Mapping[str, Figures],
    is_memory_own: bool = True,
) -> list[Ratio]:
    """The ratios that a workload is for, those to peers, and those to what the machine can do.

    What a ratio needs and was not measured, it is left out for.

    Args:
        workload: Its name.
        num_running: Requests at once.
        results: Figures by contender; the first is the one that is judged.
        is_memory_own: Whether contenders were alone in their processes.
    """
    ours, *others = results.values()
    ratios = list(_against_others(workload, num_running, results))
    ratios += _against_ceilings(workload, num_running, ours)
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
        ratios += _of_a_server(ours, is_memory_own)
    return ratios


def _against_others(
    workload: str, num_running: int, results: Mapping[str, Figures]
) -> Iterator[Ratio]:
    ours = next(iter(results.values()))["output_throughput"]
    peers = {
        name: one["output_throughput"] for name, one in results.items() if name.startswith(PEERS)
    }
    for candidates, target in _peer_targets(workload, num_running, list(peers)):
        if candidates:
            best = max(candidates, key=lambda name: peers[name])
            yield Ratio(f"output throughput: folojax / {best}", ours / peers[best], target)
    if ONE_AT_A_TIME in results:
        value = ours / results[ONE_AT_A_TIME]["output_throughput"]
        yield Ratio("output throughput: batched / one at a time", value, 5)


def _peer_targets(
    workload: str, num_running: int, peers: list[str]
) -> Iterator[tuple[list[str], float | None]]:
    """Groups of peers, of which the best is compared with, and what is wanted of that."""
    if workload == "single":
        torch = [name for name in peers if name.startswith(("transformers", "generate_batch"))]
        yield torch, 1.5
        yield [name for name in peers if name == "llama.cpp BF16"], 0.7
        yield [name for name in peers if name.startswith("llama.cpp")], None
    elif workload in ("uniform", "humaneval"):
        yield peers, 1.5 if num_running >= MANY else 1.3
    else:
        yield peers, None


def _against_ceilings(workload: str, num_running: int, ours: Figures) -> Iterator[Ratio]:
    if (share := ours.get("gemm_share")) is not None:
        is_judged = workload in ("uniform", "humaneval") and num_running >= MANY
        text = f"useful operations a second: folojax / products of {ours['dtype']} alone"
        yield Ratio(text, share, 0.7 if is_judged else None)
    if (value := ours.get("decode_over_bound")) is not None:
        yield Ratio(
            f"decode step of {ours['decode_rows']} rows: time / what bandwidth or products allow "
            f"({ours['decode_step_ms']:,.1f} / {ours['decode_bound_ms']:,.1f} ms)",
            value,
            2,
            False,
        )


def _of_a_server(ours: Figures, is_memory_own: bool) -> Iterator[Ratio]:
    yield Ratio("itl: p99 / p50", ours["p99_itl_ms"] / ours["p50_itl_ms"], 3, False)
    yield Ratio("padding waste", ours["padding_waste"], 0.15, False)
    yield Ratio("programs compiled while timed", ours["compilations_timed"], 0, False)
    if is_memory_own:
        value = ours["peak_memory_gib"] / (ours["weights_gib"] + ours["pool_gib"])
        yield Ratio("peak memory / weights and pool", value, 1.5, False)
