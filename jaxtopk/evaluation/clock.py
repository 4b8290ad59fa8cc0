"""Where the time of a run goes: seconds by phase, with what JAX spends on compiling told apart."""

import contextlib
import time
from collections.abc import Iterator

import jax.monitoring

# Times that JAX reports, in seconds, of steps that follow one another; a trace inside a trace is reported by both, so traces
# are not added up but left in the phase they belong to.
_COMPILING = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


class Clock:
    """Adds up wall-clock seconds by phase; use as a context manager, around the phases.

    Attributes:
      seconds: by phase; "compile" is what JAX spent in any of them on lowering and compiling, and in no other.
    """

    def __init__(self, *phases: str):
        """Starts all phases at zero."""
        self.seconds = dict.fromkeys((*phases, "compile"), 0.0)

    def __enter__(self) -> "Clock":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *unused) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the seconds inside for `name`, less what of them was compiling."""
        begin, compiled = time.perf_counter(), self.seconds["compile"]
        try:
            yield
        finally:
            passed = time.perf_counter() - begin
            self.seconds[name] += max(0.0, passed - (self.seconds["compile"] - compiled))

    def _listen(self, event: str, duration_secs: float, **unused: str | int) -> None:
        if event in _COMPILING:
            self.seconds["compile"] += duration_secs


__all__ = ["Clock"]
