"""The ServerApp: settings, strategy, central evaluation, adapter export, result."""
