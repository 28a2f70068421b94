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

from tqdm import tqdm
from transformers import set_seed

from collecting.prompts import check_prompts, prompts_by_row
from collecting.sampling import load_model, sample
from trl_ext.data.items import COMPLETIONS_FILE, item_id
from trl_ext.data.records import append_line, read_lines


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of models


def parse(args: list[str]) -> argparse.Namespace:
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
    args = parser.parse_args(args)
    if args.num_completions < 2:
        parser.error("--num_completions must be at least 2: there is nothing to rank in one.")
    if args.num_completions < len(args.model_name_or_path):
        parser.error("--num_completions must be at least the number of models.")
    if len(args.model_name_or_path) > len(LETTERS):
        parser.error(f"--model_name_or_path takes up to {len(LETTERS)} models: each is a letter.")
    return args


def sample_all(args: argparse.Namespace, prompts: list, folder: Path) -> None:
    """Writes a file of each model's completions, from which a stopped run goes on."""
    settings = {name: getattr(args, name) for name in ("temperature", "top_p", "max_completion_length")}
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
            for prompt, completions in zip(batch, sample(model, tokenizer, batch, count, **settings), strict=True):
                append_line(file, {"prompt": prompt, "completions": completions})


def combine(args: argparse.Namespace, folder: Path) -> int:
    """Mixes the models' completions, anonymous and in random order, into `completions.jsonl`; returns their number."""
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
    args = parse(sys.argv[1:])
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
