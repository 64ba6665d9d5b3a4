"""Uploading a publication with huggingface_hub's own client, and making sure that it arrived."""

from __future__ import annotations

import glob
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.errors import HTTPError as TransportError
from huggingface_hub.hf_api import RepoFile

from recursify.errors import HubError

from .publication import Publication, sha256

ATTEMPTS = 5
FIRST_WAIT_SECONDS = 1.0
"""Doubled after every attempt. What the Hub has by then is not sent again. The client has retries of its own, but not
for every request: a commit that is refused by an overloaded Hub is not among them."""

CLIENT_ERRORS = (HfHubHTTPError, OSError, TransportError, RuntimeError, ValueError)
"""What the client raises: HTTP status, connections, and for a weight file that did not get through, RuntimeError."""

GIT_FILES = (".gitattributes",)
"""Files that the Hub itself puts into a repository."""

Tell = Callable[[str], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Pushed:
    """Where a model lies on the Hub.

    Attributes:
        repo_id: The repository.
        url: Its page.
        commit: The commit that holds the upload.
        sent: Bytes in all, those that were there already included.
    """

    repo_id: str
    url: str
    commit: str
    sent: int


def push(
    publication: Publication,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
    message: str = "Upload recursive model with recursify",
    token: str | None = None,
    tell: Tell = lambda line: None,
    wait: Callable[[float], None] = time.sleep,
) -> Pushed:
    """Upload ``publication`` into ``repo_id``, which is made if it is not there.

    Args:
        publication: From :func:`recursify.hub.publication.stage_publication`.
        repo_id: ``owner/name``, or ``name`` for the token's own.
        private: Make a new repository private; one that is there and public is refused.
        revision: Branch to commit to; made from ``main`` if it is not there.
        overwrite: Delete files of the repository that the model does not have.
        message: Of the commit.
        token: Of the account; None takes the one that ``hf auth login`` or ``HF_TOKEN`` left.
        tell: Told what happens, in lines for a person.
        wait: Sleeps so many seconds between attempts.

    Raises:
        HubError: No token, or one without the right to write; other files in the repository; a network that stays away;
            a file that changed while it was uploaded.
    """
    api = HfApi(token=token)
    repo_id = _find_repository(api, repo_id, private, tell, wait)
    if revision is not None:
        _again(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), repo_id, tell, wait)
    others = _other_files(api, repo_id, revision, publication, tell, wait)
    if others and not overwrite:
        raise HubError(
            f"'{repo_id}' holds {len(others)} files that this model does not have, first '{others[0]}'. Choose another "
            f"name, or --overwrite to delete them."
        )

    def upload() -> str:
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=publication.stage,
            revision=revision,
            commit_message=message,
            delete_patterns=[glob.escape(name) for name in others] or None,
        )
        return done.oid

    commit = _again(upload, repo_id, tell, wait)
    if changed := [name for name, found in publication.hashes.items() if sha256(publication.stage / name) != found]:
        raise HubError(
            f"'{changed[0]}' was changed while it was checked or uploaded, so '{repo_id}' may hold a mixture. Let the "
            f"other process finish, and push again."
        )
    _check_arrived(api, repo_id, commit, publication, tell, wait)
    return Pushed(repo_id, f"{constants.ENDPOINT}/{repo_id}", commit, sum(publication.sizes.values()))


def _find_repository(api: HfApi, repo_id: str, private: bool, tell: Tell, wait: Callable[[float], None]) -> str:
    """The full name of the repository, which is there afterwards, and private if that was asked for."""
    url = _again(lambda: api.create_repo(repo_id, private=private or None, exist_ok=True), repo_id, tell, wait)
    if private and not _again(lambda: api.repo_info(url.repo_id), repo_id, tell, wait).private:
        raise HubError(
            f"'{url.repo_id}' is there and public, and --private makes only new repositories so. Change its visibility "
            f"on its page first, or choose another name."
        )
    return url.repo_id


def _other_files(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    publication: Publication,
    tell: Tell,
    wait: Callable[[float], None],
) -> list[str]:
    """Files of the repository that the publication would leave standing."""
    there = _again(lambda: api.list_repo_files(repo_id, revision=revision), repo_id, tell, wait)
    return sorted(name for name in there if name not in publication.sizes and name not in GIT_FILES)


def _again(call: Callable[[], Result], repo_id: str, tell: Tell, wait: Callable[[float], None]) -> Result:
    """What ``call`` returns, tried anew while the network is away.

    Raises:
        HubError: It stayed away, or the Hub refused.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except CLIENT_ERRORS as error:
            if attempt == ATTEMPTS or not _is_passing(error):
                raise explain(error, repo_id) from error
            seconds = FIRST_WAIT_SECONDS * 2 ** (attempt - 1)
            tell(f"upload interrupted ({_reason(error)}); going on in {seconds:g} s")
            wait(seconds)
    raise AssertionError("the last attempt returns or raises")


def _is_passing(error: Exception) -> bool:
    """Whether the same call may succeed later."""
    if isinstance(error, ValueError | OfflineModeIsEnabled | LocalTokenNotFoundError | FileNotFoundError):
        return False
    status = _status(error)
    return status is None or status in (408, 412, 429) or status >= 500


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, or None where there was no answer."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        error = error.__cause__
    return None


def explain(error: Exception, repo_id: str) -> HubError:
    """What the client said, as one clear message."""
    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return HubError("HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it, and push again.")
    if isinstance(error, HFValidationError):
        return HubError(f"'{repo_id}' is no repository name: {_reason(error)} Give owner/name.")
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return HubError(
            f"The Hub takes no upload to '{repo_id}' without a valid token. Log in with one that may write: hf auth "
            f"login, or set HF_TOKEN."
        )
    if isinstance(error, GatedRepoError):
        return HubError(f"'{repo_id}' is gated and your token has no access. Ask for it on its page.")
    if status == 403:
        return HubError(
            f"Your token may not write to '{repo_id}': {_reason(error)} Make one with write access at "
            f"{constants.ENDPOINT}/settings/tokens, or choose a name under your own account."
        )
    if isinstance(error, RevisionNotFoundError | RepositoryNotFoundError):
        return HubError(f"'{repo_id}' is not there, or your token may not see it: {_reason(error)}")
    if isinstance(error, ValueError):
        return HubError(f"The Hub refuses what was to be uploaded to '{repo_id}': {_reason(error)}")
    return HubError(
        f"The upload to '{repo_id}' did not finish: {_reason(error)}. What arrived is kept: run the same command again "
        f"to go on."
    )


def _reason(error: Exception) -> str:
    message = getattr(error, "server_message", None) or str(error).strip()
    return message.splitlines()[0] if message else type(error).__name__


def _check_arrived(
    api: HfApi, repo_id: str, commit: str, publication: Publication, tell: Tell, wait: Callable[[float], None]
) -> None:
    """Raises:
    HubError: A file of the commit is not the one that was sent.
    """
    tree = _again(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=commit)), repo_id, tell, wait)
    entries = {entry.path: entry for entry in tree}
    for name, sha in publication.hashes.items():
        entry = entries.get(name)
        if not isinstance(entry, RepoFile) or (
            entry.lfs.sha256 != sha if entry.lfs else entry.blob_id != _git_blob(publication.stage / name)
        ):
            raise HubError(f"'{name}' did not arrive in '{repo_id}' as it was sent. Push again.")


def _git_blob(file: Path) -> str:
    """The name that git gives the content of ``file``."""
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
