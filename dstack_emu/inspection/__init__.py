"""What a piece of evidence is, what stands in it, and which checks it passes."""
