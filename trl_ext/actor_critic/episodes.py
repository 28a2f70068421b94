"""
Episodes: recorded rollouts, read back as what a critic can be fitted to, with their Monte-Carlo returns

    G_t = r_t + gamma G_{t+1}

over the chosen tokens, of the rewards that were recorded: dense ones, and less the KL that was taken off, too.

A completion that was cut has such a return only if the limit is the MDP's horizon (`truncation="penalty"`). With
`"bootstrap"` and `"mask"` nothing is known of what would have followed, and it is left out.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from datasets import Dataset


COLUMNS = ["prompt", "completion_ids", "tokens", "own", "terminated", "rewards"]  # of those that rollouts have
HELD_OUT = 0.1  # share of the rollouts that says when to stop


@dataclass
class Episode:
    """
    A completion with what it was worth.

    Args:
        prompt_ids, completion_ids (`list[int]`): Its tokens.
        chosen (`list[bool]`): True at tokens of the completion that the policy chose.
        returns (`list[float]`): G_t of each token; 0 where none was chosen.
        states (`torch.Tensor` of shape `(n, H)`, *optional*): Hidden states in which n tokens were chosen, if they are kept.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    chosen: list[bool]
    returns: list[float]
    states: torch.Tensor | None = None


def read_episodes(
    rollouts: Dataset,
    tokenizer,
    vocab_size: int,
    tokenize: Callable[[list], list[list[int]]],
    targets_of: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    truncation: str,
) -> list[Episode]:
    """
    Reads recorded rollouts, in an order that does not depend on theirs.

    Args:
        rollouts ([`~datasets.Dataset`]): A row per completion, as [`~trl_ext.load_rollouts`] gives them.
        tokenizer (`PreTrainedTokenizerBase`): The policy's.
        vocab_size (`int`): Tokens that the policy knows.
        tokenize (`Callable`): Makes tokens of prompts as the trainer does.
        targets_of (`Callable`): Makes what a critic is fitted to `(B, T)` of rewards, chosen tokens and KL (0 if none was
            recorded), as the trainer does.
        truncation (`str`): The trainer's, which says whether completions that were cut are worth what they earned.

    Raises:
        ValueError: for rollouts that lack a column, hold other tokens than the policy's, or leave nothing to learn from.
    """
    missing = [name for name in COLUMNS if name not in getattr(rollouts, "column_names", ())]
    if not isinstance(rollouts, Dataset) or missing:
        raise ValueError(
            f"`rollouts` is a {type(rollouts).__name__} that lacks the columns {missing}. Pass the completions of a "
            "training with `save_rollouts=True`: `load_rollouts(output_dir)['train']`."
        )
    rows = list(
        rollouts.select_columns([*COLUMNS, *({"kl"} & {*rollouts.column_names})])
    )  # `to_list` of datasets 4 leaves messages in JSON
    check_tokens(rows, tokenizer, vocab_size)
    rows = [row for row in rows if any(row["own"]) and (row["terminated"] or truncation == "penalty")]
    if len(rows) < 2:
        raise ValueError(
            f"{len(rows)} of {len(rollouts)} rollouts have a return that is known to its end, and one to learn from and one "
            f"to be judged by are needed. Those without a score, or cut with `truncation={truncation!r}`, have none."
        )
    keys = [json.dumps(row["prompt"], sort_keys=True) for row in rows]
    prompts = list(dict(zip(keys, (row["prompt"] for row in rows), strict=True)).values())
    prompt_ids = dict(zip(dict.fromkeys(keys), tokenize(prompts), strict=True))
    kl = [row.get("kl") or [0.0] * len(row["own"]) for row in rows]
    columns = [[row["rewards"] for row in rows], [row["own"] for row in rows], kl]
    returns = targets_of(
        *(torch.nn.utils.rnn.pad_sequence([torch.tensor(x) for x in column], batch_first=True) for column in columns)
    ).tolist()
    episodes = [
        Episode(prompt_ids[key], row["completion_ids"], row["own"], values[: len(row["own"])])
        for key, row, values in zip(keys, rows, returns, strict=True)
    ]
    return sorted(episodes, key=lambda e: (e.prompt_ids, e.completion_ids, e.chosen, e.returns))


def check_tokens(rows: list[dict], tokenizer, vocab_size: int) -> None:
    """Refuses rollouts of another tokenizer: a critic would be fitted to other texts than were written."""
    spelled = {pair for row in rows for pair in zip(row["completion_ids"], row["tokens"], strict=True)}
    unknown = max((token_id for token_id, _ in spelled), default=0)
    mend = "Pass rollouts of a policy of the same tokenizer."
    if unknown >= vocab_size:
        raise ValueError(f"`rollouts` hold the token {unknown}, and the policy knows {vocab_size}. {mend}")
    ids = [token_id for token_id, _ in spelled]
    for (token_id, recorded), own in zip(spelled, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if recorded != own:
            raise ValueError(
                f"`rollouts` write token {token_id} as {recorded!r}, and the policy's tokenizer as {own!r}. {mend}"
            )


def divided(episodes: list[Episode], seed: int) -> tuple[list[Episode], list[Episode]]:
    """Divides episodes into those to learn from and those to be judged by: a share of the prompts, if there are enough."""
    generator = torch.Generator().manual_seed(seed)
    prompts = list(dict.fromkeys(tuple(e.prompt_ids) for e in episodes))
    groups = [tuple(e.prompt_ids) for e in episodes] if HELD_OUT * len(prompts) >= 1 else list(range(len(episodes)))
    keys = list(dict.fromkeys(groups))
    order = torch.randperm(len(keys), generator=generator).tolist()
    held_out = {keys[i] for i in order[: max(1, round(HELD_OUT * len(keys)))]}
    parts = [], []
    for episode, key in zip(episodes, groups, strict=True):
        parts[key in held_out].append(episode)
    return parts
