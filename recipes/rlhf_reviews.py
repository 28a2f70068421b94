"""
The data of `rlhf.py` where it is given none: demonstrations and prompts from the quickstart's grammar of film reviews,
and a tiny language model with random weights.

    python recipes/rlhf_reviews.py --output_dir outputs/rlhf/data

Conversations here are reviews: the user begins one, the assistant goes on. Their messages are written one after the
other, and the assistant's ends the text.
"""

import argparse
import sys
from pathlib import Path

from transformers import LlamaForCausalLM, set_seed

from film_reviews.models import small_llama, train_tokenizer
from loop.data import write_reviews


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--corpus_size", type=int, default=5000, help="demonstrations; half of them bad reviews")
    parser.add_argument("--num_test", type=int, default=200, help="openings of bad reviews that are held out")
    parser.add_argument("--vocab_size", type=int, default=1400)
    parser.add_argument("--hidden_size", type=int, default=96)
    parser.add_argument("--num_layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(args)


def main() -> None:
    args = parse(sys.argv[1:])
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
