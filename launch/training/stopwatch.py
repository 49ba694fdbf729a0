"""The time that each part of a training step takes."""

import time

import torch


class Stopwatch:
    """Seconds spent in named parts of a step. On a GPU it records events on the stream, so that measuring does not wait for the GPU."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._spans: dict[str, list[tuple]] = {}

    def measure(self, part: str) -> "_Span":
        """Return a context whose duration counts towards `part`."""
        return _Span(self._spans.setdefault(part, []), self._on_gpu)

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each part. On a GPU this waits until all recorded work is done."""
        if self._on_gpu:
            torch.cuda.synchronize()
            return {part: sum(start.elapsed_time(end) for start, end in spans) / 1000 for part, spans in self._spans.items()}
        return {part: sum(end - start for start, end in spans) for part, spans in self._spans.items()}


class _Span:
    def __init__(self, spans: list[tuple], on_gpu: bool):
        self._spans, self._on_gpu = spans, on_gpu

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *_) -> None:
        self._spans.append((self._start, self._now()))

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
