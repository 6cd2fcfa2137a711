"""From documents to chunks: plan, units, executors, workspaces, finalize."""
