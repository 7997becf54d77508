"""Graph to something that runs elsewhere."""
