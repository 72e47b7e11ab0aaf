"""A model and a device that are simple enough to be right, and that notice any wrong page.

The K/V of a token are one number, a hash of the token and of the number before it: like real K/V
they depend on all tokens so far. The device knows only the plans: it does the copies, writes each
scheduled token into its page, reads the number before it from there, and after every step finds
each row's own numbers in its pages. So a page that is handed out twice, freed too early, hit for
the wrong tokens, copied, saved or loaded too late or listed in the wrong place is noticed in that
step.

It feeds sampled tokens back by itself, and so can run plans that were made before these tokens
were known.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from folojax.sched.request import Request, StopRule
from folojax.sched.step_plan import StepPlan

VOCAB_SIZE = 11
BAD_TOKEN = 99  # its K/V are not a number, and neither are any after it
NAN = -1


def kv_of(token: int, before: int) -> int:
    """The K/V of a token behind a token whose K/V are `before`."""
    return NAN if token == BAD_TOKEN or before == NAN else hash((before, token)) & 0xFFFFFFFF


def sample(kv: int, seed: int) -> int:
    """The token that follows, of a request with that seed."""
    return hash((kv, seed)) % VOCAB_SIZE


def alone(
    prompt: tuple[int, ...],
    stop: StopRule,
    max_model_len: int,
    seed: int = 0,
    outputs: Sequence[int] = (),
) -> list[int] | None:
    """What a request gives with no scheduler at all; None for one that fails.

    The first `outputs` are given, and do not end it.
    """
    tokens, kv = [*prompt, *outputs], 0
    for token in tokens:
        kv = kv_of(token, kv)
    if kv == NAN:
        return None
    while len(tokens) - len(prompt) < stop.max_tokens and len(tokens) < max_model_len:
        tokens.append(sample(kv, seed))
        kv = kv_of(tokens[-1], kv)
        may_stop = len(tokens) - len(prompt) >= stop.min_tokens
        if may_stop and tokens[-1] in stop.eos_token_ids | stop.stop_token_ids:
            break
    return tokens[len(prompt) :]


class StubResult(NamedTuple):
    """What the device says of a step."""

    sampled: dict[str, tuple[int, ...]]
    failed: dict[str, str]


@dataclass(eq=False)
class StubRequest(Request):
    """A request with what this device samples by."""

    seed: int = field(default=0, kw_only=True)


@dataclass
class StubRow:
    """One request of the batch."""

    tokens: list[int]
    table: list[int]
    num_computed: int
    seed: int
    is_prompt_only: bool
    kvs: list[int] = field(default_factory=list)  # what its pages must hold, token by token
    state: int = 0  # of a device with states: the K/V of the last token that is computed


@dataclass
class StubRunner:
    """Rows and pages as a device would hold them, built from plans alone."""

    page_size: int
    rows: dict[str, StubRow] = field(default_factory=dict)
    memory: dict[int, list[int]] = field(default_factory=dict)  # page -> K/V
    host: dict[int, list[list[int]]] = field(default_factory=dict)  # key -> K/V of its pages
    has_states: bool = False  # K/V depend on the row's state, and not on its pages
    kept_states: dict[int, int] = field(default_factory=dict)  # by place
    num_copied_pages: int = 0
    num_loaded_pages: int = 0
    num_computed_tokens: int = 0

    def run(self, plan: StepPlan) -> StubResult:
        """Runs a plan, and checks every page of every row."""
        self.update_rows(plan)
        self.move_pages(plan)
        for request_id, place in plan.state_loads:
            if request_id in self.rows:
                self.rows[request_id].state = self.kept_states[place]
        batch = list(plan.num_scheduled_tokens)
        assert plan.new_page_ids.keys() | {new.request_id for new in plan.new_requests} <= set(
            batch
        )
        assert set(batch) <= set(self.rows)
        result = StubResult({}, {})
        if plan.num_decode_steps == 1:
            self.run_step(plan, plan.num_scheduled_tokens, result)
        else:
            assert plan.sampled_request_ids == tuple(batch)
            for step in range(plan.num_decode_steps):
                names = [id_ for id_ in batch if plan.num_scheduled_tokens[id_] > step]
                self.run_step(plan, dict.fromkeys(names, 1), result)
        for request_id, place in plan.state_saves:
            self.kept_states[place] = self.rows[request_id].state
        for request_id in plan.sampled_request_ids:
            if request_id not in result.failed:
                assert len(result.sampled[request_id]) == plan.num_samples(request_id)
        return result

    def run_step(self, plan: StepPlan, num_tokens: dict[str, int], result: StubResult):
        """Computes tokens of rows, and samples behind the last of each."""
        for request_id in num_tokens:
            self.compute(self.rows[request_id], num_tokens[request_id])
        for row in self.rows.values():
            assert self.read(row) == row.kvs, "a page was written by somebody else"
        for request_id in num_tokens:
            row = self.rows[request_id]
            has_sample = len(row.tokens) == row.num_computed and not row.is_prompt_only
            assert has_sample == (request_id in plan.sampled_request_ids)
            kv = row.kvs[-1]
            if kv == NAN and (has_sample or row.is_prompt_only):
                result.failed[request_id] = "not a number"
            elif has_sample:
                before = result.sampled.get(request_id, ())
                result.sampled[request_id] = (*before, sample(kv, row.seed))
            if has_sample:
                row.tokens.append(sample(kv, row.seed))

    def update_rows(self, plan: StepPlan) -> None:
        """Takes in which requests left, joined and grew."""
        for request_id in plan.finished_request_ids + plan.preempted_request_ids:
            self.rows.pop(request_id, None)
        for new in plan.new_requests:
            assert new.request_id not in self.rows
            assert isinstance(new, StubRequest)
            row = self.rows[new.request_id] = StubRow(
                tokens=[*new.prompt_token_ids, *new.output_token_ids],
                table=list(new.page_ids),
                num_computed=new.num_computed_tokens,
                seed=new.seed,
                is_prompt_only=new.is_prompt_only,
                state=-3,  # what the slot's last owner has left
            )
            for token in row.tokens[: row.num_computed]:
                row.kvs.append(kv_of(token, row.kvs[-1] if row.kvs else 0))
        for request_id, page_ids in plan.new_page_ids.items():
            self.rows[request_id].table.extend(page_ids)

    def move_pages(self, plan: StepPlan) -> None:
        """Saves; reads every source, then writes every target; loads; and forgets."""
        saves, copies, loads, dropped = plan.page_moves
        for save in saves:
            assert save.key not in self.host
            self.host[save.key] = [list(self.memory[page]) for page in save.page_ids]
        targets = [target for _, target in copies]
        assert len(targets) == len(set(targets)), "two copies into one page"
        assert all(source != target for source, target in copies)
        contents = [list(self.memory[source]) for source, _ in copies]
        self.memory.update(zip(targets, contents, strict=True))
        self.num_copied_pages += len(targets)
        for load in loads:
            pages = self.host.pop(load.key)[load.first :]
            assert len(load.page_ids) <= len(pages)
            for page, content in zip(load.page_ids, pages, strict=False):
                self.memory[page] = list(content)
            self.num_loaded_pages += len(load.page_ids)
        for key in dropped:
            self.host.pop(key, None)  # also of what was loaded for nothing

    def compute(self, row: StubRow, num_tokens: int) -> None:
        """Writes the K/V of a row's next tokens, each from the one before as its page holds it."""
        self.num_computed_tokens += num_tokens
        for position in range(row.num_computed, row.num_computed + num_tokens):
            before = (
                self.page(row, position - 1)[(position - 1) % self.page_size] if position else 0
            )
            if self.has_states:
                before = row.state if position else 0
            row.state = kv = kv_of(row.tokens[position], before)
            self.page(row, position)[position % self.page_size] = kv
            row.kvs.append(kv_of(row.tokens[position], row.kvs[-1] if row.kvs else 0))
        row.num_computed += num_tokens

    def read(self, row: StubRow) -> list[int]:
        """What the pages of a row hold for the tokens that are computed."""
        return [
            self.page(row, position)[position % self.page_size]
            for position in range(row.num_computed)
        ]

    def page(self, row: StubRow, position: int) -> list[int]:
        """The page of a token; a page that nobody has written holds nothing that is right."""
        page = row.table[position // self.page_size]
        return self.memory.setdefault(page, [-2] * self.page_size)
