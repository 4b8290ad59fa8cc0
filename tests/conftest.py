"""Where and how strictly the tests run: devices, JAX's strict modes, marks, hypothesis.

`JAXTOPK_TEST_PLATFORM` (cpu, gpu or tpu; default cpu) says what the tests run on. On cpu there are eight devices, and the
tests marked gpu or tpu are skipped.
"""

import importlib.util
import os
import sys

PLATFORM = os.environ.get("JAXTOPK_TEST_PLATFORM", "cpu")
_JAX_PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}
if PLATFORM not in _JAX_PLATFORMS:
    raise ValueError(
        f"JAXTOPK_TEST_PLATFORM: got {PLATFORM!r}, wanted one of {', '.join(_JAX_PLATFORMS)}"
    )

# Before jax is imported; subprocesses of the tests inherit it too.
os.environ["JAX_PLATFORMS"] = _JAX_PLATFORMS[PLATFORM]
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a network
if PLATFORM == "cpu":
    # Compiling takes most of the time, and how well XLA does it is not what is tested: a simulated GPU kernel costs a
    # processor 2.2 s like this, 5.7 s by default. `XLA_FLAGS= JAX_DISABLE_MOST_OPTIMIZATIONS=0` compiles as for a user.
    # Subprocesses inherit both. The flag is for JAX 0.11; XLA in 0.12 has no other emitters left, and ignores it.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    )
if PLATFORM != "tpu":
    # libtpu as a compiler only: do not look for a TPU, and let parallel test processes share the library.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }

import flax  # noqa: E402
import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# NNX in tree mode: modules are plain pytrees of parameters, without shared references or updates from inside.
flax.config.update("nnx_graph_mode", False)
flax.config.update("nnx_graph_updates", False)

# Compiling dominates, so a deadline would only measure the machine; derandomised, a failure is everyone's failure.
hypothesis.settings.register_profile(
    "jaxtopk",
    derandomize=True,
    max_examples=15,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("jaxtopk")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow")


def _reasons_to_skip(config: pytest.Config) -> dict[str, str]:
    """The marks whose tests cannot or should not run here, each with its reason."""
    reasons = {}
    if not config.getoption("--slow") and "slow" not in config.getoption("markexpr", ""):
        reasons["slow"] = "slow: run with --slow"
    for platform in ("gpu", "tpu"):
        if PLATFORM != platform:
            reasons[platform] = (
                f"needs a {platform.upper()}: run with JAXTOPK_TEST_PLATFORM={platform}"
            )
    if PLATFORM == "tpu":
        reasons["tpu_aot"] = "compiles without a TPU: run on the CPU"
    elif importlib.util.find_spec("libtpu") is None:
        reasons["tpu_aot"] = "needs the TPU compiler: pip install -e '.[tpu-aot]'"
    if PLATFORM != "cpu":
        reasons["multidevice"] = "needs eight devices: run on the CPU"
    return reasons


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = _reasons_to_skip(config)
    for item in items:
        for mark, reason in reasons.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _interpreters_start_clean():
    """After each test, drops what the TPU and GPU simulators still hold of a kernel that failed half-way.

    They keep simulated memory in module globals and leave it there when a kernel raises; the next kernel of the process
    would then fail for no fault of its own. Tests that touched no kernel have not imported them and pay nothing.
    """
    yield
    compat = sys.modules.get("pallas_kernels.core.compat")
    if compat is not None:
        compat.reset_interpreters()
