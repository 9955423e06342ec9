"""From fused graph functions to loop nests, and from loop nests to what a backend accepts."""
