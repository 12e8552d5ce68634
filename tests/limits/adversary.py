"""Who wants more than the limit: plans of attack, played in this process or inside a server, and what they got.

A plan is a list of (wait, cost). wait: ms, or `told`: as long as the last refusal said, or `almost`: a millisecond
less. cost: units, or `rest`: all that is free, and then one more to be refused. Where requests are counted one by one,
so many of them ask at that time.
"""

import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import msgspec
import redis

from gateway import limits
from gateway.types import Demand, Limit

BASE_MS = 1_800_000_000_000
PHASES = 60

Plan = list[tuple[int | str, int | str]]


@dataclass(frozen=True)
class Answer:
    at_ms: int
    cost: int
    used: int
    retry_ms: int


def grain_ms(limit: Limit) -> int:
    return -(-limit.window_ms // PHASES)


def edges_ms(grain_ms: int) -> list[int]:
    """Offsets in a sub-bucket at which an off-by-one shows."""
    return sorted({0, 1, grain_ms // 2, max(0, grain_ms - 2), grain_ms - 1})


def bursts(limit: Limit, phases: Iterable[int] = range(PHASES)) -> Iterator[Plan]:
    """A part of the limit at once, the rest in some phase of the window, then everything that becomes free, in the
    first millisecond in which it is. Edges of sub-buckets are met from both sides."""
    grain, most = grain_ms(limit), limit.limit
    parts = {-(-most // 2)} if one_by_one(limit) and most >= 100 else {1, -(-most // 2), most}
    greedy: Plan = [("almost", 1), (1, "rest")] * 4
    for phase in phases:
        for edge in edges_ms(grain):
            for part in parts:
                yield [(edge, part), (phase * grain, "rest"), *greedy]
                yield [(0, part), (phase * grain + edge, "rest"), *greedy]


def trickle(limit: Limit) -> Plan:
    """A seventh of the limit at a time, in steps that meet every offset of a sub-bucket, for some windows."""
    step = max(1, grain_ms(limit) * 7 // 5 + 1)
    return [(step, max(1, limit.limit // 7)), (0, 1)] * 300 + [("told", "rest")] * 70


def mixed(limit: Limit, seed: int) -> Plan:
    """Anything at any time."""
    dice, grain = random.Random(seed), grain_ms(limit)
    waits: list[int | str] = [
        0,
        0,
        1,
        grain - 1,
        grain,
        grain + 1,
        limit.window_ms // 2,
        limit.window_ms - 1,
        limit.window_ms,
        "told",
    ]
    most = min(limit.limit, 20) if one_by_one(limit) else limit.limit
    costs: list[int | str] = [1, most, "rest"]
    return [(dice.choice(waits), dice.choice([dice.randint(1, most), *costs])) for _ in range(150)]


def one_by_one(limit: Limit) -> bool:
    return limits.KINDS[limit.kind].algorithm(limit) == "sliding_log"


def base_ms(limit: Limit) -> int:
    """When attacks begin: at the edge of a sub-bucket."""
    return BASE_MS // grain_ms(limit) * grain_ms(limit)


def play(limit: Limit, plan: Plan) -> list[Answer]:
    """Against the counter of this process."""
    counter, now_ms, told_ms = limits.counter(limit), base_ms(limit), 0
    answers, single = [], one_by_one(limit)
    for wait, wanted in plan:
        now_ms += told_ms if wait == "told" else told_ms - 1 if wait == "almost" else int(wait)
        left = 1 << 60 if wanted == "rest" else int(wanted)
        while left > 0:
            cost = 1 if single else min(left, max(1, limit.capacity - counter.check(limit, 1, now_ms)[0]))
            cost = cost if wanted == "rest" or single else left
            used, retry_ms = counter.check(limit, cost, now_ms)
            answers.append(Answer(now_ms, cost, used, retry_ms))
            if retry_ms:
                told_ms = retry_ms
                break
            counter.take(limit, cost, now_ms, "")
            left -= cost
    return answers


#: The same, inside the server: what the kinds find and take there, in a loop around them.
_LOOP = """
local kind, limit, single = KINDS[ARGV[1]], tonumber(ARGV[3]), ARGV[1] == 'sliding_log'
local now, told, answers = tonumber(ARGV[#ARGV - 1]), 0, {}
for _, step in ipairs(cmsgpack.unpack(ARGV[#ARGV])) do
  local wait, rest = step[1], step[2] == 'rest'
  now = now + (wait == 'told' and told or wait == 'almost' and told - 1 or wait)
  local left = rest and 2 ^ 60 or step[2]
  while left > 0 do
    ARGV[2] = '1'
    if rest and not single then
      ARGV[2] = int(math.max(1, limit - kind.check(1, 1, now)))
    elseif not single then
      ARGV[2] = int(left)
    end
    local used, retry, s1, s2, s3, s4 = kind.check(1, 1, now)
    answers[#answers + 1] = {now, tonumber(ARGV[2]), used, retry}
    if retry > 0 then
      told = retry
      break
    end
    kind.take(1, 1, now, '', s1, s2, s3, s4)
    left = left - tonumber(ARGV[2])
  end
end
return cmsgpack.pack(answers)
"""


def play_on_server(server: redis.Redis, limit: Limit, plan: Plan, key: str = "attacked") -> list[Answer]:
    """Against the scripts, on a counter of their own that is left there."""
    text = limits.script_text("peek").partition("-- What an admission would find now.")[0] + _LOOP
    row = limits.row(Demand(limit, "", 0), BASE_MS)
    server.delete(key)
    reply = server.eval(text, 1, key, *row, base_ms(limit), msgspec.msgpack.encode(plan))
    assert isinstance(reply, bytes)
    return [Answer(*(int(number) for number in answer)) for answer in msgspec.msgpack.decode(reply)]


def throughput(limit: Limit, windows: int) -> float:
    """What is admitted in each window, as a part of the limit, of somebody who always asks for exactly what is allowed,
    evenly, and waits as told where refused."""
    counter, now_ms = limits.counter(limit), base_ms(limit)
    cost = 1 if one_by_one(limit) else max(1, limit.limit // 120)
    pace_ms = max(1, limit.window_ms * cost // limit.limit)
    end_ms, taken = now_ms + windows * limit.window_ms, list[int]()
    while now_ms < end_ms:
        _, retry_ms = counter.check(limit, cost, now_ms)
        if not retry_ms:
            counter.take(limit, cost, now_ms, "")
            taken.append(now_ms)
        now_ms += retry_ms or pace_ms
    # From the first to the last, so that no part of a turn counts.
    return (len(taken) - 1) * cost * limit.window_ms / (taken[-1] - taken[0]) / limit.limit


class Loot:
    """What was admitted, judged by nothing but its times."""

    def __init__(self, limit: Limit, answers: Sequence[Answer]) -> None:
        self.limit = limit
        self.answers = answers
        taken = [(answer.at_ms, answer.cost) for answer in answers if not answer.retry_ms]
        self._times_ms = [at_ms for at_ms, _ in taken]
        self._sums = [0, *accumulate(cost for _, cost in taken)]

    def most_in_any_window(self) -> int:
        """The fullest interval of the window's length ends with an admission; it does not contain its beginning."""
        times, sums, window_ms = self._times_ms, self._sums, self.limit.window_ms
        return max(sums[bisect_right(times, at_ms)] - sums[bisect_right(times, at_ms - window_ms)] for at_ms in times)

    def longest_false_denial_ms(self) -> int:
        """How much longer a refusal said to wait than a limiter would that forgets each use one window after it."""
        return max((self._false_denial_ms(answer) for answer in self.answers if answer.retry_ms), default=0)

    def _false_denial_ms(self, answer: Answer) -> int:
        at_ms, window_ms, cost, most = answer.at_ms, self.limit.window_ms, answer.cost, self.limit.limit
        # It would fit when so much of the oldest has left that there is room.
        times, sums = self._times_ms, self._sums
        now = bisect_right(times, at_ms)
        leaving = bisect_right(times, at_ms - window_ms)
        while sums[now] - sums[leaving] + cost > most:
            leaving += 1
        fits_at_ms = at_ms if leaving == 0 else max(at_ms, times[leaving - 1] + window_ms)
        return at_ms + answer.retry_ms - fits_at_ms
