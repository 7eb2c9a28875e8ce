"""Which entries of a network's weights belong together: a pass in which every channel carries a label."""
