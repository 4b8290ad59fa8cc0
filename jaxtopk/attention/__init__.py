"""Attention strategies: what a model's rows attend to, as frozen configuration over one set of weights."""

from jaxtopk.attention.base import AttentionStrategy as AttentionStrategy
from jaxtopk.attention.full import FullAttention as FullAttention
from jaxtopk.attention.indexer import IndexerAttention as IndexerAttention
from jaxtopk.attention.topk import TopKAttention as TopKAttention
