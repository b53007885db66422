"""The register: every claim of the three systems that has a public source; and which capabilities have none."""

from __future__ import annotations

from papers_kit.claim import Claim
from papers_kit.rtswap_claims import RTSWAP
from papers_kit.sage_claims import SAGE
from papers_kit.swapnet_claims import SWAPNET

SYSTEMS = {"swapnet": "SwapNet", "rtswap": "RT-Swap", "sage": "SAGE"}
CLAIMS: tuple[Claim, ...] = (*SWAPNET, *RTSWAP, *SAGE)
ROWS = range(1, 64)  # of the project's list of capabilities
UNCLAIMED = {63: "a rule for ourselves: figures are quoted from the papers only where they are published"}


def chosen(ids: list[str]) -> list[Claim]:
    """The claims of these names, or all of none.

    Raises:
        KeyError: there is no such claim; its argument is the name.
    """
    known = {claim.id: claim for claim in CLAIMS}
    for name in ids:
        if name not in known:
            raise KeyError(name)
    return [known[name] for name in ids] if ids else list(CLAIMS)
