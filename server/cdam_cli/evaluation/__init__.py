"""What `cdam evaluate` is made of: datasets, the journal, what the samples say together, and the report."""
