"""Settings, read and checked without torch."""
