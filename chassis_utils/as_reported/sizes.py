"""Ranks, layers and block sizes of the studies' models as the same fractions of other models."""


def scaled_rank(width: int, rank: int = 64, original_width: int = 2048) -> int:
    """A rank of the CHASSIS study (of width 2048) as the same fraction of another width, at least 1.

    Raises `ValueError` for a rank below 1, which no fraction makes one of, and one above the original width.
    """
    if rank < 1:
        raise ValueError(f"rank {rank} is below 1: give the rank that the study had at width {original_width}")
    if rank > original_width:
        raise ValueError(f"rank {rank} is above {original_width}, the width of the study's states: give a lower one")
    return max(1, round(rank * width / original_width))


def scaled_layer(depth: int, layer: int, original_depth: int = 22) -> int:
    """A layer of the CHASSIS study (of 22) at the same fraction of another depth; `ValueError` for none of them."""
    if not 0 <= layer <= original_depth:
        raise ValueError(f"layer {layer} is none of the study's: give one from 0 to {original_depth}")
    return round(layer * depth / original_depth)


def scaled_block_size(width: int, block_size: int, original_width: int = 4096) -> int:
    """The block size that gives a model of this width as many blocks a side as the FFT study's had; at least 2.

    Raises `ValueError` for a block size below 1 or above the original width.
    """
    if not 1 <= block_size <= original_width:
        raise ValueError(f"block size {block_size} does not fit the study's width: give one from 1 to {original_width}")
    return max(2, round(block_size * width / original_width))
