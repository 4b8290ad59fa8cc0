"""What is timed: each op at each workload, with its inputs, its least bytes and operations, and what a right result is."""

from experiments.kernel_latency.workloads.attention import CopiedDecode as CopiedDecode
from experiments.kernel_latency.workloads.attention import Decode as Decode
from experiments.kernel_latency.workloads.attention import Gather as Gather
from experiments.kernel_latency.workloads.attention import PagedDecode as PagedDecode
from experiments.kernel_latency.workloads.attention import PagedGather as PagedGather
from experiments.kernel_latency.workloads.base import Arrays as Arrays
from experiments.kernel_latency.workloads.base import Workload as Workload
from experiments.kernel_latency.workloads.indexer import IndexerDecode as IndexerDecode
from experiments.kernel_latency.workloads.indexer import IndexerPrefill as IndexerPrefill
from experiments.kernel_latency.workloads.indexer import IndexerThenGather as IndexerThenGather
from experiments.kernel_latency.workloads.lists import full as full
from experiments.kernel_latency.workloads.lists import tiny as tiny
from experiments.kernel_latency.workloads.select import Select as Select
