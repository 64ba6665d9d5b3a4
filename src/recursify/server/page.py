"""The page at ``/``: one file, and the rule that it may load nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

PAGE = files("recursify.server").joinpath("page.html").read_text(encoding="utf-8")


def _hashes(tag: str) -> str:
    """The digests by which the page's own scripts or styles are let in."""
    found = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.S)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    f"frame-ancestors 'none'; script-src {_hashes('script')}; style-src {_hashes('style')}"
)
