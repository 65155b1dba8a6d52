"""The check of a data set: every image opened once, duplicates found, reports, a suggested command."""
