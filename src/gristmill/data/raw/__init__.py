"""Raw text: which files are read, how they part into documents, and how corpora are fetched."""
