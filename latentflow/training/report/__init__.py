"""Reports of a run for people: its model card, its web page, its curves, and pushing it to the hub."""
