r"""
Publish what `rlhf.py` made: three models and two datasets, which link to each other.

    python recipes/rlhf_publish.py --output_dir outputs/rlhf --namespace user --name films --licence cc-by-4.0 \
        --judge "two friends"

What is uploaded lies in `OUTPUT_DIR/published`, a folder for each repository: without checkpoints, without paths of
this machine, with cards that tell of the others. Run again, it uploads what is missing or has changed.
"""

import argparse
import sys

from loop.publishing import Publisher
from trl_ext.hub.metadata import check_licence
from trl_ext.hub.uploading import PublishError


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="of rlhf.py")
    parser.add_argument("--namespace", required=True, help="user or organisation")
    parser.add_argument("--name", required=True, help="of the policy; the others are NAME-sft, NAME-rankings, ...")
    parser.add_argument("--licence", required=True, help="of models and datasets, by the Hub's identifier")
    parser.add_argument("--licence_name", help="of a licence that the Hub does not know, with --licence other")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--judge", required=True, help="who ranked, in a few words")
    parser.add_argument("--rubric", help="what the judge was told")
    parser.add_argument("--base_model", help="Hub id of the model it began with, if it is there")
    parser.add_argument("--demonstrations", help="Hub id of the dataset, if it is there")
    parser.add_argument("--prompts", help="likewise")
    parser.add_argument("--about", help="a sentence or two on what it is all about")
    args = parser.parse_args(args)
    try:
        check_licence(args.licence, args.licence_name, "--licence", "--licence_name")
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    publisher = Publisher(parse(sys.argv[1:]))
    failed = []
    for what, repo_id in publisher.ids.items():
        try:
            print(f"{repo_id}: {getattr(publisher, what)()}", flush=True)
        except PublishError as error:
            failed.append(repo_id)
            print(f"{repo_id}: failed. {error}", flush=True)
    if failed:
        sys.exit(f"error: {len(failed)} of {len(publisher.ids)} could not be published: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
