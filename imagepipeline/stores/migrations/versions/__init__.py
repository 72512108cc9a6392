"""One file per change of the tables, never edited after it was released."""
