r"""
Merge a trained adapter into its base, with its head, critic, tie parameters and tokenizer, into one plain model:

    python recipes/merge.py --adapter my-adapter --output_dir my-model

The base is loaded unquantized in float32 (4 bytes per parameter of memory), whatever it was trained in, and the result
is rounded once. How much of the adapter that rounding loses is printed.
"""

import sys
from dataclasses import dataclass, field

from shared.arguments import parse_arguments
from trl_ext import merge_adapter


@dataclass
class MergeArguments:
    """Arguments of this script."""

    adapter: str = field(metadata={"help": "The adapter: a folder or Hub id."})
    output_dir: str = field(metadata={"help": "Where to write the model: a new folder."})
    dtype: str = field(
        default="bfloat16",
        metadata={"help": "Of the model that is written.", "choices": ["bfloat16", "float16", "float32"]},
    )


def parse(args: list[str]) -> tuple:
    """Returns the arguments of this script."""
    return parse_arguments(__doc__, (MergeArguments,), args)


def main() -> None:
    (args,) = parse(sys.argv[1:])
    losses = merge_adapter(args.adapter, args.output_dir, args.dtype)
    print(f"Written to {args.output_dir}. Lost by rounding to {args.dtype}:")
    for name, loss in losses.items():
        print(f"  {name}: {loss:.2%} of what the adapter changes")


if __name__ == "__main__":
    main()
