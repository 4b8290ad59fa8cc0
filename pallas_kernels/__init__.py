"""Sparse attention kernels for TPU and GPU: select the keys, then attend to them.

Functions of arrays; every op has `reference`, `xla`, and where the matrix in README.md says so `mosaic_tpu` and
`mosaic_gpu` implementations. Shapes: B batch, T queries, S keys, N query heads, K key/value heads, H head size.
"""

from pallas_kernels.core.dispatch import Implementation as Implementation
from pallas_kernels.core.interpret import interpret_mode as interpret_mode
from pallas_kernels.core.online_softmax import merge_attention as merge_attention
from pallas_kernels.core.quantization import QuantizedKeys as QuantizedKeys
from pallas_kernels.core.quantization import quantize_keys as quantize_keys
from pallas_kernels.core.selection import TopKSelection as TopKSelection
from pallas_kernels.core.selection import budget_from_ratio as budget_from_ratio
from pallas_kernels.ops.gather_attention.api import (
    GatherAttentionResiduals as GatherAttentionResiduals,
)
from pallas_kernels.ops.gather_attention.api import gather_attention as gather_attention
from pallas_kernels.ops.knn_attention.api import knn_indices as knn_indices
from pallas_kernels.ops.lightning_indexer.api import indexer_scores as indexer_scores
from pallas_kernels.ops.lightning_indexer.api import indexer_select as indexer_select
from pallas_kernels.ops.topk_attention.api import TopKAttentionResiduals as TopKAttentionResiduals
from pallas_kernels.ops.topk_attention.api import topk_attention as topk_attention
from pallas_kernels.ops.topk_decode_attention.api import TopKDecodeResiduals as TopKDecodeResiduals
from pallas_kernels.ops.topk_decode_attention.api import (
    topk_decode_attention as topk_decode_attention,
)
from pallas_kernels.ops.topk_select.api import topk_select as topk_select
