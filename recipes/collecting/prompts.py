"""Prompts that are sampled for: read, and looked at before the first sample."""

import argparse
import json

from transformers import AutoConfig

from shared.arguments import RecipeArguments
from shared.data import load_split
from trl_ext.adapters.shared_base import base_of_adapter, is_adapter
from trl_ext.data.rows import kind_of, located

from .sampling import context_of, load_tokenizer, num_tokens


def prompts_by_row(args: argparse.Namespace) -> dict[int, str | list]:
    """
    Returns the prompts, each once and by the row in which it is first.

    Raises:
        ValueError: for a row that is neither text nor a conversation, or not what the first row is.
    """
    dataset = load_split(
        RecipeArguments(dataset_name=args.dataset_name, dataset_config=args.dataset_config), args.split
    )
    if args.prompt_column not in dataset.column_names:
        raise ValueError(
            f"{args.dataset_name} has no column {args.prompt_column!r}, only {dataset.column_names}. Name the one that "
            "holds the prompts with --prompt_column."
        )
    prompts, rows, first = dataset[args.prompt_column][: args.max_prompts or len(dataset)], {}, None
    for row, prompt in enumerate(prompts):
        where = f"{args.dataset_name}, row {row}"
        kind = located(where, kind_of, prompt, args.prompt_column)
        first = first or kind
        if kind is None or kind != first:
            expected = "a text or a list of messages" if kind is None else f"a {first} like those before it"
            raise ValueError(
                f"{where}, column `{args.prompt_column}`: must be {expected}, got {prompt!r:.80}. Fill or remove the row."
            )
        if args.system_prompt is not None:
            turns = [{"role": "user", "content": prompt}] if kind == "text" else prompt
            prompt = [{"role": "system", "content": args.system_prompt}, *turns]
        rows.setdefault(json.dumps(prompt), (row, prompt))
    return dict(rows.values())


def check_prompts(args: argparse.Namespace, prompts: dict[int, str | list]) -> None:
    """
    Refuses prompts that a model cannot go on from, before the first is sampled.

    Raises:
        ValueError: for a prompt that a chat template refuses, or that leaves no room for a completion; and a model
            whose tokenizer cannot do what it is asked.
    """
    for name in args.model_name_or_path:
        tokenizer = load_tokenizer(name)
        base, revision = base_of_adapter(name) if is_adapter(name) else (name, None)
        context = context_of(AutoConfig.from_pretrained(base, revision=revision))
        for row, prompt in prompts.items():
            where = f"{args.dataset_name}, row {row}, column `{args.prompt_column}`"
            if not isinstance(prompt, str) and tokenizer.chat_template is None:
                raise ValueError(
                    f"{name} has no chat template, and {where} is a conversation (--system_prompt makes one of a text). "
                    "Use a model that has one, or texts."
                )
            try:
                length = num_tokens(tokenizer, prompt)
            except Exception as error:  # whatever the template raises
                raise ValueError(
                    f"{where}: the chat template of {name} refuses it ({error}). Mend or remove the row."
                ) from None
            if length == 0:
                raise ValueError(f"{where}: has no tokens for {name} to go on from. Fill or remove the row.")
            if context is not None and length + args.max_completion_length > context:
                raise ValueError(
                    f"{where}: has {length} tokens, which with {args.max_completion_length} for the completion are more "
                    f"than the {context} of {name}. Shorten or remove the row, or lower --max_completion_length."
                )
