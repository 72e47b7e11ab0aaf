"""Random histories of one scheduler: what is asked of it when, and the laws of each single step."""

from collections import Counter, deque
from dataclasses import dataclass, field

from folojax.sched.config import SchedulerConfig
from folojax.sched.request import Request, RequestStatus
from folojax.sched.scheduler import Scheduler
from folojax.sched.step_plan import StepPlan
from tests.sched.cases import MAX_MODEL_LEN, Branch, Event, Job
from tests.sched.stub import StubRequest, StubResult, StubRunner, alone, kv_of


@dataclass
class History:
    """A run of jobs through one scheduler, with the laws of a single step asserted on the way."""

    config: SchedulerConfig
    jobs: list[Job]
    events: list[Event] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    num_given: dict[str, int] = field(default_factory=dict)  # outputs that a branch began with
    requests: dict[str, Request] = field(default_factory=dict)
    admission_order: list[str] = field(default_factory=list)
    reported_finished: list[str] = field(default_factory=list)
    num_preemptions: int = 0
    num_discarded: Counter[str] = field(default_factory=Counter)
    num_waits_for_pages: int = 0

    def __post_init__(self) -> None:
        # Plans under way, what the device has made of them, and the tables of the rows that failed.
        self.flights: deque[tuple[StepPlan, StubResult, dict[str, list[int]]]] = deque()
        self.scheduler = Scheduler(self.config)
        self.runner = StubRunner(self.config.page_size, has_states=self.config.has_states)

    def run(self) -> None:
        """Adds and aborts at the steps that the jobs name, until nothing is left."""
        # With all arrived, the head of the queue comes in at the latest when those that run are
        # done, and the most urgent of the running is never a victim: each takes at most its
        # tokens in steps.
        num_requests = sum(job.num_samples for job in self.jobs)
        num_tokens = sum(
            (len(job.prompt) + job.stop.max_tokens) * job.num_samples for job in self.jobs
        )
        num_tokens += len(self.branches) * 2 * MAX_MODEL_LEN
        last_step = 21 + (num_requests + len(self.branches) + 1) * num_tokens
        for step in range(last_step):
            for index, job in enumerate(self.jobs):
                if job.arrival_step == step:
                    self.add(index, job)
            self.disturb(step, is_mid_step=False)
            self.step(step)
            have_all_arrived = len(self.requests) - len(self.num_given) == num_requests
            if have_all_arrived and not self.scheduler.has_unfinished_requests():
                break
        else:
            raise AssertionError(f"unfinished after {last_step} steps")
        self.step(last_step)  # reports the last to finish
        self.drain()

    def add(self, index: int, job: Job) -> None:
        """Adds the samples of a job, each a request of its own."""
        for seed in range(job.num_samples):
            request = StubRequest(
                f"{index}#{seed}",
                job.prompt,
                job.stop,
                seed=seed,
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
            assert not (plan.is_empty and (plan.page_moves.copies or plan.page_moves.loads))
            result = self.runner.run(plan)
            for request_id, row in self.runner.rows.items():
                request = self.requests[request_id]
                is_running = request.status is RequestStatus.RUNNING
                assert not is_running or row.num_computed == request.num_planned_tokens
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
        awaited = dict(plan.awaited)
        for request_id in sampled.keys() - awaited.keys():
            self.num_discarded[request_id] += len(sampled[request_id])
        for update in scheduler.update_from_output(plan, sampled, failed):
            request_id = update.request.request_id
            assert awaited[request_id] is update.request
            if request_id in sampled:
                tokens = update.new_token_ids
                assert tokens == sampled[request_id][: len(tokens)] != ()
                assert tuple(update.request.output_token_ids[-len(tokens) :]) == tokens
                self.num_discarded[request_id] += len(sampled[request_id]) - len(tokens)
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
        num_steps = plan.num_decode_steps
        assert num_steps in (1, config.max_decode_steps)
        assert num_steps == 1 or not scheduler.num_waiting
        tokens_in_step = [
            min(n, 1) if num_steps > 1 else n for n in plan.num_scheduled_tokens.values()
        ]
        assert sum(tokens_in_step) <= config.max_num_batched_tokens
        assert max(plan.num_scheduled_tokens.values(), default=0) <= max(
            num_steps, max(tokens_in_step, default=0)
        )
        assert all(n > 0 for n in plan.num_scheduled_tokens.values())
        assert len(plan.num_scheduled_tokens) <= scheduler.num_running <= config.max_num_seqs
        left = {*plan.finished_request_ids, *plan.preempted_request_ids}
        self.check_left_out(plan, was_running - left - plan.num_scheduled_tokens.keys())
        if config.long_prefill_token_threshold:
            assert max(tokens_in_step, default=0) <= config.long_prefill_token_threshold
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

    def check_left_out(self, plan: StepPlan, names: set[str]) -> None:
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
        allocator = self.scheduler.memory.allocator
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
            if request_id not in self.num_given
            for job in [self.jobs[int(request_id.split("#")[0])]]
            if job.abort_step == step and job.is_aborted_mid_step == is_mid_step
        ]
        self.scheduler.abort_requests(ids)
        self.scheduler.check()
        for number, branch in enumerate(self.branches):
            if (branch.step, branch.is_mid_step) == (step, is_mid_step):
                self.branch(f"branch {number}", branch)
        for event in self.events:
            if (event.step, event.is_mid_step) != (step, is_mid_step):
                continue
            if event.kind == "drain":
                self.drain()
            elif event.kind == "preempt_all":
                self.scheduler.preempt_all()
            elif event.kind == "reset":
                assert self.scheduler.reset_prefix_cache(preempt_running=True)
                assert self.scheduler.memory.allocator.num_free == self.config.num_pages
            elif event.kind == "reset_if_idle":
                is_running = self.scheduler.num_running > 0
                assert self.scheduler.reset_prefix_cache() == (not is_running)
                assert is_running or self.scheduler.memory.cache.num_pages == 0

    def branch(self, name: str, branch: Branch) -> None:
        """Has a request go on from the tokens of another that are known."""
        if branch.is_moved:
            self.drain()
        parents = [r for r in self.requests.values() if not r.is_finished]
        if not parents:
            return
        parent = parents[branch.parent % len(parents)]
        outputs = parent.output_token_ids[: max(parent.num_output_tokens - branch.num_dropped, 0)]
        num_tokens = parent.num_prompt_tokens + len(outputs)
        if len(outputs) >= branch.stop.max_tokens or num_tokens >= MAX_MODEL_LEN:
            return
        request = StubRequest(
            name,
            parent.prompt_token_ids,
            branch.stop,
            seed=branch.seed,
            priority=branch.priority,
            output_token_ids=list(outputs),
        )
        if not branch.is_moved:
            request.forked_from = parent
        elif parent.status is RequestStatus.RUNNING and not self.config.has_states:
            num_saved = min(parent.num_computed_tokens, num_tokens - 1)
            table = self.runner.rows[parent.request_id].table
            pages = [
                list(self.runner.memory[page])
                for page in table[: -(-num_saved // self.config.page_size)]
            ]
            if num_saved:
                request.saved = self.scheduler.memory.host.adopt(num_saved)
                self.runner.host[request.saved.key] = pages
        if branch.is_moved:
            self.scheduler.abort_requests(parent.request_id)
        self.num_given[name] = len(outputs)
        self.requests[name] = request
        self.scheduler.add_request(request)
        self.scheduler.check()

    def expected(self, request: Request) -> list[int] | None:
        """What a request gives alone; None when it fails."""
        assert isinstance(request, StubRequest)
        given = request.output_token_ids[: self.num_given.get(request.request_id, 0)]
        return alone(request.prompt_token_ids, request.stop, MAX_MODEL_LEN, request.seed, given)
