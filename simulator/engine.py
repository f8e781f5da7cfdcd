"""An instance in virtual time: a batch that decodes as a fluid, prompts in steps, KV in pages.

No event per step. Between two events (an arrival, a prompt computed, a sequence's end) the batch does not change, so
the time of k steps is a polynomial of k: k x (base + sequences + context) + half of k^2 x what the context grows by. A
sequence ends when the engine's count of steps reaches the number that it had when it joined, plus its tokens.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from services.gpu_agent.engine.pace import PaceMeter
from simulator.clock import Alarm, Clock
from simulator.cost import StepCost
from simulator.memory import Gpu

if TYPE_CHECKING:
    from simulator.replica import Replica

_MAX_PREFILLS = 16  # prompts of one step, as the engine's graphs have it
_STEP = 1e-3  # of a step: rounding of the clock
_SECOND = 1e-6


class Job:
    """A request on its way through the cluster."""

    __slots__ = (
        "begun",
        "generated",
        "index",
        "joined",
        "left",
        "model",
        "output",
        "prompt",
        "short",
        "since",
        "taken",
        "ticket",
        "tokens",
    )

    def __init__(self, index: int, model: int, prompt: int, output: int, since: float) -> None:
        self.index = index  # in order of arrival
        self.model = model
        self.since = since  # when it came into its model's queue
        self.prompt = prompt
        self.output = output
        self.generated = 0
        self.left = output  # tokens still to generate
        self.tokens = prompt  # to compute before the next token: the prompt, and after a preemption what was generated
        self.joined = 0.0  # the engine's count of steps when it began to decode
        self.ticket = 0  # order of joining
        self.taken = since  # when an instance took it
        self.begun = since  # when its prompt was begun, or computed anew
        self.short = False  # whether its prompt waited for KV pages


class News(Protocol):
    """Whom an engine tells."""

    def first_token(self, job: Job) -> None:
        """A job has its first token."""
        ...

    def ended(self, engine: Engine, job: Job) -> None:
        """A job has its last token; a slot is free."""
        ...

    def impossible(self, engine: Engine, job: Job) -> None:
        """A job needs more KV than the engine could have with nothing else running."""
        ...


class Memory(Protocol):
    """Where KV pages come from."""

    def resize(self, engine: Engine, pages: int) -> bool:
        """Sets the KV pages that an engine holds on each of its GPUs; False, with nothing done, where they lack."""
        ...

    def room(self, engine: Engine) -> int:
        """The most KV pages that `resize` would grant now."""
        ...

    def limit(self, engine: Engine) -> int:
        """KV pages that the engine could have if nobody else needed any."""
        ...


class Engine:
    """The compute of one active replica."""

    def __init__(
        self,
        clock: Clock,
        cost: StepCost,
        gpus: Sequence[Gpu],
        *,
        slots: int,
        tokens_per_page: int,
        reserve: int,
        budgets: tuple[int, int],
        under_way: int,
        layers: int,
        ahead_s: float,
        meter: PaceMeter | None,
        memory: Memory,
        news: News,
    ) -> None:
        """`reserve`: pages that it holds from its first moment. `budgets`: tokens of a step in which sequences decode,
        and of one in which none does. `under_way`: steps that it begins before the first of them has ended. `ahead_s`:
        for how long its first step may have been computed, layer by layer, behind the copy of its weights, which has
        just ended. `meter`: what is to measure its steps, if anything."""
        self.gpus = gpus
        self.slots = slots
        self.jobs = 0  # taken and not ended
        self.kv_pages = 0  # on each GPU
        self.reserve = reserve
        self.most = gpus[0].pages  # KV pages that it may have on each GPU
        self.device_seconds = 0.0
        self.preemptions = 0
        self.replica: Replica | None = None  # whose compute it is; set by whoever makes it
        self.ahead_s = ahead_s
        self.meter = meter
        self._last_layer = 1 / layers
        self._clock = clock
        self._cost = cost
        self._per_page = tokens_per_page
        self._budget, self._prefill_budget = budgets
        self._under_way = under_way
        self._memory = memory
        self._news = news
        self._alarm = Alarm(self._due)
        self._at = clock.now
        self._share = 1.0  # of the device's time
        self._steps = 0.0
        self._context = 0.0  # tokens of those that decode
        self._decoding: list[tuple[float, int, Job]] = []  # by the count of steps at which each ends
        self._waiting: deque[Job] = deque()
        self._prompts: list[Job] = []  # of the steps in progress that compute prompts
        self._prompt_tokens = 0
        self._prompt_left = 0.0  # seconds of the device until they are computed
        self._prompt_speed = 0.0  # steps of the batch per second of the device meanwhile
        self._until = math.inf  # the count of steps for which its KV pages suffice
        self._tickets = 0
        self._starved = False
        self._on_device = False
        self._in_event = False

    @property
    def busy(self) -> bool:
        """Whether it uses the device."""
        return bool(self._decoding or self._prompts)

    @property
    def starved(self) -> bool:
        """Whether it waits for KV pages that others hold."""
        return self._starved

    @property
    def kv_tokens(self) -> float:
        """Tokens in its KV now."""
        return self._context + self._prompt_tokens

    def take(self, job: Job) -> None:
        """Takes a request, to be begun by `go`. There must be a free slot."""
        self.jobs += 1
        job.taken = self._clock.now
        self._waiting.append(job)

    def go(self) -> None:
        """Begins with what was taken, if nothing goes before it."""
        if self._waiting and not self._prompts and not self._in_event:
            self._sync()
            self._go_on(came=True)

    def look_again(self) -> None:
        """KV pages have become free."""
        if self._starved:
            self._sync()
            self._go_on()

    def close(self) -> None:
        """Gives its pages back; nothing runs."""
        self._memory.resize(self, 0)

    def share_changed(self) -> None:
        """Others have begun, or ceased, to use its devices."""
        self._sync()
        self._share = 1.0 / max(len(gpu.busy) for gpu in self.gpus)
        self._arm()

    def _sync(self) -> None:
        """Brings the fluid up to now."""
        now = self._clock.now
        device = (now - self._at) * self._share
        self._at = now
        if device <= 0.0:
            return
        count = len(self._decoding)
        if self._prompts:
            device = min(device, self._prompt_left)
            self._prompt_left -= device
            steps = device * self._prompt_speed if count else 0.0
        elif count:
            linear = self._cost.decode(count, self._context)
            growth = 2 * self._cost.per_context * count * device
            steps = 2 * device / (linear + math.sqrt(linear * linear + growth))
        else:
            return
        self.device_seconds += device
        self._steps += steps
        self._context += steps * count
        if self.meter is not None:
            self._measure(self.meter, count, device, steps)

    def _measure(self, meter: PaceMeter, count: int, device: float, steps: float) -> None:
        """Adds what was computed since the last event: steps of the batch, with prompts or without."""
        elapsed = device if count else None  # others' time does not count, and between steps nothing passes
        if self._prompts:
            begun = len(self._prompts) if self._prompt_left <= _SECOND else 0
            meter.add(count, device, elapsed, prompts=True, begun=begun, steps=device * self._prompt_speed)
        else:
            meter.add(count, device, elapsed, steps=steps)

    def _due(self) -> None:
        self._in_event = True  # what is taken now waits for the end of this
        self._sync()
        limit = self._steps + _STEP
        while self._decoding and self._decoding[0][0] <= limit:
            job = heapq.heappop(self._decoding)[2]
            self._leave(job)
            job.generated = job.output
            self._end(job)
        if self._prompts and self._prompt_left <= _SECOND:
            prompts, self._prompts, self._prompt_tokens = self._prompts, [], 0
            for job in prompts:
                self._join(job)
        self._go_on()
        self._in_event = False

    def _join(self, job: Job) -> None:
        if job.generated == 0:
            self._news.first_token(job)
        job.generated += 1
        job.left -= 1
        if job.left <= 0:
            self._end(job)
            return
        self._tickets += 1
        job.ticket = self._tickets
        job.joined = self._steps
        self._context += job.tokens + 1
        heapq.heappush(self._decoding, (self._steps + job.left, job.ticket, job))

    def _leave(self, job: Job) -> None:
        """Takes what the job had in KV out of the sum."""
        self._context -= job.tokens + 1 + (self._steps - job.joined)
        if not self._decoding:
            self._context = 0.0  # rounding

    def _end(self, job: Job) -> None:
        self.jobs -= 1
        self._news.ended(self, job)

    def _go_on(self, came: bool = False) -> None:
        """Begins with prompts that wait, sees to KV, and arranges for the next event. Synced.

        `came`: a prompt has come while the batch may be decoding, so that steps under way go before it.
        """
        self._until = math.inf
        while self._waiting and not self._prompts and not self._begin_prompts(came):
            if self._pages(self._waiting[0].tokens + 1) <= self._memory.limit(self):
                self._waiting[0].short = True
                break
            self.jobs -= 1
            self._news.impossible(self, self._waiting.popleft())
        if not self._prompts:
            while self._decoding and not self._grow():
                self._preempt()
            if not self._decoding:
                self._memory.resize(self, self.reserve)
        self._starved = bool(self._waiting) and not self.busy
        if self.busy != self._on_device:
            self._use_device(self.busy)
        self._arm()

    def _grow(self) -> bool:
        """Takes KV pages for what its sequences generate until the next one ends, or at least for some steps."""
        if self._memory.resize(self, self._pages(self._tokens_at_next_end())):
            return True
        count, room = len(self._decoding), self._memory.room(self)
        steps = (room * self._per_page - 8 * count - self._context) / count
        if steps < 1 or not self._memory.resize(self, room):
            return False
        self._until = self._steps + steps
        return True

    def _use_device(self, busy: bool) -> None:
        self._on_device = busy
        others: dict[Engine, None] = {}
        for gpu in self.gpus:
            if busy:
                gpu.busy[self] = None
            else:
                gpu.busy.pop(self, None)
            others.update(gpu.busy)
        others.pop(self, None)
        if busy:
            self._share = 1.0 / max(len(gpu.busy) for gpu in self.gpus)
        for other in others:
            other.share_changed()

    def _arm(self) -> None:
        """Arranges for the next event."""
        if self._prompts:
            device = self._prompt_left
            if self._decoding and self._prompt_speed > 0:
                device = min(device, max(0.0, self._decoding[0][0] - self._steps) / self._prompt_speed)
        elif self._decoding:
            count = len(self._decoding)
            steps = max(0.0, min(self._decoding[0][0], self._until) - self._steps)
            device = steps * self._cost.decode(count, self._context + count * steps / 2)
        else:
            self._clock.cancel(self._alarm)
            return
        self._clock.set(self._alarm, self._at + device / self._share)

    def _begin_prompts(self, came: bool) -> bool:
        """Begins the steps that compute the next prompts, in order of arrival; False where KV does not suffice."""
        decoding = len(self._decoding)
        budget = self._budget if decoding else self._prefill_budget
        chosen: list[Job] = []
        tokens = 0
        own = 0.0  # seconds
        for job in self._waiting:
            if chosen and (tokens + job.tokens > budget or len(chosen) == _MAX_PREFILLS):
                break
            chosen.append(job)
            tokens += job.tokens
            own += job.tokens * self._cost.per_prompt_token + job.tokens**2 * self._cost.per_prompt_square
        # What is left of the step that the device works on, and those begun behind that.
        before = _part_left(self._steps) + self._under_way - 1 if came and decoding else 0.0
        while chosen:
            steps = before + max(1, -(-tokens // budget))
            if self._memory.resize(self, self._pages(self._context + decoding * (steps + 1) + tokens + len(chosen))):
                break
            job = chosen.pop()
            tokens -= job.tokens
            own -= job.tokens * self._cost.per_prompt_token + job.tokens**2 * self._cost.per_prompt_square
        if not chosen:
            return False
        for job in chosen:
            job.begun = self._clock.now
            self._waiting.popleft()
        self._prompts, self._prompt_tokens = chosen, tokens
        seconds = steps * self._cost.decode(decoding, self._context) + self._cost.prefill_base + own
        # What was computed behind the copy since the last of them came; the last layer is computed when all is there.
        ahead = min(self.ahead_s, self._clock.now - max(job.since for job in chosen)) if self.ahead_s else 0.0
        self._prompt_left = max(seconds - ahead, seconds * self._last_layer)
        self.ahead_s = 0.0
        self._prompt_speed = steps / self._prompt_left
        return True

    def _tokens_at_next_end(self) -> float:
        count = len(self._decoding)
        return self._context + count * max(0.0, self._decoding[0][0] - self._steps)

    def _pages(self, tokens: float) -> int:
        """Pages for so many tokens, and half a block of 16 for each sequence; never fewer than the reserve."""
        sequences = len(self._decoding) + len(self._prompts)
        return max(self.reserve, math.ceil((tokens + 8 * sequences) / self._per_page - 1e-9))

    def _preempt(self) -> None:
        """The newest sequence gives its KV back and is computed anew, before all others that wait."""
        newest = max(self._decoding, key=lambda entry: entry[1])
        self._decoding.remove(newest)
        heapq.heapify(self._decoding)
        job = newest[2]
        self._leave(job)
        done = int(self._steps - job.joined + _STEP)
        job.generated += done
        job.left -= done
        job.tokens = job.prompt + job.generated
        self.preemptions += 1
        self._waiting.appendleft(job)


def _part_left(steps: float) -> float:
    """Of the step that is being computed, in a count of steps."""
    return max(0.0, math.ceil(steps - _STEP) - steps)
