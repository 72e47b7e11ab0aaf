"""Random histories of one scheduler: what is asked of it when, and the laws of each single step."""

from collections import Counter, deque
from dataclasses import dataclass, field, replace

from hypothesis import strategies as st

from folojax.sched.config import SchedulerConfig
from folojax.sched.plan import SchedulerOutput
from folojax.sched.request import Request, RequestStatus, StopRule
from folojax.sched.scheduler import Scheduler
from tests.sched_stub import BAD_TOKEN, VOCAB_SIZE, StubResult, StubRunner, alone, kv_of

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
    return SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=least_budget + draw(st.integers(0, 20)),
        max_model_len=MAX_MODEL_LEN,
        num_pages=least_pages + draw(st.integers(0, 3 * least_pages)),
        page_size=page_size,
        policy=draw(st.sampled_from(["fcfs", "priority"])),
        enable_chunked_prefill=is_chunked,
        long_prefill_token_threshold=draw(st.integers(0, 8)) if is_chunked else 0,
        enable_prefix_caching=draw(st.booleans()),
        max_plans_in_flight=draw(st.sampled_from([1, 2, 2, 3])),
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


@dataclass
class History:
    """A run of jobs through one scheduler, with the laws of a single step asserted on the way."""

    config: SchedulerConfig
    jobs: list[Job]
    events: list[Event] = field(default_factory=list)
    requests: dict[str, Request] = field(default_factory=dict)
    admission_order: list[str] = field(default_factory=list)
    reported_finished: list[str] = field(default_factory=list)
    num_preemptions: int = 0
    num_discarded: Counter[str] = field(default_factory=Counter)
    num_waits_for_pages: int = 0

    def __post_init__(self) -> None:
        # Plans under way, what the device has made of them, and the tables of the rows that failed.
        self.flights: deque[tuple[SchedulerOutput, StubResult, dict[str, list[int]]]] = deque()
        self.scheduler = Scheduler(self.config)
        self.runner = StubRunner(self.config.page_size)

    def run(self) -> None:
        """Adds and aborts at the steps that the jobs name, until nothing is left."""
        # With all arrived, the head of the queue comes in at the latest when those that run are
        # done, and the most urgent of the running is never a victim: each takes at most its
        # tokens in steps.
        num_requests = sum(job.num_samples for job in self.jobs)
        num_tokens = sum(
            (len(job.prompt) + job.stop.max_tokens) * job.num_samples for job in self.jobs
        )
        last_step = 21 + (num_requests + 1) * num_tokens
        for step in range(last_step):
            for index, job in enumerate(self.jobs):
                if job.arrival_step == step:
                    self.add(index, job)
            self.disturb(step, is_mid_step=False)
            self.step(step)
            have_all_arrived = len(self.requests) == num_requests
            if have_all_arrived and not self.scheduler.has_unfinished_requests():
                break
        else:
            raise AssertionError(f"unfinished after {last_step} steps")
        self.step(last_step)  # reports the last to finish
        self.drain()

    def add(self, index: int, job: Job) -> None:
        """Adds the samples of a job, each a request of its own."""
        for seed in range(job.num_samples):
            request = Request(
                f"{index}#{seed}",
                job.prompt,
                job.stop,
                params=(seed, job.stop.max_tokens == 0),
                priority=job.priority,
                group=str(index) if job.is_grouped and job.num_samples > 1 else None,
                skip_prefix_cache=job.skip_prefix_cache and seed == 0,
            )
            self.requests[request.request_id] = request
            self.scheduler.add_request(request)

    def step(self, step: int) -> None:
        """Plans and runs as far ahead as it may, and takes in the earliest plan."""
        while len(self.flights) < self.config.max_plans_in_flight:
            was_unfinished = self.scheduler.has_unfinished_requests()
            plan = self.plan()
            is_full = len(self.flights) == self.config.max_plans_in_flight - 1
            if is_full and Event(step, "drop_plan", True) in self.events:
                self.runner.update_rows(plan)
                plan = self.plan()
            assert plan.is_empty == (not was_unfinished) or self.flights
            assert not (plan.is_empty and plan.page_copies)
            result = self.runner.run(plan)
            tables = {id_: list(self.runner.rows[id_].table) for id_ in result.failed}
            self.flights.append((plan, result, tables))
        self.disturb(step, is_mid_step=True)
        if self.flights:
            self.take_in()

    def drain(self) -> None:
        """Takes in all plans under way."""
        while self.flights:
            self.take_in()

    def take_in(self) -> None:
        """Takes in the earliest plan."""
        scheduler = self.scheduler
        plan, (sampled, failed), tables = self.flights.popleft()
        awaited = dict(scheduler.flights.awaited(plan))
        for request_id in sampled.keys() - awaited.keys():
            self.num_discarded[request_id] += 1
        for update in scheduler.update_from_output(plan, sampled, failed):
            request_id = update.request.request_id
            assert awaited[request_id] is update.request
            if request_id in sampled:
                assert update.new_token_ids == (sampled[request_id],)
                assert update.request.output_token_ids[-1:] == list(update.new_token_ids)
            else:
                assert update.request.is_finished
                assert update.new_token_ids == ()
                for page in tables.get(request_id, ()):
                    assert not scheduler.memory.cache.holds(page), "a page of a failed row"
        self.check()

    def plan(self):
        """Plans a step, and asserts the laws that any plan keeps."""
        scheduler, config = self.scheduler, self.config
        num_preemptions = sum(request.num_preemptions for request in self.requests.values())
        was_running = set(self.runner.rows)
        plan = scheduler.schedule()
        scheduler.check()
        assert plan.total_num_scheduled_tokens == sum(plan.num_scheduled_tokens.values())
        assert plan.total_num_scheduled_tokens <= config.max_num_batched_tokens
        assert all(n > 0 for n in plan.num_scheduled_tokens.values())
        assert len(plan.num_scheduled_tokens) <= scheduler.num_running <= config.max_num_seqs
        left = {*plan.finished_request_ids, *plan.preempted_request_ids}
        self.check_left_out(plan, was_running - left - set(plan.cached_requests.request_ids))
        if config.long_prefill_token_threshold:
            largest = max(plan.num_scheduled_tokens.values(), default=0)
            assert largest <= config.long_prefill_token_threshold
        if not config.enable_chunked_prefill:
            for request_id in plan.num_scheduled_tokens.keys() - plan.sampled_request_ids:
                assert self.requests[request_id].is_prompt_only
        if sum(request.num_preemptions for request in self.requests.values()) > num_preemptions:
            assert plan.new_requests == ()
        for new in plan.new_requests:
            request = self.requests[new.request_id]
            assert 0 <= new.num_computed_tokens < request.num_tokens
            if new.request_id not in self.admission_order:
                self.admission_order.append(new.request_id)
                assert request.num_cached_tokens == new.num_computed_tokens
            if request.skip_prefix_cache:
                assert new.num_computed_tokens == 0
        self.reported_finished.extend(plan.finished_request_ids)
        self.num_preemptions += len(plan.preempted_request_ids)
        return plan

    def check_left_out(self, plan: SchedulerOutput, names: set[str]) -> None:
        """Who is in the batch and not in the plan needs no more, or waits for one of those."""
        requests = [self.requests[name] for name in names]
        done = [request for request in requests if self.has_all_in_flight(request)]
        assert done or not requests
        if len(done) < len(requests):
            self.num_waits_for_pages += 1
            assert plan.new_requests == ()
        planned = [self.requests[name] for name in plan.num_scheduled_tokens]
        for request in planned:  # which is in flight now
            num_outputs = request.num_output_tokens + request.num_samples_in_flight
            assert num_outputs <= request.stop.max_tokens
            assert request.num_expected_tokens <= MAX_MODEL_LEN

    def has_all_in_flight(self, request: Request) -> bool:
        """Whether the host can foresee that a request ends with what is under way."""
        if request.num_planned_tokens < request.num_tokens:
            return False
        return (
            request.num_output_tokens + request.num_samples_in_flight >= request.stop.max_tokens
            or request.num_expected_tokens >= MAX_MODEL_LEN
        )

    def check(self) -> None:
        """Between two calls: the books agree, and cached pages hold what they are cached for."""
        self.scheduler.check()
        allocator = self.scheduler.allocator
        assert allocator.num_free + allocator.num_idle + allocator.num_used == allocator.num_pages
        for page, prefix in self.scheduler.memory.cache.prefixes():
            kvs = [0]
            for token in prefix:
                kvs.append(kv_of(token, kvs[-1]))
            assert self.runner.memory[page] == kvs[-self.config.page_size :]

    def disturb(self, step: int, is_mid_step: bool) -> None:
        """Aborts what is due, in whatever state it is, and does what happens to all."""
        ids = [
            request_id
            for request_id in self.requests
            for job in [self.jobs[int(request_id.split("#")[0])]]
            if job.abort_step == step and job.is_aborted_mid_step == is_mid_step
        ]
        self.scheduler.finish_requests(ids, RequestStatus.FINISHED_ABORTED)
        self.scheduler.check()
        for event in self.events:
            if (event.step, event.is_mid_step) != (step, is_mid_step):
                continue
            if event.kind == "drain":
                self.drain()
            elif event.kind == "preempt_all":
                self.scheduler.preempt_all()
            elif event.kind == "reset":
                assert self.scheduler.reset_prefix_cache(preempt_running=True)
                assert self.scheduler.allocator.num_free == self.config.num_pages
            elif event.kind == "reset_if_idle":
                is_running = self.scheduler.num_running > 0
                assert self.scheduler.reset_prefix_cache() == (not is_running)
                assert is_running or self.scheduler.memory.cache.num_pages == 0

    def expected(self, request: Request) -> list[int] | None:
        """What a request gives alone; None when it fails."""
        assert isinstance(request.params, tuple)
        return alone(request.prompt_token_ids, request.stop, MAX_MODEL_LEN, request.params[0])


def all_at_once(jobs: list[Job]) -> list[Job]:
    """The same jobs, arriving in the first step, and none aborted."""
    return [replace(job, arrival_step=0, abort_step=None) for job in jobs]
