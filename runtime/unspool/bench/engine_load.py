"""What `unspool bench serve-engine` measures of a running engine: requests together, and a long prompt beside them."""

import queue
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from unspool.engine import Engine
from unspool.requests import EngineEvent, FinishEvent, GenerationRequest, SamplingParams, TokenEvent

GREEDY = SamplingParams(temperature=0.0)
ENDLESS = 1 << 19


@dataclass
class Arrivals:
    """When each token of one request came, in seconds of the performance counter."""

    submitted: float = 0.0
    times: list[float] = field(default_factory=list)
    events: "queue.SimpleQueue[EngineEvent]" = field(default_factory=queue.SimpleQueue)

    def __call__(self, event: EngineEvent) -> None:
        if isinstance(event, TokenEvent):
            self.times.append(time.perf_counter())
        self.events.put(event)

    def wait_for_token(self) -> None:
        while not isinstance(event := self.events.get(), TokenEvent):
            assert not isinstance(event, FinishEvent), f"the engine ended a request: {event.reason} {event.error}"

    def wait(self) -> FinishEvent:
        while not isinstance(event := self.events.get(), FinishEvent):
            pass
        return event

    def gaps(self, start: float = 0.0, end: float = float("inf")) -> list[float]:
        """Seconds between tokens that came one after the other in a span of time."""
        return [
            later - earlier
            for earlier, later in zip(self.times, self.times[1:], strict=False)
            if start <= earlier and later <= end
        ]


class Load:
    """Sends an engine random prompts, each of its own tokens; nothing is taken from the prefix cache."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._random = torch.Generator().manual_seed(0)
        self._count = 0

    def prompt(self, length: int) -> tuple[int, ...]:
        return tuple(torch.randint(self._engine.vocab_size, (length,), generator=self._random).tolist())

    def send(self, prompt_tokens: int, max_tokens: int) -> tuple[str, Arrivals]:
        self._count += 1
        name, arrivals = f"bench-{self._count}", Arrivals()
        request = GenerationRequest(
            request_id=name,
            prompt=self.prompt(prompt_tokens),
            max_tokens=max_tokens,
            sampling=GREEDY,
            use_cache=False,
        )
        arrivals.submitted = time.perf_counter()
        self._engine.submit(request, arrivals)
        return name, arrivals

    def together(self, concurrency: int, prompt_tokens: int, tokens: int) -> dict[str, Any]:
        """So many requests at once; all generate as many tokens."""
        arrivals = [self.send(prompt_tokens, tokens)[1] for _ in range(concurrency)]
        for one in arrivals:
            one.wait()
        seconds = max(one.times[-1] for one in arrivals) - min(one.submitted for one in arrivals)
        gaps = [gap for one in arrivals for gap in one.gaps()]
        return {
            "concurrency": concurrency,
            "tokens_per_second": concurrency * tokens / seconds,
            "first_token_seconds": statistics.median(one.times[0] - one.submitted for one in arrivals),
            "between_seconds": statistics.median(gaps),
            "between_p99_seconds": quantile(gaps, 0.99),
        }

    def beside_a_long_prompt(self, concurrency: int, prompt_tokens: int, long_tokens: int) -> dict[str, Any]:
        """How long those that decode wait for a token while a long prompt is read, and before."""
        (_, alone) = self.send(long_tokens, 1)
        alone.wait()
        running = [self.send(prompt_tokens, ENDLESS) for _ in range(concurrency)]
        for _, arrivals in running:
            arrivals.wait_for_token()
        before = time.perf_counter()
        for _ in range(32):
            running[0][1].wait_for_token()
        _, long = self.send(long_tokens, 1)
        long.wait()
        for name, arrivals in running:
            self._engine.cancel(name)
            arrivals.wait()
        calm = [gap for _, one in running for gap in one.gaps(before, long.submitted)]
        beside = [gap for _, one in running for gap in one.gaps(long.submitted, long.times[0])]
        return {
            "concurrency": concurrency,
            "long_prompt_tokens": long_tokens,
            "between_before_seconds": statistics.median(calm),
            "between_beside_seconds": statistics.median(beside),
            "between_beside_most_seconds": max(beside),
            "long_prompt_alone_seconds": alone.times[0] - alone.submitted,
            "long_prompt_beside_seconds": long.times[0] - long.submitted,
        }


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
