"""The chat page at ``/``: a single file, and a content security policy that allows it to load nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

PAGE = files("recursify.server").joinpath("page.html").read_text(encoding="utf-8")


def _hashes(tag: str) -> str:
    """Return the digests of the page's inline ``<tag>`` elements, as sources of a content security policy."""
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.S)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    f"frame-ancestors 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}"
)
