"""
A row in which completions share their prompt, so that the model runs it once, and the mask that keeps them apart.

The completions of a prompt lie in one row, after what they share:

    tokens        the film was  |  good <eos>  |  a slow bore <eos>
    segments      0   0    0    |  1    1      |  2 2    2    2
    positions     0   1    2    |  3    4      |  3 4    5    6

Each token sees those of its own segment and of the prefix that come before it, and has the position it would have if
its completion stood alone. A causal model then gives every token what it would give it alone. K completions of C tokens
after a prompt of P take P + K C tokens in place of K (P + C), or of K (K - 1) (P + C) as pairs.
"""

import torch
from transformers import PreTrainedConfig
from transformers.masking_utils import BlockMask, create_block_mask

from ..compat import attention_of


PADDING = -1  # segment of padding


def common_prefix_length(sequences: list[list[int]]) -> int:
    """Returns the number of first tokens that all sequences have in common."""
    length = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def pack(prefix: list[int], suffixes: list[list[int]]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Returns `(input_ids, positions, segments)` of one row, as the module describes them, and the place in the row at
    which each suffix starts."""
    input_ids, positions, segments, starts = list(prefix), list(range(len(prefix))), [0] * len(prefix), []
    for number, suffix in enumerate(suffixes, start=1):
        starts.append(len(input_ids))
        input_ids += suffix
        positions += range(len(prefix), len(prefix) + len(suffix))
        segments += [number] * len(suffix)
    return input_ids, positions, segments, starts


def visible(segments: torch.Tensor, positions: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """
    Returns the tokens that each token sees.

    Args:
        segments (`torch.Tensor` of shape `(B, L)`): 0 in the prefix, 1, 2, ... in the completions, `PADDING`.
        positions (`torch.Tensor` of shape `(B, L)`)
        window (`int`, *optional*): The number of last positions that a token sees, itself included, if not all.

    Returns:
        `torch.Tensor` of shape `(B, L, L)`, bool: True where token `[b, i]` sees token `[b, j]`. Padding sees padding
        only, and is seen by nothing else: a row that sees nothing would be NaN.
    """
    s_i, s_j = segments.unsqueeze(2), segments.unsqueeze(1)
    p_i, p_j = positions.unsqueeze(2), positions.unsqueeze(1)
    return _sees(s_i, s_j, p_i, p_j, window)


def _sees(s_i, s_j, p_i, p_j, window: int | None) -> torch.Tensor:
    """Tells if a token of segment s_i at position p_i sees one of segment s_j at position p_j."""
    # Where segments are equal or j lies in the prefix, positions rise along the row
    seen = ((s_i == s_j) | ((s_j == 0) & (s_i != PADDING))) & (p_j <= p_i)
    return seen if window is None else seen & (p_i - p_j < window)


def attention_mask(
    config: PreTrainedConfig, segments: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | BlockMask | dict[str, torch.Tensor | BlockMask]:
    """
    Returns [`visible`] in the form that a model of this config takes: by kind of layer where some slide over a window.

    Raises:
        ValueError: where the attention implementation, or a layer that is not attention, takes no mask.
    """
    config = config.get_text_config()
    implementation = attention_of(config)
    if implementation not in ("eager", "sdpa", "flex_attention"):
        raise ValueError(f"attention by {implementation!r} takes no mask of blocks")
    layer_types = getattr(config, "layer_types", None)  # absent where all layers are alike
    window = getattr(config, "sliding_window", None)
    # GPT-Neo makes windows of its own, by place in the row
    if "local" in getattr(config, "attention_layers", []):
        raise ValueError("layers of type 'local' take no mask of blocks")
    kinds = set(layer_types or (["full_attention"] if window is None else ["sliding_attention"]))
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers of type {sorted(kinds - {'full_attention', 'sliding_attention'})} take no mask")

    def mask(window: int | None):
        if implementation == "flex_attention":
            return _block_mask(segments, positions, window)
        seen = visible(segments, positions, window).unsqueeze(1)  # (B, 1, L, L)
        if implementation == "sdpa":
            return seen
        return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    masks = {kind: mask(window if kind == "sliding_attention" else None) for kind in kinds}
    return masks if layer_types and "sliding_attention" in kinds else next(iter(masks.values()))


def _block_mask(segments: torch.Tensor, positions: torch.Tensor, window: int | None) -> BlockMask:
    """Returns [`visible`] as FlexAttention takes it, which skips the blocks in which nothing is seen."""

    def sees(b, head, i, j):
        return _sees(segments[b, i], segments[b, j], positions[b, i], positions[b, j], window)

    batch_size, length = segments.shape
    return create_block_mask(sees, batch_size, None, length, length, device=segments.device)
