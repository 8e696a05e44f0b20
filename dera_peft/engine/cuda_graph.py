"""Recording a function's CUDA kernels as a graph."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

# torch's warnings: of what waits for the device, and of the mode in which it gives these
SYNCHRONIZES, SYNC_MODE = "called a synchronizing CUDA operation", "Synchronization debug mode"


class CannotRecord(Exception):
    """
    A step can't be recorded; says why.

    Attributes:
        output: the step's, where it was computed nevertheless.
    """

    def __init__(self, reason: str, output: Any = None):
        super().__init__(reason)
        self.output = output


class CudaGraphs:
    """
    Records steps of one model as `torch.cuda.CUDAGraph`s.

    Its graphs share one pool of memory. They may: only one is replayed at a time, and what it returns is read before
    the next replay.
    """

    device_type = "cuda"

    def __init__(self):
        self._stream: torch.cuda.Stream | None = None
        self._side: torch.cuda.Stream | None = None
        self._pool = None

    def start(self, device: torch.device) -> torch.cuda.Stream:
        """Before anything else; gives a second stream, for what in a step may run beside the rest."""
        if self._stream is None or self._side is None or self._stream.device != device:
            self._stream, self._side = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()
        return self._side

    def warm_up(self, step: Callable[[], Any], device: torch.device) -> Any:
        """
        Computes a step on a stream of its own, as torch asks for before a capture.

        Raises:
            CannotRecord: it waits for the device, which a graph can't; with the step's output.
        """
        assert self._stream is not None  # start made it
        before, main = torch.cuda.get_sync_debug_mode(), torch.cuda.current_stream(device)
        self._stream.wait_stream(main)
        with warnings.catch_warnings(record=True) as caught, torch.cuda.stream(self._stream):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                output = step()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        main.wait_stream(self._stream)
        for warning in caught:
            if SYNCHRONIZES in str(warning.message):
                raise CannotRecord(f"a step waits for the device at {warning.filename}:{warning.lineno}", output)
            if SYNC_MODE not in str(warning.message):  # another's
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return output

    def record(self, step: Callable[[], Any], device: torch.device) -> tuple[Callable[[], None], Any]:
        """
        Records a step without computing it: what computes it, and its output, whose tensors that fills.

        Raises:
            CannotRecord: CUDA refuses an operation of the step.
        """
        assert self._stream is not None  # start made it
        graph = torch.cuda.CUDAGraph()
        try:
            # the outer context restores the stream where the capture fails
            with (
                torch.cuda.device(device),
                torch.cuda.stream(torch.cuda.current_stream(device)),
                torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"),
            ):
                output = step()
        except RuntimeError as error:
            self._stream = None  # the pool may be left as one that is being recorded into
            # and so is the generator, which could draw no numbers any more
            generator = torch.cuda.default_generators[device.index]
            generator.graphsafe_set_state(generator.clone_state())
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise CannotRecord(f"CUDA refuses to record a step ({str(error).splitlines()[0]})") from error
        return graph.replay, output
