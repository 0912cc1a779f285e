"""What a step computes, and how fast."""
