"""From datasets to batches: order, mixtures, streams, the cache for object stores."""
