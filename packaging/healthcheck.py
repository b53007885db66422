"""Whether the gateway in this container answers: exit code 0 if it does. Standard library only.

``NARROWBOAT_HEALTH`` says where to ask, if not by plain HTTP at port 8000. With ``https`` the certificate is not
verified: it is made out to the name that clients use, and the question does not leave the container.
"""

from __future__ import annotations

import os
import ssl
import sys
import urllib.request

DEFAULT = "http://127.0.0.1:8000/v2/health/live"
SECONDS = 4.0


def alive(url: str) -> bool:
    """Whether a GET of ``url`` is answered with 200 in time."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    # A proxy of the environment is for the world outside.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(url, timeout=SECONDS) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):  # URLError and HTTPError among them
        return False


if __name__ == "__main__":
    sys.exit(0 if alive(os.environ.get("NARROWBOAT_HEALTH") or DEFAULT) else 1)
