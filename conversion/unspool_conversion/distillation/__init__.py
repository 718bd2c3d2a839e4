"""Training of converted models against their teachers."""
