"""How the lists of each scope line up with heads: the axes of lists and heads, and the fetch of what is listed.

The G lists of a row are P x R, and the N heads that read them P x R x W x Q, in this order. A key/value head is one of P x W;
W > 1 where one list serves several of them and fetches their rows together.

    G = 1: P = 1, R = 1, W = K, Q = N / K
    G = K: P = K, R = 1, W = 1, Q = N / K
    G = N: P = K, R = N / K, W = Q = 1

C rows of a chunk, k slots of a list. A masked slot holds S, one past the last key: it fetches 0 and sends nowhere.
"""

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int32, Shaped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The sizes P, R, W, Q of a call."""

    p: int
    r: int
    w: int
    q: int

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, num_lists: int) -> "Layout":
        """Returns the layout of N query heads, K key/value heads and G lists."""
        p, w = (1, num_kv_heads) if num_lists == 1 else (num_kv_heads, 1)
        r = num_lists // p
        return cls(p=p, r=r, w=w, q=num_heads // (p * r * w))

    def split_heads(self, x: Shaped[Array, "B C N size"]) -> Shaped[Array, "B C P R W Q size"]:
        """Splits the axis of query heads."""
        b, c, _, size = x.shape
        return x.reshape(b, c, self.p, self.r, self.w, self.q, size)

    def split_lists(self, indices: Int32[Array, "B C G k"]) -> Int32[Array, "B C P R k"]:
        """Splits the axis of lists."""
        b, c, _, size = indices.shape
        return indices.reshape(b, c, self.p, self.r, size)

    def fetch(
        self, x: Float[Array, "#B S K size"], indices: Int32[Array, "B C P R k"]
    ) -> Float[Array, "B C P R k W size"]:
        """Gathers what each slot lists, 0 where it is masked; a batch axis of 1 is one table for all."""
        tables, s, _, size = x.shape
        x = x.reshape(tables, s, self.p, self.w * size)
        one_head = lambda x, i: x.at[i].get(mode="fill", fill_value=0)
        heads = jax.vmap(one_head, (1, 1), 1)
        if tables == indices.shape[0]:
            rows = jax.vmap(heads)(x, indices)
        else:
            rows = jax.vmap(heads, (None, 0))(x[0], indices)
        return rows.reshape(*indices.shape, self.w, size)


def listed(indices: Int32[Array, "B C P R k"], num_keys: int) -> Bool[Array, "B C P R 1 1 k"]:
    """Returns which slots are not masked."""
    return (indices < num_keys)[:, :, :, :, None, None]
