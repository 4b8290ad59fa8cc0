"""Kernels that a profiler recorded, cut into calls: the time of each, or none at all where they cannot be told apart."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.tuning import timer
from pallas_kernels.tuning.profile import Kernel, spans

CALL = [Kernel(0, 2000, "score"), Kernel(2500, 1000, "select"), Kernel(2600, 3000, "copy")]


def moved(kernels, start):
    return [kernel._replace(start=kernel.start + start) for kernel in kernels]


def test_a_call_lasts_from_its_first_start_to_its_last_end():
    calls = [
        *moved(CALL, 0),
        *moved(CALL, 10_000),
        *moved(CALL[:2], 20_000),
        Kernel(22_000, 9000, "copy"),
    ]
    assert spans(reversed(calls), 3) == pytest.approx([5.6e-3, 5.6e-3, 11e-3])


def test_kernels_of_two_streams_may_begin_in_another_order():
    other = [Kernel(0, 2000, "score"), Kernel(2500, 1000, "copy"), Kernel(2600, 3000, "select")]
    assert spans([*CALL, *moved(other, 10_000)], 2) == pytest.approx([5.6e-3, 5.6e-3])


@pytest.mark.parametrize(
    "kernels",
    [
        [],
        [*CALL, *moved(CALL, 10_000)[:2]],
        [*CALL, *moved([*CALL[:2], Kernel(2600, 3000, "other")], 10_000)],
        [*CALL, *moved(CALL, 4000)],
    ],
    ids=["nothing", "fewer", "others", "overlapping"],
)
def test_what_is_not_the_same_call_again_has_no_time(kernels):
    assert spans(kernels, 2) is None


@pytest.mark.gpu
def test_a_gpus_own_clock_times_twice_the_work_as_twice_as_long():
    side = 4096
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    single = timer.device_time(lambda x, y: x @ y, [(a, a)])
    double = timer.device_time(lambda x, y: (x @ y, y @ x.T), [(a, a)])
    assert single.clock == double.clock == "profiler"
    assert single.rounds >= 10
    assert 1e-3 * single.median > 2 * side**3 / 2e15  # no card makes more than 2 PF/s of bfloat16
    assert double.median == pytest.approx(2 * single.median, rel=0.25)
