"""Hub: one file of a repository, a whole model of it, and pushing one.

In: a repository's name. Out: paths on this machine, or a commit. All of a model is read at one commit, and all of it
is written in one. huggingface_hub does the transfers, keeps the downloads and shows the progress.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError

from ..errors import HubError, OptionError
from .artefact import CARD, CONFIG, WEIGHTS, is_ours, outdated

# A branch or a tag, as far as git allows for it on the Hub; a tag comes after the commit, too late to be refused.
_REF = re.compile(r"(?!.*(\.\.|//|\.lock$|[./]$))\w[\w.\-/]*", re.ASCII)
_NAME = re.compile(r"[\w.\-]+/[\w.\-]+(@.+)?", re.ASCII)
# What huggingface_hub raises, the special ones first, and what to do.
_REMEDIES: tuple[tuple[str, str], ...] = (
    ("GatedRepoError", "Ask for access on its page, and log in with `hf auth login`."),
    (
        "RepositoryNotFoundError",
        "See that the name is right; a private repository takes a token: log in with `hf auth login`.",
    ),
    ("RevisionNotFoundError", "Name a branch, tag or commit that it has."),
    ("LocalEntryNotFoundError", "See that the Hub can be reached; what was never downloaded is not there offline."),
    ("EntryNotFoundError", "Name a model that push_to_hub wrote: se-surgery reads safetensors and no pickles."),
    ("HFValidationError", "Name it as USER/MODEL."),
    ("OfflineModeIsEnabled", "Unset HF_HUB_OFFLINE in the environment to go online."),
)
_NO_TOKEN = "Log in with `hf auth login`, or give a token that may do this."
_UNREACHED = "See that the Hub can be reached, and that the token may do this."
# The word alone may be part of a repository's name, which is in every address.
_XET = re.compile(r"xet-(read|write)-token|hf_xet|\bXet\b")
_NO_XET = (
    "This Hub has no Xet storage, which huggingface_hub uses wherever the package hf_xet is installed: set "
    "HF_HUB_DISABLE_XET=1 in the environment before Python starts."
)


def is_repo(name: str) -> bool:
    """Whether a text has the form of a repository's name, with or without a revision.

    Examples:
        >>> is_repo("timm/resnet18.a1_in1k"), is_repo("user/model@v1"), is_repo("./folder"), is_repo("resnet18")
        (True, True, False, False)
    """
    return bool(_NAME.fullmatch(name)) and not name.startswith(".")


def download(repo: str, filename: str, cache_dir: Any = None, token: str | None = None) -> Path:
    """One file of a repository, on this machine.

    Args:
        repo: `user/model`, or `user/model@revision`.
        filename: The file.
        cache_dir: Where downloads are kept; by default where huggingface_hub keeps them.
        token: A token with the right to read; by default that of the environment or of `hf auth login`.

    Raises:
        HubError: It cannot be had.
    """
    name, _, revision = repo.partition("@")
    with _explained(f"{filename!r} of {repo!r} cannot be had"):
        where = {"revision": revision or None, "cache_dir": cache_dir, "token": token}
        return Path(huggingface_hub.hf_hub_download(name, filename, **where, **_agent()))


def snapshot(repo: str, cache_dir: Any = None, token: str | None = None) -> Path:
    """A folder with the configuration and weights of one commit.

    The revision is looked up once, with the configuration; the weights are those of the commit it named then.

    Args:
        repo: `user/model`, or `user/model@revision`.
        cache_dir: Where downloads are kept.
        token: As for `download`.

    Raises:
        HubError: It cannot be had.
    """
    folder = download(repo, CONFIG, cache_dir, token).parent
    name = repo.partition("@")[0]
    weights = download(f"{name}@{folder.name}", WEIGHTS, cache_dir, token)
    if weights.parent != folder:
        raise HubError(f"{repo!r} is not kept by commit in {str(cache_dir)!r}. Name another cache_dir.")
    return folder


def card_of(repo: str, token: str | None = None) -> bytes | None:
    """The model card of a repository, if it has one.

    Raises:
        HubError: It cannot be had.
    """
    try:
        return download(repo, CARD, token=token).read_bytes()
    except HubError as error:
        if isinstance(error.__cause__, EntryNotFoundError):
            return None
        raise


def push(
    repo: str,
    files: Mapping[str, bytes],
    *,
    message: str,
    private: bool | None = None,
    branch: str | None = None,
    tag: str | None = None,
    token: str | None = None,
) -> str:
    """Put files into a repository in one commit.

    A README that somebody else wrote is kept; the picture that one of ours showed goes with it.

    Args:
        repo: `user/model`; it is made where it does not exist.
        files: The files.
        message: The commit's.
        private: Whether a new repository is private; by default as the account has it.
        branch: The branch, by default `main`; it is made where it does not exist.
        tag: A name for the commit.
        token: A token with the right to write; by default that of the environment or of `hf auth login`.

    Returns:
        `user/model@commit`.

    Raises:
        OptionError: The name of the branch or tag, or the message, is none. Nothing was sent.
        HubError: It cannot be done; without a commit the repository has what it had.
    """
    for what, ref in (("branch", branch), ("tag", tag)):
        if ref is not None and not (isinstance(ref, str) and _REF.fullmatch(ref)):
            raise OptionError(f"{ref!r} is not the name of a {what}. Name it by letters, digits, '.', '-' and '/'.")
    if not isinstance(message, str) or not message.strip():
        raise OptionError(f"message={message!r} is not the message of a commit. Give a text, or leave it out.")
    api = huggingface_hub.HfApi(token=token, **_agent())
    with _explained(f"{repo!r} cannot be created or opened"):
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if branch is not None and branch != "main":
            api.create_branch(name, branch=branch, exist_ok=True)
        if tag is not None and any(ref.name == tag for ref in api.list_repo_refs(name).tags):
            raise HubError(f"{name!r} has a tag {tag!r} already. Give another.")
        held = api.model_info(name, revision=branch)
    written = card_of(f"{name}@{held.sha}", token)
    card = None if written is None else written.decode(errors="replace")
    kept = (CARD,) if card is not None and not is_ours(card) else ()
    there = {file.rfilename for file in held.siblings or ()}
    what = f"{name!r} was not written, as far as is known: all of it comes with the commit, at the end"
    with _explained(what), tempfile.TemporaryDirectory() as folder:
        gone = there.intersection(outdated(card, files))
        operations: list[Any] = [huggingface_hub.CommitOperationDelete(path) for path in gone]
        for path in (path for path in files if path not in kept):
            # Of a file the client shows how much of it is sent, of bytes it does not.
            (Path(folder) / path).write_bytes(files[path])
            operations.append(huggingface_hub.CommitOperationAdd(path, Path(folder) / path))
        made = api.create_commit(name, operations, commit_message=message, revision=branch, parent_commit=held.sha)
    if tag is not None:
        with _explained(f"{name!r} has its commit {made.oid}, but not the tag {tag!r}"):
            api.create_tag(name, tag=tag, revision=made.oid)
    return f"{name}@{made.oid}"


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into one error that says what to do."""
    try:
        yield
    except HubError:
        raise
    # Of its own, of the transport's, of the storage's written in Rust: they have no class in common.
    except Exception as error:
        raise HubError(f"{what} ({type(error).__name__}: {_short(error)}). {_remedy(error)}") from error


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300].rstrip(".")


def _remedy(error: BaseException | None) -> str:
    while error is not None:
        if _XET.search(str(error)):
            return _NO_XET
        kinds = {kind.__name__ for kind in type(error).__mro__}
        found = next((remedy for name, remedy in _REMEDIES if name in kinds), None)
        if found is not None:
            return found
        if getattr(getattr(error, "response", None), "status_code", None) == 401:
            return _NO_TOKEN
        error = error.__cause__
    return _UNREACHED


def _agent() -> dict[str, Any]:
    from .. import __version__

    return {"library_name": "se-surgery", "library_version": __version__}
