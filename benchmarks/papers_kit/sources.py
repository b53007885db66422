"""Where each claim is published. Nothing is attributed to a paper that is not in one of these."""

from __future__ import annotations

from dataclasses import dataclass

_SWAPNET = "SwapNet: Efficient Swapping for DNN Inference on Edge AI Devices Beyond the Memory Budget"
_RTSWAP = "RT-Swap: Addressing GPU Memory Bottlenecks for Real-Time Multi-DNN Inference"
_SAGE = "Memory-efficient DNN Training on Mobile Devices"


@dataclass(frozen=True)
class Source:
    """One public place.

    Attributes:
        label: as the table names it.
        title: of the work.
        authors: of the work.
        venue: where and when.
        url: where it can be read.
        first_hand: it is the authors' own text or code; others' words about it need a look into the paper.
    """

    label: str
    title: str
    authors: str
    venue: str
    url: str
    first_hand: bool = True


SOURCES: dict[str, Source] = {
    "swapnet": Source(
        "SwapNet, abstract",
        _SWAPNET,
        "Wang, Cao, Zhou, Li",
        "IEEE Transactions on Mobile Computing, 2024, doi:10.1109/TMC.2024.3355764; arXiv:2401.16757",
        "https://arxiv.org/abs/2401.16757",
    ),
    "swapnet-review": Source(
        "review of SwapNet",
        _SWAPNET,
        "a review of the paper on themoonlight.io",
        "web page, undated",
        "https://themoonlight.io/en/review/swapnet-efficient-swapping-for-dnn-inference-on-edge-ai-devices-beyond-"
        "the-memory-budget",
        first_hand=False,
    ),
    "swapnet-summary": Source(
        "summary of SwapNet",
        _SWAPNET,
        "a published summary of the paper, by a language model; its address was not kept, so look into the paper",
        "web page, undated",
        "https://doi.org/10.1109/TMC.2024.3355764",
        first_hand=False,
    ),
    "rtswap": Source(
        "RT-Swap, abstract",
        _RTSWAP,
        "Kang, J. Lee, Y. Lee, Oh, K. Lee, Chwa",
        "RTAS 2024, pp. 373-385, doi:10.1109/RTAS61025.2024.00037",
        "https://doi.org/10.1109/RTAS61025.2024.00037",
    ),
    "rtswap-code": Source(
        "RT-Swap, code",
        _RTSWAP,
        "the authors' repository fredrickang/Public-RT-Swap, branches main (264c577) and darknet (baddfa5)",
        "GitHub; without a licence file, so facts only",
        "https://github.com/fredrickang/Public-RT-Swap",
    ),
    "sage": Source(
        "SAGE, abstract",
        _SAGE,
        "Gim, Ko",
        "MobiSys 2022, pp. 464-476, doi:10.1145/3498361.3539765",
        "https://doi.org/10.1145/3498361.3539765",
    ),
    "sage-code": Source(
        "SAGE, code",
        _SAGE,
        "the authors' repository eis-lab/sage (07eca20)",
        "GitHub; facts only",
        "https://github.com/eis-lab/sage",
    ),
    "sage-notes": Source(
        "reading notes on SAGE",
        _SAGE,
        "a reader's public notes on the paper, on GitHub; their address was not kept, so look into the paper",
        "Markdown, undated",
        "https://doi.org/10.1145/3498361.3539765",
        first_hand=False,
    ),
}
