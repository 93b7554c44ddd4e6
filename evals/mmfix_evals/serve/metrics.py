"""Counters and histograms in the text format of Prometheus."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence

Labels = tuple[tuple[str, str], ...]

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Counter:
    """A number per combination of labels that only grows."""

    def __init__(self, name: str, help: str) -> None:
        self.name, self.help = name, help
        self._values: dict[Labels, float] = {}

    def add(self, amount: float = 1.0, **labels: str) -> None:
        """Grow by `amount`."""
        key = tuple(sorted(labels.items()))
        self._values[key] = self._values.get(key, 0.0) + amount

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, self.help, "counter")
        for labels, value in sorted(self._values.items()):
            yield f"{self.name}{_labels(labels)} {value:.15g}"


class Gauge:
    """A number that is looked up when it is asked for."""

    def __init__(self, name: str, help: str, read: Callable[[], float], **labels: str) -> None:
        self.name, self.help = name, help
        self._read = read
        self._labels = tuple(sorted(labels.items()))

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, self.help, "gauge")
        yield f"{self.name}{_labels(self._labels)} {self._read():.15g}"


class Histogram:
    """How many observations were at most each bound, per combination of labels."""

    def __init__(self, name: str, help: str, bounds: Sequence[float] = SECONDS) -> None:
        self.name, self.help = name, help
        self._bounds = tuple(bounds)
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}

    def observe(self, value: float, **labels: str) -> None:
        """Count one observation."""
        key = tuple(sorted(labels.items()))
        counts = self._counts.setdefault(key, [0] * (len(self._bounds) + 1))
        counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sums[key] = self._sums.get(key, 0.0) + value

    def lines(self) -> Iterator[str]:
        yield from _head(self.name, self.help, "histogram")
        for labels, counts in sorted(self._counts.items()):
            total = 0
            for bound, count in zip((*(f"{bound:g}" for bound in self._bounds), "+Inf"), counts, strict=True):
                total += count
                yield f"{self.name}_bucket{_labels((*labels, ('le', bound)))} {total}"
            yield f"{self.name}_sum{_labels(labels)} {self._sums[labels]:.15g}"
            yield f"{self.name}_count{_labels(labels)} {total}"


class Metrics:
    """Everything the server counts. Changed in the event loop only."""

    def __init__(self, waiting: Callable[[], int], generating: Callable[[], int], **info: str) -> None:
        self.requests = Counter("mmfix_requests_total", "Chat requests by method and HTTP status; 499: client left.")
        self.errors = Counter("mmfix_errors_total", "Requests answered with an error, by its code.")
        self.cancelled = Counter("mmfix_cancelled_total", "Generations that ended because the client had left.")
        self.prompt_tokens = Counter("mmfix_prompt_tokens_total", "Prompt tokens read, image tokens included.")
        self.generated_tokens = Counter("mmfix_generated_tokens_total", "Tokens generated.")
        self.images = Counter("mmfix_images_total", "Images received with accepted requests.")
        self.first_token = Histogram(
            "mmfix_time_to_first_token_seconds", "From the arrival of a request to its first token, waiting included."
        )
        self.seconds = Histogram("mmfix_request_seconds", "From the arrival of a request to the end of its answer.")
        self._all = (
            Gauge("mmfix_info", "Constant 1; the labels say what is served.", lambda: 1, **info),
            Gauge("mmfix_queue_length", "Requests that wait for their turn.", waiting),
            Gauge("mmfix_generating", "Generations under way: 0 or 1.", generating),
            self.requests, self.errors, self.cancelled, self.prompt_tokens, self.generated_tokens, self.images,
            self.first_token, self.seconds,
        )  # fmt: skip

    def text(self) -> str:
        """The page that Prometheus reads."""
        return "\n".join(line for one in self._all for line in one.lines()) + "\n"


def _head(name: str, help: str, kind: str) -> tuple[str, str]:
    return f"# HELP {name} {help}", f"# TYPE {name} {kind}"


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
