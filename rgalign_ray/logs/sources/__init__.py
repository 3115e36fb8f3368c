"""Real data sets, one file each, written in the layout that ingest reads."""
