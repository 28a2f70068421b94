"""Names on the Hub of what a loop publishes, and refusals of what would fail there, before anything is trained."""

import argparse

from .stages import LoopError


SUFFIXES = {  # of the repositories' names, in the order of the loop
    "sft": "-sft",
    "rankings": "-rankings",
    "reward_model": "-reward-model",
    "policy": "",
    "rollouts": "-rollouts",
}


def hub_ids(namespace: str, name: str) -> dict[str, str]:
    """Returns the ids of the five, by what they are."""
    return {what: f"{namespace}/{name}{suffix}" for what, suffix in SUFFIXES.items()}


def check_names(args: argparse.Namespace) -> None:
    """Raises [`LoopError`] unless namespace, name and licence are given, and the names are such as the Hub takes."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    missing = [f"--{name}" for name in ("namespace", "name", "licence") if not getattr(args, name)]
    if missing:
        raise LoopError(f"--push_to_hub needs {' and '.join(missing)} as well.")
    try:
        validate_repo_id(f"{args.namespace}/{args.name}-reward-model")  # the longest
    except HFValidationError as error:
        raise LoopError(f"--namespace {args.namespace} --name {args.name}: {error}") from None


def check_licence_is_known(args: argparse.Namespace) -> None:
    """Raises [`LoopError`] for a licence that the Hub would refuse when all is trained."""
    from trl_ext.hub.metadata import check_licence

    try:
        check_licence(args.licence, args.licence_name, "--licence", "--licence_name")
    except ValueError as error:
        raise LoopError(str(error)) from None


def check_visibility(namespace: str, name: str) -> None:
    """Raises [`LoopError`] if one of the five, which should be private, is there already and public."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    from trl_ext.hub.uploading import cause_of, compare_visibility

    for what, repo_id in hub_ids(namespace, name).items():
        try:
            compare_visibility(HfApi(), repo_id, "dataset" if what in ("rankings", "rollouts") else "model", True)
        except RepositoryNotFoundError:  # it will be created
            pass
        except Exception as error:  # the client's own errors have no class in common
            raise LoopError(f"--private: {cause_of(error, repo_id)}") from None


def check_token(namespace: str) -> None:
    """Raises [`LoopError`] unless the token may write to the namespace, as far as the Hub tells."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    try:
        user = HfApi().whoami()
    except LocalTokenNotFoundError:
        raise LoopError("--push_to_hub: there is no token. Log in with `hf auth login`, or set HF_TOKEN.") from None
    except Exception as error:  # the client's own errors have no class in common
        from trl_ext.hub.uploading import cause_of

        raise LoopError(f"--push_to_hub: {cause_of(error, namespace)}") from None
    namespaces = [user["name"], *(organisation["name"] for organisation in user["orgs"])]
    if namespace not in namespaces:
        raise LoopError(
            f"--namespace {namespace}: the token is {user['name']}'s, who may write to {', '.join(namespaces)}."
        )
    if user["auth"].get("accessToken", {}).get("role") == "read":  # OAuth has none
        raise LoopError(
            "--push_to_hub: the token may only read. Make one that may write, on https://hf.co/settings/tokens."
        )
