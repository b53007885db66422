"""One request's way to a node and back: which node, for how long, and where to when the node is lost meanwhile.

A network keeps nothing from one job to the next, so that a request whose node is lost can be asked of another one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from narrowboat.cluster.link import pack_inputs, unpack_reply
from narrowboat.cluster.member import Member, heard
from narrowboat.errors import BeyondContractError, ExpiredError, NodeLostError, NotServingError
from narrowboat.serve.interface import Reply
from narrowboat.tasks.tensors import RawTensor


class Router:
    """Carries requests.

    Args:
        homes: nodes that run a task and can be asked.
        patience: seconds for a request whose client sets no time.
        retry: seconds after which to come again when a task is being moved.
    """

    def __init__(self, homes: Callable[[str], Sequence[Member]], patience: float, retry: float) -> None:
        self._homes, self._patience, self._retry = homes, patience, retry
        self.again = 0  # requests that were asked of a second node

    async def infer(self, task: str, inputs: Mapping[str, RawTensor], timeout: int | None, priority: int) -> Reply:
        """The node's reply.

        Args:
            task: that is asked.
            inputs: of it.
            timeout: microseconds that the client waits.
            priority: see ``serve.interface.Gateway.infer``.

        Raises:
            ExpiredError: the time is over.
            NotServingError: no node that runs the task can be asked, or the last one was lost.
            RequestError: the node's own answer.
        """
        until = time.monotonic() + (self._patience if timeout is None else min(timeout / 1e6, self._patience))
        packed = pack_inputs(inputs)
        tried: dict[str, str] = {}
        refused: BeyondContractError | None = None
        while True:
            member = self._choose(task, tried)
            if member is None:
                if refused is not None:
                    raise refused
                lost = f" ({'; '.join(tried.values())})" if tried else ""
                raise NotServingError(f"no node runs {task!r} now{lost}; it is being moved", retry_after=self._retry)
            left = until - time.monotonic()
            if left <= 0:
                raise ExpiredError(f"{task}: no answer in time ({'; '.join(tried.values()) or 'the nodes are busy'})")
            asked = None if timeout is None else max(round(left * 1e6), 1)
            try:
                reply = await self._ask(member, (task, packed, asked, priority), left)
            except NodeLostError as error:
                tried[member.machine.identity] = str(error)
            except BeyondContractError as error:  # this node has enough; another one may have room
                tried[member.machine.identity], refused = str(error), error
            except TimeoutError:
                raise ExpiredError(f"{task}: node {member.name} gave no answer in time") from None
            else:
                return reply
            self.again += 1

    def _choose(self, task: str, tried: Mapping[str, str]) -> Member | None:
        """The node with the fewest requests under way."""
        there = [member for member in self._homes(task) if member.machine.identity not in tried]
        return min(there, key=lambda member: (sum(member.under_way.values()), member.name), default=None)

    async def _ask(self, member: Member, arguments: tuple[Any, ...], seconds: float) -> Reply:
        assert member.link is not None
        began, task = time.perf_counter(), arguments[0]
        call = asyncio.ensure_future(member.link.call("infer", *arguments))
        gone = asyncio.ensure_future(member.gone.wait())
        member.under_way[task] += 1
        try:
            done, _ = await asyncio.wait({call, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if call in done:
                reply = unpack_reply(call.result())
                way = round((time.perf_counter() - began) * 1e6) - reply.response
                member.longest = max(member.longest, way)
                return reply
            if gone in done:
                raise NodeLostError(f"node {member.name} was lost before it answered")
            raise TimeoutError
        finally:
            member.under_way[task] -= 1
            gone.cancel()
            call.cancel()
            call.add_done_callback(heard)
