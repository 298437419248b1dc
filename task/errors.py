"""What can be wrong with a site's data or with a model, as exceptions of their own."""


class DataError(ValueError):
    """A site's data cannot be used.

    The message names the file or column, what was found and what is accepted. It may travel to
    the server, so it never contains a record's content: at most a row number or a file's index.
    """


class ModelError(ValueError):
    """A backbone, its adapter or a set of adapter tensors cannot be used."""
