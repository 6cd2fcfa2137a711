"""Datasets as they lie on a disk or an object store: chunks, their table, the manifest."""
