"""Raw text to a dataset (`prepare`), and a dataset to samples in one global order (`stream`)."""
