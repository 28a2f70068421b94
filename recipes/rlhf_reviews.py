"""
What `rlhf.py` works on where it is given nothing: demonstrations and prompts from the quickstart's grammar of film
reviews, and a tiny language model with random weights.

    python recipes/rlhf_reviews.py --output_dir outputs/rlhf/data

Conversations here are reviews: the user begins one, the assistant goes on. Their messages are written one after the
other, and the assistant's ends the text.
"""

import argparse
import json
import random
from pathlib import Path

from quickstart_corpus import distinct_openings, write_continuation
from quickstart_data import mixed, small_llama, train_tokenizer
from transformers import LlamaForCausalLM, set_seed


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--corpus_size", type=int, default=5000, help="demonstrations; half of them bad reviews")
    parser.add_argument("--num_test", type=int, default=200, help="openings of bad reviews that are held out")
    parser.add_argument("--vocab_size", type=int, default=1400)
    parser.add_argument("--hidden_size", type=int, default=96)
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def write_rows(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_reviews(folder: Path, corpus_size: int, num_test: int, seed: int) -> list[str]:
    """Demonstrations, and prompts of two kinds: mostly bad openings to train on, and bad ones that are held out."""
    rng = random.Random(seed)
    negative = distinct_openings(0, corpus_size // 2 + num_test, rng)
    positive = distinct_openings(1, corpus_size // 2, rng)
    held_out, negative = negative[:num_test], negative[num_test:]
    reviews = [
        (text, write_continuation(label, rng)) for label, part in enumerate((negative, positive)) for text in part
    ]
    write_rows(
        folder / "demonstrations.jsonl",
        [{"prompt": user(text), "completion": assistant(more)} for text, more in reviews],
    )
    write_rows(folder / "prompts.jsonl", [{"prompt": user(text)} for text in mixed(negative, positive, rng)])
    write_rows(folder / "test_prompts.jsonl", [{"prompt": user(text)} for text in held_out])
    return [text + more for text, more in reviews]


def main() -> None:
    args = parse_args()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    texts = write_reviews(folder, args.corpus_size, args.num_test, args.seed)
    tokenizer = train_tokenizer(texts, args.vocab_size)
    tokenizer.chat_template = CHAT_TEMPLATE
    set_seed(args.seed)
    # As in the quickstart: the default initializer_range is for wider models
    model = LlamaForCausalLM(small_llama(tokenizer, args.hidden_size, args.num_layers, initializer_range=0.06))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    print(
        f"{len(texts)} film reviews, {args.num_test} openings held out, a model of {model.num_parameters():,} parameters"
    )
    print(f"The first: {texts[0]}")


if __name__ == "__main__":
    main()
