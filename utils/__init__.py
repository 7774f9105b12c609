"""What two steps share, one concept per module."""
