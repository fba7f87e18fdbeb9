"""The least that the adapter with InfoNCE has to do: FLOPs and bytes, and the time they take at a device's ceilings."""

from __future__ import annotations

from typing import NamedTuple


class Work(NamedTuple):
    """FLOPs of matrix products, and bytes to and from the device's memory."""

    flops: float
    moved: float

    def seconds(self, flops_s: float, bytes_s: float) -> float:
        """The longer of the two at a device's ceilings."""
        return max(self.flops / flops_s, self.moved / bytes_s)


def least_work(
    op: str, mode: str, *, rows: int, encoder: int, hidden: int, embedding: int, directions: int, itemsize: int
) -> Work:
    """What one pass cannot do without.

    2B rows go through the MLP: 4B(DH + HE) FLOPs forward and 4B(2HE + DH) backward, without a gradient of x.
    Logits, one direction: 4·B²·E forward, where the anchors' gradient comes with the loss, and 4·B²·E backward. Both
    directions: 2·B²·E forward for the two sums, and 8·B²·E backward in two passes without atomics. Bytes: each input
    read once a pass, embeddings and gradients written once; logits cost none.

    Args:
        op: `adapter_info_nce`, or `info_nce` for the loss alone.
        mode: `forward` or `backward`.
        rows: B.
        encoder: D.
        hidden: H.
        embedding: E.
        directions: 1, anchor to positive, or 2.
        itemsize: bytes of an element of encodings and embeddings; weights are float32.
    """
    forward = mode == "forward"
    flops = float(rows * rows * embedding * (4 if directions == 1 else 2 if forward else 8))
    moved = float(2 * rows * embedding * itemsize * (1 if forward else 2))
    if op == "adapter_info_nce":
        first, second = encoder * hidden, hidden * embedding
        flops += 4 * rows * (first + second if forward else first + 2 * second)
        moved += 2 * rows * encoder * itemsize + 4 * (first + second)
    return Work(flops, moved)
