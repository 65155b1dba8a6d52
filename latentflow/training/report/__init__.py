"""Reports of a run for people: its model card, its web page with curves, and pushing it to the hub."""
