r"""
Sample completions to be ranked: K of each prompt, from one model or several.

    python recipes/sample_completions.py --dataset_name prompts.jsonl --output_dir outputs/completions \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --num_completions 4

Two models mixed, with a system prompt; who wrote what is a letter in `completions.jsonl`, and `models.json`, which
annotators need not see, says which model the letter is:

    python recipes/sample_completions.py --dataset_name prompts.jsonl --output_dir outputs/completions \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct my-own-model --num_completions 4 \
        --system_prompt "Answer in one sentence." --temperature 0.9

Stopped, it goes on where it was when it is started again. Then rank them: `rank_completions.py`.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from sft import RecipeArguments, load_split
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

from trl_ext.adapters.shared_base import base_of_adapter, is_adapter
from trl_ext.data.items import COMPLETIONS_FILE, item_id
from trl_ext.data.records import append_line, read_lines
from trl_ext.data.rows import kind_of, located


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of models


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="prompts: a Hub id, a data file or a folder")
    parser.add_argument("--dataset_config", help="of a dataset on the Hub")
    parser.add_argument("--split", default="train")
    parser.add_argument("--prompt_column", default="prompt")
    parser.add_argument("--model_name_or_path", nargs="+", required=True, help="one model or several")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_completions", type=int, default=4, help="K of each prompt, shared among the models")
    parser.add_argument("--max_prompts", type=int, help="only so many")
    parser.add_argument("--system_prompt", help="put before conversations; makes conversations of texts")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--max_completion_length", type=int, default=256, help="tokens")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts at once")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.num_completions < 2:
        parser.error("--num_completions must be at least 2: there is nothing to rank in one.")
    if args.num_completions < len(args.model_name_or_path):
        parser.error("--num_completions must be at least the number of models.")
    if len(args.model_name_or_path) > len(LETTERS):
        parser.error(f"--model_name_or_path takes up to {len(LETTERS)} models: each is a letter.")
    return args


def load_prompts(args: argparse.Namespace) -> list:
    """The prompts, each once, all texts or all conversations."""
    return list(prompts_by_row(args).values())


def prompts_by_row(args: argparse.Namespace) -> dict[int, str | list]:
    """
    The prompts, each once, by the row in which it is first.

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
    See that every model can go on from every prompt, before the first is sampled.

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


def context_of(config) -> int | None:
    """How many tokens a model was made for; None where that has no bound."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)  # absent from others


def num_tokens(tokenizer, prompt: str | list) -> int:
    """Of what the model is given to go on from."""
    return len(tokenizer(input_text(tokenizer, prompt), add_special_tokens=isinstance(prompt, str))["input_ids"])


def input_text(tokenizer, prompt: str | list) -> str:
    """What the model is given to go on from."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def sample(model, tokenizer, prompts: list, count: int, args: argparse.Namespace) -> list[list]:
    """`count` completions of each prompt, of the prompt's kind: texts, or a reply as a list of one message."""
    is_chat = not isinstance(prompts[0], str)
    texts = [input_text(tokenizer, prompt) for prompt in prompts]
    inputs = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=not is_chat
    ).to(model.device)
    inputs.pop("token_type_ids", None)
    ids = model.generate(
        **inputs,
        do_sample=True,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=0,
        max_new_tokens=args.max_completion_length,
        num_return_sequences=count,
        pad_token_id=tokenizer.pad_token_id,
    )
    decoded = tokenizer.batch_decode(ids[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
    replies = [[{"role": "assistant", "content": text}] if is_chat else text for text in decoded]
    return [replies[i : i + count] for i in range(0, len(replies), count)]


def load_tokenizer(name: str):
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"The tokenizer of {name} has neither a padding nor an end-of-sequence token, so prompts cannot be put "
                "into one batch. Give it one (`tokenizer.pad_token = ...`) and save it."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, dtype: str):
    tokenizer = load_tokenizer(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def sample_all(args: argparse.Namespace, prompts: list, folder: Path) -> None:
    """A file of each model's completions, which is what a stopped run goes on from."""
    for number, name in enumerate(args.model_name_or_path):
        file = folder / f"samples-{number}.jsonl"
        done = {json.dumps(row["prompt"]) for row in read_lines(file)} if file.is_file() else set()
        missing = [prompt for prompt in prompts if json.dumps(prompt) not in done]
        if not missing:
            continue
        model, tokenizer = load_model(name, args.dtype)
        # Of the first models one more each, where K cannot be shared equally
        count = len(range(number, args.num_completions, len(args.model_name_or_path)))
        for start in tqdm(range(0, len(missing), args.batch_size), desc=f"Sampling from {name}"):
            batch = missing[start : start + args.batch_size]
            set_seed(hash((args.seed, number, len(done) + start)) % 2**32)
            for prompt, completions in zip(batch, sample(model, tokenizer, batch, count, args), strict=True):
                append_line(file, {"prompt": prompt, "completions": completions})


def combine(args: argparse.Namespace, folder: Path) -> int:
    """Mix the models' completions, anonymous and in random order, into `completions.jsonl`."""
    rng = random.Random(args.seed)
    letters = rng.sample(LETTERS[: len(args.model_name_or_path)], len(args.model_name_or_path))
    names = dict(zip(letters, args.model_name_or_path, strict=True))
    (folder / "models.json").write_text(json.dumps(names, indent=2), encoding="utf-8")
    by_prompt = {}
    for number, letter in enumerate(letters):
        for row in read_lines(folder / f"samples-{number}.jsonl"):
            prompt, mixed = by_prompt.setdefault(json.dumps(row["prompt"]), (row["prompt"], []))
            mixed += [(completion, letter) for completion in row["completions"]]
    rows = []
    for prompt, mixed in by_prompt.values():
        distinct = list({json.dumps(completion): (completion, letter) for completion, letter in mixed}.values())
        rng.shuffle(distinct)
        if len(distinct) < 2:
            continue  # the same text each time: nothing to rank
        completions, sources = map(list, zip(*distinct, strict=True))
        rows.append(
            {"id": item_id(prompt, completions), "prompt": prompt, "completions": completions, "sources": sources}
        )
    partial = folder / f"{COMPLETIONS_FILE}.partial"
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    partial.replace(folder / COMPLETIONS_FILE)  # which `rename` would not do on Windows
    return len(rows)


def main() -> None:
    args = parse_args()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name != "batch_size"}
    kept = folder / "settings.json"
    has_samples = any(file.stat().st_size for file in folder.glob("samples-*.jsonl"))
    try:
        if has_samples and kept.is_file() and json.loads(kept.read_text(encoding="utf-8")) != settings:
            raise ValueError(
                f"{folder} holds completions sampled with other settings ({kept}). Use another --output_dir, or the same "
                "settings to go on."
            )
        rows = prompts_by_row(args)
        check_prompts(args, rows)
    except (ValueError, OSError) as error:  # the latter where there is no such model
        sys.exit(f"error: {error}")
    prompts = list(rows.values())
    kept.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    sample_all(args, prompts, folder)
    count = combine(args, folder)
    print(f"{count} prompts with {args.num_completions} completions: {folder / COMPLETIONS_FILE}")
    print(f"Rank them: python recipes/rank_completions.py --folder {folder}")


if __name__ == "__main__":
    main()
