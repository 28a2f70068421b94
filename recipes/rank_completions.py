"""
Rank completions by hand, on a local web page:

    python recipes/rank_completions.py --folder outputs/completions

where `sample_completions.py` (or you) put `completions.jsonl`. The page shows a prompt and its completions in random
order. Type a ranking, `b > c = d > a` (or `b>c=d>a`; leave out what you cannot judge), and press Enter; or choose a
place for each with the mouse. Alt+S skips, Alt+F flags and skips, Alt+U goes back to the one before.

Each judgement is on disk before the next prompt appears, and nothing is asked twice. Several people may work at once,
each under a name of their own. When done,

    python recipes/rank_completions.py --folder outputs/completions --export rankings.parquet

writes what `RankingRewardTrainer` and `RankingDPOTrainer` train on, and prints how far the annotators agree.
"""

import argparse
import sys

from collecting.export import export
from collecting.session import items_to_rank


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="where completions.jsonl is, and judgements go")
    parser.add_argument("--export", metavar="FILE", help="write the rankings to a .parquet or .jsonl file, and end")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets others on your network in")
    parser.add_argument("--port", type=int, default=7860)
    return parser.parse_args(args)


def main() -> None:
    args = parse(sys.argv[1:])
    try:
        if args.export:
            export(args.folder, args.export)
            return
        items = items_to_rank(args.folder)
        from collecting.page import SHORTCUTS, Page
    except ValueError as error:
        sys.exit(f"error: {error}")
    except ImportError:
        sys.exit("error: the page needs Gradio: pip install -e '.[collect]'")
    page = Page(args.folder, items).blocks
    page.launch(server_name=args.host, server_port=args.port, head=SHORTCUTS, inbrowser=False)


if __name__ == "__main__":
    main()
