"""Flower's entry point on the client."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from .round_handler import handle_train

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Take part in a round of private training."""
    return handle_train(message, context)
