"""What is scored, its scores, and the tables and pictures that show them."""
