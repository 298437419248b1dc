"""Flower's entry point on the server."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from federation.settings import Settings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run config describes."""
    settings = Settings.from_run_config(context.run_config)

    # Imported after the settings are known to be good: torch and the models take seconds.
    from .federation_run import run_federation

    run_federation(grid, settings, run_id=context.run_id)
