"""What a run leaves, for people: its model card, its page, its folder as both read it, the way to the hub."""
