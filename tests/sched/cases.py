"""What may happen to a scheduler: strategies of hypothesis for configs, jobs, events, branches."""

from dataclasses import dataclass, replace

from hypothesis import strategies as st

from folojax.sched.config import SchedulerConfig
from folojax.sched.request import StopRule
from tests.sched.stub import BAD_TOKEN, VOCAB_SIZE, alone

MAX_MODEL_LEN = 24


@dataclass(frozen=True)
class Job:
    """A prompt and its samples: when they come, what they ask, and when the user gives up."""

    arrival_step: int
    prompt: tuple[int, ...]
    stop: StopRule
    priority: int = 0
    num_samples: int = 1
    is_grouped: bool = True
    skip_prefix_cache: bool = False
    abort_step: int | None = None
    is_aborted_mid_step: bool = False


@dataclass(frozen=True)
class Event:
    """Something that happens to the whole scheduler."""

    step: int
    kind: str  # preempt_all, reset_if_idle, reset, drop_plan, or drain
    is_mid_step: bool


@dataclass(frozen=True)
class Branch:
    """A request that goes on from where another stands, beside it or (moved) in its place.

    A moved one takes its K/V along through the host's memory, as a snapshot does.
    """

    step: int
    parent: int  # of the unfinished ones
    num_dropped: int  # of its last outputs
    stop: StopRule
    seed: int
    priority: int
    is_moved: bool
    is_mid_step: bool


@st.composite
def job_lists(draw: st.DrawFn, max_size: int = 8) -> list[Job]:
    """Jobs of which some begin alike, and some carry on where an earlier one ended."""
    jobs: list[Job] = []
    common = tuple(draw(st.lists(st.integers(0, 2), max_size=MAX_MODEL_LEN)))
    for _ in range(draw(st.integers(1, max_size))):
        tail = tuple(draw(st.lists(st.integers(0, 2), min_size=1, max_size=MAX_MODEL_LEN - 1)))
        prompt = common[: draw(st.sampled_from([0, 0, 6, MAX_MODEL_LEN]))] + tail
        is_next_turn = draw(st.booleans())
        if jobs and is_next_turn:
            earlier = draw(st.sampled_from(jobs))
            turn = alone(earlier.prompt, earlier.stop, MAX_MODEL_LEN)
            prompt = earlier.prompt + tuple(turn or ()) + tail[: draw(st.integers(0, 4))]
        prompt = prompt[: MAX_MODEL_LEN - 1]
        if draw(st.integers(0, 9)) == 0:
            prompt = (*prompt[:-1], BAD_TOKEN)
        ids = st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=1)
        jobs.append(
            Job(
                arrival_step=draw(st.integers(0, 12)),
                prompt=prompt,
                stop=StopRule(
                    max_tokens=draw(st.integers(0, MAX_MODEL_LEN)),
                    eos_token_ids=draw(ids),
                    stop_token_ids=draw(ids),
                    min_tokens=draw(st.integers(0, 4)),
                ),
                priority=draw(st.integers(-1, 2)),
                num_samples=draw(st.sampled_from([1, 1, 2, 4])),
                is_grouped=draw(st.booleans()),
                skip_prefix_cache=draw(st.integers(0, 5)) == 0,
                abort_step=draw(st.none() | st.integers(0, 20)),
                is_aborted_mid_step=draw(st.booleans()),
            )
        )
    return jobs


@st.composite
def configs(draw: st.DrawFn) -> SchedulerConfig:
    """Limits of every kind; any request fits in the pool alone, and often not much more does."""
    page_size = draw(st.integers(1, 8))
    least_pages = -(-(MAX_MODEL_LEN - 1) // page_size)
    max_num_seqs = draw(st.integers(1, 6))
    is_chunked = draw(st.booleans())
    least_budget = max_num_seqs if is_chunked else max(max_num_seqs, MAX_MODEL_LEN)
    has_states = draw(st.booleans())
    num_states = draw(st.sampled_from([0, 1, 2, 9])) if has_states else 0
    is_caching = num_states > 0 if has_states else draw(st.booleans())
    return SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=least_budget + draw(st.integers(0, 20)),
        max_model_len=MAX_MODEL_LEN,
        num_pages=least_pages + draw(st.integers(0, 3 * least_pages)),
        page_size=page_size,
        scheduling_policy=draw(st.sampled_from(["fcfs", "priority"])),
        enable_chunked_prefill=is_chunked,
        long_prefill_token_threshold=draw(st.integers(0, 8)) if is_chunked else 0,
        enable_prefix_caching=is_caching,
        has_states=has_states,
        num_prefix_states=num_states,
        max_plans_in_flight=draw(st.sampled_from([1, 2, 2, 3])),
        max_decode_steps=draw(st.sampled_from([1, 1, 2, 5])),
        num_host_pages=0 if has_states else draw(st.sampled_from([0, 2, 99])),
        min_swap_tokens=draw(st.sampled_from([0, 1, 7])),
        watermark=draw(st.sampled_from([0, 0, 0.1, 0.5])),
    )


events = st.lists(
    st.builds(
        Event,
        step=st.integers(0, 20),
        kind=st.sampled_from(["preempt_all", "reset_if_idle", "reset", "drop_plan", "drain"]),
        is_mid_step=st.booleans(),
    ),
    max_size=3,
)


branches = st.lists(
    st.builds(
        Branch,
        step=st.integers(1, 20),
        parent=st.integers(0, 7),
        num_dropped=st.sampled_from([0, 0, 1, 3]),
        stop=st.builds(
            StopRule,
            max_tokens=st.integers(1, MAX_MODEL_LEN),
            eos_token_ids=st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=1),
        ),
        seed=st.integers(0, 2),
        priority=st.integers(-1, 2),
        is_moved=st.booleans(),
        is_mid_step=st.booleans(),
    ),
    max_size=4,
)


def all_at_once(jobs: list[Job]) -> list[Job]:
    """The same jobs, arriving in the first step, and none aborted."""
    return [replace(job, arrival_step=0, abort_step=None) for job in jobs]
