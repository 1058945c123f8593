"""What Transformers reads and writes."""
