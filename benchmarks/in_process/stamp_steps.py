"""A hook for `gristmill pretrain --hook stamp_steps:stamp`: notes when every step has ended."""

import stamps


def stamp(run: object, stats: object) -> None:
    """Note the time."""
    stamps.stamp()
