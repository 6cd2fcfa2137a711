"""Where `readers.compressed` was; goes when nothing imports it any more."""

from gristmill.data.readers.compressed import is_compressed

__all__ = ["is_compressed"]
