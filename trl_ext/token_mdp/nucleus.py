r"""
Action masking: the nucleus of one distribution as the support of another.

With pi_psi the masking policy, and N(s) its nucleus, the smallest set of most likely tokens with probability p together,

    pi~(a|s) = pi(a|s) / sum_{b in N(s)} pi(b|s)   for a in N(s), and 0 for others.
"""

import torch


def nucleus(
    logits: torch.Tensor, top_p: float, min_tokens_to_keep: int = 1, always: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Marks the tokens of the nucleus.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`): Logits of the masking policy.
        top_p (`float`): p. The token that reaches it is in; 1 is everything.
        min_tokens_to_keep (`int`, *optional*, defaults to `1`): So many of the most likely are in, whatever p.
        always (`torch.Tensor`, *optional*): Ids that are in, however unlikely. Those beyond the logits are passed
            over: tokenizers have ids, of images or added and never used, for which a model has no logits.

    Returns:
        `torch.Tensor` of shape `(..., V)`, bool.

    Reference: Holtzman et al. 2020, https://huggingface.co/papers/1904.09751, eq. 2-3.
    """
    sorted_logits, order = logits.float().sort(dim=-1, descending=True)
    probabilities = sorted_logits.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = (before < top_p) | (top_p >= 1)  # by rounding, the sum may reach 1 before the last token
    kept[..., :min_tokens_to_keep] = True
    allowed = torch.empty_like(kept).scatter_(-1, order, kept)
    if always is not None:
        allowed[..., always[always < allowed.size(-1)]] = True
    return allowed


def masked_log_probs(
    logits: torch.Tensor, allowed: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Returns log pi~ of the given tokens and the entropy of pi~, in nats.

    Args:
        logits (`torch.Tensor` of shape `(..., V)`): Logits of the policy, divided by its temperature.
        allowed (`torch.Tensor` of shape `(..., V)`, bool): The nucleus.
        tokens (`torch.Tensor` of shape `(...)`): Ids of tokens, all in the nucleus.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`, float32 of shape `(...)` each.
    """
    log_probs = logits.float().masked_fill(~allowed, -torch.inf).log_softmax(dim=-1)
    entropy = -torch.where(allowed, log_probs.exp() * log_probs.masked_fill(~allowed, 0), 0).sum(dim=-1)
    return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), entropy
