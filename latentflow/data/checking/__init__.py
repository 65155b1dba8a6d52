"""The check of a data set: every image opened once, duplicates found, a report in lines and as a page."""
