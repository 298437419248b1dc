"""A Grid in this process: messages reach ClientApps (or functions) without Flower's network."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

Handler = Callable[[Message, Context], Message | list[Message] | None]


def stamp(message: Message, src: int, dst: int) -> Message:
    """Give a message what the network would."""
    message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
    message.metadata.__dict__["_src_node_id"] = src
    message.metadata.__dict__["_dst_node_id"] = dst
    return message


class FakeGrid(Grid):
    """Nodes 1..n, each with a Context of its own that lasts as long as the grid.

    A handler is called when its message is sent, and its exception becomes the error reply that
    Flower would send; ``None`` is a node that does not answer in time; a list is answered with all
    of its messages.
    """

    def __init__(self, handlers: list[Handler], run_config: dict | None = None) -> None:
        self.handlers = handlers
        self.sent: list[Message] = []
        self.received: list[Message] = []
        self._waiting: dict[str, list[Message]] = {}
        self.contexts = [
            Context(
                run_id=1,
                node_id=node,
                node_config={"partition-id": node - 1, "num-partitions": len(handlers)},
                state=RecordDict(),
                run_config=run_config or {},
            )
            for node in range(1, len(handlers) + 1)
        ]

    def set_run(self, run_id: int) -> None: ...

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(range(1, len(self.handlers) + 1))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            stamp(message, 0, node)
            self.sent.append(message)
            ids.append(message.metadata.message_id)
            try:
                answer = self.handlers[node - 1](message, self.contexts[node - 1])
            except Exception as error:
                answer = Message(Error(code=2, reason=f"{type(error)}:<{error}>"), reply_to=message)
            answers = answer if isinstance(answer, list) else [answer]
            self._waiting[ids[-1]] = [stamp(reply, node, 0) for reply in answers if reply]
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = []
        for message_id in message_ids:
            replies += self._waiting.pop(message_id, [])
        self.received.extend(replies)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))
