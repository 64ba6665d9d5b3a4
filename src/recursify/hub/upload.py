"""Upload a publication with huggingface_hub's client, retry over interruptions, and verify the result."""

from __future__ import annotations

import glob
import hashlib
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, HfApi, constants
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
from huggingface_hub.utils import validate_repo_id

from recursify.errors import HubError

from .publication import Publication, sha256
from .settings import PushSettings

logger = logging.getLogger(__name__)

DELAYS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts. Files that arrived are not sent again. The client's own retries do not cover every request,
for instance not a commit that an overloaded Hub refuses."""

CLIENT_ERRORS = (HfHubHTTPError, OSError, TransportError, RuntimeError, ValueError)
"""Exceptions of the client: HTTP status, connections, and RuntimeError for a weight file whose upload failed."""

GIT_FILES = (".gitattributes",)
"""Files that the Hub itself adds to a repository."""

Result = TypeVar("Result")


def check_repo_id(repo_id: str) -> None:
    """Raise :class:`~recursify.errors.HubError` unless ``repo_id`` is a valid repository name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise explain(error, repo_id) from error


def upload(
    publication: Publication,
    repo_id: str,
    settings: PushSettings = PushSettings(),
    *,
    token: str | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> CommitInfo:
    """Upload ``publication`` into ``repo_id``, which is created if it does not exist.

    Args:
        publication: Result of :func:`recursify.hub.publication.stage_publication`.
        repo_id: Repository ``owner/name``, or ``name`` in the account of the token.
        settings: Branch, visibility, commit message, and whether to delete other files. A private upload into an
            existing public repository is refused.
        token: Token of the account; None takes the one of ``hf auth login`` or ``HF_TOKEN``.
        wait: Function that sleeps for a number of seconds between attempts.

    Raises:
        HubError: The token is missing or may not write, the repository has other files, the network stays away, or a
            file changed during the upload.
    """
    api, revision = HfApi(token=token), settings.revision
    retry = partial(_retry, wait)
    repo_id = retry(api.create_repo, repo_id, private=settings.private or None, exist_ok=True).repo_id
    if settings.private and not retry(api.repo_info, repo_id).private:
        raise HubError(
            f"'{repo_id}' exists and is public; --private applies to new repositories only. Change its visibility "
            f"on its page first, or choose another name."
        )
    if revision is not None:
        retry(api.create_branch, repo_id, branch=revision, exist_ok=True)
    kept = {*publication.sizes, *GIT_FILES}
    others = sorted(set(retry(api.list_repo_files, repo_id, revision=revision)) - kept)
    if others and not settings.overwrite:
        raise HubError(
            f"'{repo_id}' has {len(others)} files that this model does not have, first '{others[0]}'. Choose another "
            f"name, or delete them with --overwrite."
        )
    commit = retry(
        api.upload_folder,
        repo_id,
        folder_path=publication.stage,
        revision=revision,
        commit_message=settings.message,
        delete_patterns=[glob.escape(name) for name in others] or None,
    )
    if changed := [name for name, digest in publication.hashes.items() if sha256(publication.stage / name) != digest]:
        raise HubError(
            f"'{changed[0]}' changed while it was checked or uploaded, so '{repo_id}' may hold a mixture. Let the "
            f"other process finish, then push again."
        )
    tree = retry(lambda **source: list(api.list_repo_tree(**source)), repo_id, revision=commit.oid, recursive=True)
    _check_arrived(publication, {entry.path: entry for entry in tree}, repo_id)
    return commit


def _retry(wait: Callable[[float], None], call: Callable[..., Result], repo_id: str, **arguments: Any) -> Result:
    """``call(repo_id=repo_id, **arguments)``, retried over interruptions.

    Raises:
        HubError: The last attempt failed, or the Hub refused.
    """
    delays = iter(DELAYS)
    while True:
        try:
            return call(repo_id=repo_id, **arguments)
        except CLIENT_ERRORS as error:
            delay = next(delays, None)
            if delay is None or not _is_temporary(error):
                raise explain(error, repo_id) from error
            logger.warning("Upload interrupted (%s); resuming in %g s.", _reason(error), delay)
            wait(delay)


def _is_temporary(error: Exception) -> bool:
    """Tell whether the same call may succeed later."""
    if isinstance(error, ValueError | OfflineModeIsEnabled | LocalTokenNotFoundError | FileNotFoundError):
        return False
    status = _status(error)
    return status is None or status in (408, 412, 429) or status >= 500


def _status(error: BaseException | None) -> int | None:
    """HTTP status behind an error; None without a response."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return int(status)
        error = error.__cause__
    return None


def explain(error: Exception, repo_id: str) -> HubError:
    """Translate an error of the client into one clear message."""
    status = _status(error)
    if isinstance(error, OfflineModeIsEnabled):
        return HubError("HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it and push again.")
    if isinstance(error, HFValidationError):
        return HubError(f"'{repo_id}' is not a valid repository name: {_reason(error)} Use owner/name.")
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return HubError(
            f"The Hub refuses an upload to '{repo_id}' without a valid token. Log in with a token that may "
            f"write: hf auth login, or set HF_TOKEN."
        )
    if isinstance(error, GatedRepoError):
        return HubError(f"'{repo_id}' is gated and your token has no access. Request access on its page.")
    if status == 403:
        return HubError(
            f"Your token may not write to '{repo_id}': {_reason(error)} Create one with write access at "
            f"{constants.ENDPOINT}/settings/tokens, or choose a name in your own account."
        )
    if isinstance(error, RevisionNotFoundError | RepositoryNotFoundError):
        return HubError(f"'{repo_id}' does not exist, or your token may not read it: {_reason(error)} Check the name.")
    if isinstance(error, ValueError):
        return HubError(f"The Hub rejects the files for '{repo_id}': {_reason(error)}")
    return HubError(
        f"The upload to '{repo_id}' did not finish: {_reason(error)}. Run the same command again to resume: files that "
        f"arrived are kept."
    )


def _reason(error: Exception) -> str:
    message = getattr(error, "server_message", None) or str(error).strip()
    return message.splitlines()[0] if message else type(error).__name__


def _check_arrived(publication: Publication, entries: dict[str, Any], repo_id: str) -> None:
    for name, sha in publication.hashes.items():
        entry = entries.get(name)
        if not isinstance(entry, RepoFile) or (
            entry.lfs.sha256 != sha if entry.lfs else entry.blob_id != _git_blob(publication.stage / name)
        ):
            raise HubError(f"'{name}' in '{repo_id}' differs from the file that was sent. Push again.")


def _git_blob(file: Path) -> str:
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
