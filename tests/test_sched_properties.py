"""Laws of the scheduler over random histories, with a model that reads what the pages hold.

The stub model's next token is a hash of all tokens before it. It gets them the way the device
does: it knows only the plans, writes each scheduled token into its page, and reads the sequence
back through its own copy of the page tables. So a page handed to two owners, freed too early or
listed in the wrong place changes the output.
"""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from folojax.sched.plan import SchedulerOutput
from folojax.sched.request import Request, RequestStatus, StopRule
from folojax.sched.scheduler import Scheduler, SchedulerConfig

VOCAB_SIZE = 11
MAX_MODEL_LEN = 24


def next_token(token_ids: list[int]) -> int:
    return hash(tuple(token_ids)) % VOCAB_SIZE


def alone(prompt: tuple[int, ...], stop: StopRule) -> list[int]:
    """What a request gives with no scheduler at all; written without `StopRule.check`."""
    tokens = list(prompt)
    while True:
        tokens.append(next_token(tokens))
        output = tokens[len(prompt) :]
        may_stop = len(output) >= stop.min_tokens
        if (may_stop and output[-1] in stop.eos_token_ids | stop.stop_token_ids) or (
            len(output) == stop.max_tokens or len(tokens) == MAX_MODEL_LEN
        ):
            return output


@dataclass
class StubRunner:
    """Rows and pages as a device would hold them, built from plans alone."""

    page_size: int
    pages: dict[tuple[int, int], int] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    tables: dict[str, list[int]] = field(default_factory=dict)
    num_computed: dict[str, int] = field(default_factory=dict)

    def run(self, plan: SchedulerOutput) -> dict[str, int]:
        """Runs a plan, and returns the sampled tokens by request id."""
        for request_id in plan.finished_request_ids + plan.preempted_request_ids:
            self.tokens.pop(request_id, None)
            self.tables.pop(request_id, None)
            self.num_computed.pop(request_id, None)
        for new in plan.new_requests:
            assert new.request_id not in self.tokens
            self.tokens[new.request_id] = [*new.prompt_token_ids, *new.output_token_ids]
            self.tables[new.request_id] = list(new.page_ids)
            self.num_computed[new.request_id] = new.num_computed_tokens
        cached = plan.cached_requests
        for request_id, token_ids, num_computed, page_ids in zip(
            cached.request_ids,
            cached.new_token_ids,
            cached.num_computed_tokens,
            cached.new_page_ids,
            strict=True,
        ):
            assert self.num_computed[request_id] == num_computed
            self.tokens[request_id].extend(token_ids)
            self.tables[request_id].extend(page_ids)
        batch = [*cached.request_ids, *(new.request_id for new in plan.new_requests)]
        assert list(plan.num_scheduled_tokens) == batch
        assert set(batch) == set(self.tokens), "a row holds a place and computes nothing"

        for request_id, num_tokens in plan.num_scheduled_tokens.items():
            start = self.num_computed[request_id]
            for position in range(start, start + num_tokens):
                slot = self._slot(request_id, position)
                self.pages[slot] = self.tokens[request_id][position]
            self.num_computed[request_id] += num_tokens
        is_complete = {id_: self.num_computed[id_] == len(self.tokens[id_]) for id_ in batch}
        assert plan.sampled_request_ids == tuple(id_ for id_ in batch if is_complete[id_])
        return {id_: next_token(self._read(id_)) for id_ in plan.sampled_request_ids}

    def _slot(self, request_id: str, position: int) -> tuple[int, int]:
        page, offset = divmod(position, self.page_size)
        return self.tables[request_id][page], offset

    def _read(self, request_id: str) -> list[int]:
        positions = range(self.num_computed[request_id])
        return [self.pages[self._slot(request_id, position)] for position in positions]


@dataclass(frozen=True)
class Job:
    """One request of a history: when it comes, what it asks, and when the user gives up."""

    arrival_step: int
    prompt: tuple[int, ...]
    stop: StopRule
    priority: int
    abort_step: int | None
    is_aborted_mid_step: bool


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    ids = st.frozensets(st.integers(0, VOCAB_SIZE - 1), max_size=1)
    return Job(
        arrival_step=draw(st.integers(0, 12)),
        prompt=tuple(draw(st.lists(st.integers(0, 2), min_size=1, max_size=MAX_MODEL_LEN - 1))),
        stop=StopRule(
            max_tokens=draw(st.integers(1, MAX_MODEL_LEN)),
            eos_token_ids=draw(ids),
            stop_token_ids=draw(ids),
            min_tokens=draw(st.integers(0, 4)),
        ),
        priority=draw(st.integers(-1, 2)),
        abort_step=draw(st.none() | st.integers(0, 20)),
        is_aborted_mid_step=draw(st.booleans()),
    )


@st.composite
def configs(draw: st.DrawFn) -> SchedulerConfig:
    page_size = draw(st.integers(1, 8))
    # Any request must fit in the pool alone; often, not much more does.
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
    )


@dataclass
class History:
    """A run of jobs through one scheduler, with the laws of a single step asserted on the way."""

    config: SchedulerConfig
    jobs: list[Job]
    requests: dict[str, Request] = field(default_factory=dict)
    admission_order: list[str] = field(default_factory=list)
    reported_finished: list[str] = field(default_factory=list)
    num_preemptions: int = 0

    def run(self) -> None:
        """Adds and aborts at the steps that the jobs name, until nothing is left."""
        self.scheduler = Scheduler(self.config)
        self.runner = StubRunner(self.config.page_size)
        # With all arrived, the head of the queue comes in at the latest when those that run are
        # done, and the most urgent of the running is never a victim: each takes at most its
        # tokens in steps.
        num_tokens = sum(len(j.prompt) + j.stop.max_tokens for j in self.jobs)
        last_step = 21 + (len(self.jobs) + 1) * num_tokens
        for step in range(last_step):
            for index, job in enumerate(self.jobs):
                if job.arrival_step == step:
                    request = Request(str(index), job.prompt, job.stop, None, job.priority)
                    self.requests[str(index)] = request
                    self.scheduler.add_request(request)
            self.abort(step, is_mid_step=False)
            self.step(step)
            have_all_arrived = len(self.requests) == len(self.jobs)
            if have_all_arrived and not self.scheduler.has_unfinished_requests():
                break
        else:
            raise AssertionError(f"unfinished after {last_step} steps")
        self.step(last_step)  # reports the last to finish

    def step(self, step: int) -> None:
        """Plans, runs and takes in one step."""
        scheduler = self.scheduler
        was_unfinished = scheduler.has_unfinished_requests()
        was_running = set(self.runner.tokens)
        plan = scheduler.schedule()
        scheduler.check()

        config = self.config
        assert plan.total_num_scheduled_tokens == sum(plan.num_scheduled_tokens.values())
        assert plan.total_num_scheduled_tokens <= config.max_num_batched_tokens
        assert all(n > 0 for n in plan.num_scheduled_tokens.values())
        assert len(plan.num_scheduled_tokens) == scheduler.num_running <= config.max_num_seqs
        assert plan.is_empty == (not was_unfinished)
        assert not (plan.preempted_request_ids and plan.new_requests)
        left = {*plan.finished_request_ids, *plan.preempted_request_ids}
        assert was_running - left == set(plan.cached_requests.request_ids)
        if config.long_prefill_token_threshold:
            largest = max(plan.num_scheduled_tokens.values(), default=0)
            assert largest <= config.long_prefill_token_threshold
        if not config.enable_chunked_prefill:
            assert len(plan.sampled_request_ids) == len(plan.num_scheduled_tokens)
        for new in plan.new_requests:
            if new.request_id not in self.admission_order:
                self.admission_order.append(new.request_id)
        self.reported_finished.extend(plan.finished_request_ids)
        self.num_preemptions += len(plan.preempted_request_ids)

        sampled = self.runner.run(plan)
        self.abort(step, is_mid_step=True)
        for update in scheduler.update_from_output(plan, sampled):
            assert update.new_token_ids == (sampled[update.request.request_id],)
            assert update.request.output_token_ids[-1:] == list(update.new_token_ids)
        scheduler.check()

    def abort(self, step: int, is_mid_step: bool) -> None:
        """Aborts what is due, in whatever state it is, not yet added included."""
        ids = [
            str(index)
            for index, job in enumerate(self.jobs)
            if job.abort_step == step and job.is_aborted_mid_step == is_mid_step
        ]
        self.scheduler.finish_requests(ids, RequestStatus.FINISHED_ABORTED)


@settings(max_examples=1000, deadline=None)
@given(config=configs(), jobs=st.lists(jobs(), min_size=1, max_size=8))
def test_laws_over_random_histories(config: SchedulerConfig, jobs: list[Job]):
    history = History(config, jobs)
    history.run()

    for name, request in history.requests.items():
        job = jobs[int(name)]
        expected = alone(job.prompt, job.stop)
        assert request.is_finished
        if request.status is RequestStatus.FINISHED_ABORTED:
            assert request.output_token_ids == expected[: len(request.output_token_ids)]
            assert len(request.output_token_ids) < len(expected)
        else:
            assert request.output_token_ids == expected
            has_stopped = request.status is RequestStatus.FINISHED_STOPPED
            assert has_stopped == (
                len(expected) >= job.stop.min_tokens
                and expected[-1] in job.stop.eos_token_ids | job.stop.stop_token_ids
            )
        assert (request.page_ids, request.num_computed_tokens) == ([], 0)

    # Nothing stays behind, and every end was reported once.
    assert history.scheduler.allocator.num_free == config.num_pages
    assert history.scheduler.allocator.extent == 0
    assert (history.scheduler.num_running, history.scheduler.num_waiting) == (0, 0)
    assert not history.scheduler.has_finished_requests()
    assert all(history.scheduler.get_request(name) is None for name in history.requests)
    assert sorted(history.reported_finished) == sorted(history.requests)
    assert history.runner.tokens == {}
    assert history.num_preemptions == sum(r.num_preemptions for r in history.requests.values())

    if config.policy == "fcfs":
        arrivals = [history.requests[name].arrival_index for name in history.admission_order]
        assert arrivals == sorted(arrivals)


@settings(max_examples=100, deadline=None)
@given(config=configs(), jobs=st.lists(jobs(), min_size=2, max_size=8))
def test_most_urgent_is_never_a_victim(config: SchedulerConfig, jobs: list[Job]):
    together = [Job(0, job.prompt, job.stop, job.priority, None, False) for job in jobs]
    history = History(config, together)
    history.run()
    requests = history.requests.values()
    if config.policy == "priority":
        assert min(requests, key=lambda request: request.urgency).num_preemptions == 0
    else:
        assert min(requests, key=lambda request: request.arrival_index).num_preemptions == 0


def test_histories_do_preempt():
    """The laws above would be hollow if pages never ran out; here they do, under both policies."""
    for policy in ("fcfs", "priority"):
        config = SchedulerConfig(
            max_num_seqs=4,
            max_num_batched_tokens=16,
            max_model_len=MAX_MODEL_LEN,
            num_pages=8,
            page_size=3,
            policy=policy,
        )
        stop = StopRule(max_tokens=MAX_MODEL_LEN)
        jobs = [Job(0, (n, 1), stop, -n, None, False) for n in range(4)]
        history = History(config, jobs)
        history.run()
        assert history.num_preemptions > 0
        for name, request in history.requests.items():
            assert request.output_token_ids == alone(jobs[int(name)].prompt, stop)
