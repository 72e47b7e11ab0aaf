"""A model and a device that are simple enough to be right, and that notice any wrong page.

The K/V of a token are one number, a hash of the token and of the number before it: like real K/V
they depend on all tokens so far. The device knows only the plans: it does the copies, writes each
scheduled token into its page, reads the number before it from there, and after every step finds
each row's own numbers in its pages. So a page that is handed out twice, freed too early, hit for
the wrong tokens, copied too late or listed in the wrong place is noticed in that step.

It feeds sampled tokens back by itself, and so can run plans that were made before these tokens
were known; when it is told them later, it finds out whether they are the same.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from folojax.sched.plan import SchedulerOutput
from folojax.sched.request import StopRule

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
    prompt: tuple[int, ...], stop: StopRule, max_model_len: int, seed: int = 0
) -> list[int] | None:
    """What a request gives with no scheduler at all; None for one that fails."""
    tokens, kv = list(prompt), 0
    for token in prompt:
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

    sampled: dict[str, int]
    failed: dict[str, str]


@dataclass
class StubRow:
    """One request of the batch. `params` of a request are its seed."""

    tokens: list[int]
    table: list[int]
    num_computed: int
    seed: int
    is_prompt_only: bool
    num_known: int  # of its tokens; those behind were sampled here, and not told so far
    kvs: list[int] = field(default_factory=list)  # what its pages must hold, token by token


@dataclass
class StubRunner:
    """Rows and pages as a device would hold them, built from plans alone."""

    page_size: int
    rows: dict[str, StubRow] = field(default_factory=dict)
    memory: dict[int, list[int]] = field(default_factory=dict)  # page -> K/V
    num_copied_pages: int = 0
    num_computed_tokens: int = 0

    def run(self, plan: SchedulerOutput) -> StubResult:
        """Runs a plan, and checks every page of every row."""
        self.update_rows(plan)
        self.copy_pages(plan)
        batch = [*plan.cached_requests.request_ids, *(new.request_id for new in plan.new_requests)]
        assert list(plan.num_scheduled_tokens) == batch
        assert set(batch) <= set(self.rows)
        for request_id in batch:
            self.compute(self.rows[request_id], plan.num_scheduled_tokens[request_id])
        for row in self.rows.values():
            assert self.read(row) == row.kvs, "a page was written by somebody else"

        has_last = {id_: len(row.tokens) == row.num_computed for id_, row in self.rows.items()}
        has_sample = {id_: has_last[id_] and not self.rows[id_].is_prompt_only for id_ in batch}
        assert plan.sampled_request_ids == tuple(id_ for id_ in batch if has_sample[id_])
        result = StubResult({}, {})
        for request_id in batch:
            row = self.rows[request_id]
            kv = row.kvs[-1]
            if kv == NAN and (has_sample[request_id] or row.is_prompt_only):
                result.failed[request_id] = "not a number"
            elif has_sample[request_id]:
                result.sampled[request_id] = sample(kv, row.seed)
            if has_sample[request_id]:
                row.tokens.append(sample(kv, row.seed))
        return result

    def update_rows(self, plan: SchedulerOutput) -> None:
        """Takes in which requests left, joined and grew."""
        for request_id in plan.finished_request_ids + plan.preempted_request_ids:
            self.rows.pop(request_id, None)
        for new in plan.new_requests:
            assert new.request_id not in self.rows
            assert isinstance(new.params, tuple)
            seed, is_prompt_only = new.params
            row = self.rows[new.request_id] = StubRow(
                tokens=[*new.prompt_token_ids, *new.output_token_ids],
                table=list(new.page_ids),
                num_computed=new.num_computed_tokens,
                seed=seed,
                is_prompt_only=is_prompt_only,
                num_known=len(new.prompt_token_ids) + len(new.output_token_ids),
            )
            for token in row.tokens[: row.num_computed]:
                row.kvs.append(kv_of(token, row.kvs[-1] if row.kvs else 0))
        cached = plan.cached_requests
        for request_id, token_ids, num_computed, page_ids in zip(
            cached.request_ids,
            cached.new_token_ids,
            cached.num_computed_tokens,
            cached.new_page_ids,
            strict=True,
        ):
            row = self.rows[request_id]
            assert row.num_computed == num_computed
            assert row.tokens[row.num_known :][: len(token_ids)] == list(token_ids)
            row.num_known += len(token_ids)
            row.table.extend(page_ids)

    def copy_pages(self, plan: SchedulerOutput) -> None:
        """Reads every source, then writes every target."""
        targets = [target for _, target in plan.page_copies]
        assert len(targets) == len(set(targets)), "two copies into one page"
        assert all(source != target for source, target in plan.page_copies)
        contents = [list(self.memory[source]) for source, _ in plan.page_copies]
        self.memory.update(zip(targets, contents, strict=True))
        self.num_copied_pages += len(targets)

    def compute(self, row: StubRow, num_tokens: int) -> None:
        """Writes the K/V of a row's next tokens, each from the one before as its page holds it."""
        self.num_computed_tokens += num_tokens
        for position in range(row.num_computed, row.num_computed + num_tokens):
            before = (
                self.page(row, position - 1)[(position - 1) % self.page_size] if position else 0
            )
            kv = kv_of(row.tokens[position], before)
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
