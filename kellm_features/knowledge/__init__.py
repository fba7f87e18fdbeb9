"""From items and histories to text, and from text to vectors: prompts, engines, descriptions, encodings."""
