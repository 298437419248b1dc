"""What a run asks of a site, in the words of a policy."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class AskedFor:
    """What a run config asks of a site, as far as a policy cares.

    Parameters
    ----------
    task : str
        What is learned.
    columns : tuple of str
        Columns of the site's tables that would be read.
    mode : str
        ``privacy.mode``.
    seeded_noise : bool
        Whether noise would come from a seed.
    target_epsilon, target_delta : float
        Of the whole run.
    tells_count : str
        Setting by which the record count would leave; empty if none.
    """

    task: str
    columns: tuple[str, ...]
    mode: str
    seeded_noise: bool
    target_epsilon: float
    target_delta: float
    tells_count: str

    @property
    def is_private(self) -> bool:
        """Whether the run's releases have a record-level guarantee."""
        return self.mode == "record" and not self.seeded_noise
