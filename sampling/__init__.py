"""From labels to images."""
